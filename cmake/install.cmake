# Install rules and the package config behind find_package(faiss_saap).
include(CMakePackageConfigHelpers)

set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/faiss_saap)
install(DIRECTORY faiss_saap/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/faiss_saap
        FILES_MATCHING PATTERN "*.h")
install(EXPORT faiss_saap-targets NAMESPACE faiss_saap:: DESTINATION ${config_dir})

configure_package_config_file(
  cmake/faiss_saap-config.cmake.in ${PROJECT_BINARY_DIR}/faiss_saap-config.cmake
  INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/faiss_saap-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/faiss_saap-config.cmake
  ${PROJECT_BINARY_DIR}/faiss_saap-config-version.cmake
  DESTINATION ${config_dir})
