/// CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <faiss/impl/FaissAssert.h>

/// Throws when a CUDA call fails: the sentence names the call and CUDA's words.
#define FAISS_SAAP_CUDA_CHECK(call)                                  \
    do {                                                             \
        const cudaError_t cuda_error = (call);                       \
        FAISS_THROW_IF_NOT_FMT(                                      \
                cuda_error == cudaSuccess,                           \
                "CUDA: %s: %s",                                      \
                #call,                                               \
                cudaGetErrorString(cuda_error));                     \
    } while (false)
