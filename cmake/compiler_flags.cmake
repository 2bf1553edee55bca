# Warnings and reproducible paths for our own targets.
add_library(faiss_saap_flags INTERFACE)
target_compile_options(faiss_saap_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wno-sign-compare
    -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>)
if(FAISS_SAAP_WERROR)
  target_compile_options(faiss_saap_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror>
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
