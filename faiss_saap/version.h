/// Version of the library.
#pragma once

#define FAISS_SAAP_VERSION_MAJOR 0
#define FAISS_SAAP_VERSION_MINOR 1
#define FAISS_SAAP_VERSION_PATCH 0
#define FAISS_SAAP_VERSION "0.1.0"
