# Faiss's own package config names OpenMP and BLAS without finding them.
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(BLAS REQUIRED)
find_package(faiss REQUIRED)
find_package(nlohmann_json 3.7 REQUIRED)
find_package(fmt 8 REQUIRED)

if(FAISS_SAAP_BENCHS)
  find_package(CLI11 2.1 REQUIRED)
endif()
if(FAISS_SAAP_TESTS)
  find_package(GTest REQUIRED)
  find_package(Python3 COMPONENTS Interpreter)
endif()
