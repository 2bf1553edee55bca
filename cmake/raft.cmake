# Finds RAFT as its pip packages have it: headers, and two small libraries.
set(FAISS_SAAP_WITH_RAFT OFF)
if(NOT FAISS_SAAP_WITH_CUDA)
  return()
endif()
if(FAISS_SAAP_RAFT STREQUAL "OFF")
  message(STATUS "faiss_saap: our own select_k alone, as asked for")
  return()
endif()

set(site)
if(Python3_EXECUTABLE)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('platlib'))"
    OUTPUT_VARIABLE site OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(RAFT_INCLUDE_DIR raft/matrix/select_k.cuh HINTS ${site}/libraft/include)
find_path(RMM_INCLUDE_DIR rmm/device_buffer.hpp HINTS ${site}/librmm/include)
find_path(RAPIDS_LOGGER_INCLUDE_DIR rapids_logger/logger.hpp HINTS ${site}/rapids_logger/include)
find_library(RMM_LIBRARY rmm HINTS ${site}/librmm/lib64)
find_library(RAPIDS_LOGGER_LIBRARY rapids_logger HINTS ${site}/rapids_logger/lib64)

if(RAFT_INCLUDE_DIR AND RMM_INCLUDE_DIR AND RAPIDS_LOGGER_INCLUDE_DIR AND RMM_LIBRARY
   AND RAPIDS_LOGGER_LIBRARY)
  set(FAISS_SAAP_WITH_RAFT ON)
  add_library(faiss_saap_raft INTERFACE)
  target_include_directories(faiss_saap_raft SYSTEM INTERFACE
    ${RAFT_INCLUDE_DIR} ${RMM_INCLUDE_DIR} ${RAPIDS_LOGGER_INCLUDE_DIR})
  target_link_libraries(faiss_saap_raft INTERFACE ${RMM_LIBRARY} ${RAPIDS_LOGGER_LIBRARY})
  target_compile_definitions(faiss_saap_raft INTERFACE
    LIBCUDACXX_ENABLE_EXPERIMENTAL_MEMORY_RESOURCE RAFT_SYSTEM_LITTLE_ENDIAN=1)
  target_compile_options(faiss_saap_raft INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-extended-lambda --expt-relaxed-constexpr>)
  message(STATUS "faiss_saap: RAFT's select_k beside our own, headers in ${RAFT_INCLUDE_DIR}")
elseif(FAISS_SAAP_RAFT STREQUAL "ON")
  message(FATAL_ERROR "FAISS_SAAP_RAFT is ON but RAFT was not found: pip install --no-deps -r contrib/requirements-cuda.txt")
else()
  message(STATUS "faiss_saap: our own select_k alone, as RAFT was not found")
endif()
