/// CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::gpu {

/// Whether nothing on the device can be used after this error.
inline bool loses_context(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorMisalignedAddress:
        case cudaErrorIllegalInstruction:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable:
        case cudaErrorNvlinkUncorrectable:
        case cudaErrorMpsClientTerminated:
        case cudaErrorExternalDevice:
#if CUDART_VERSION >= 13000
        case cudaErrorContained:
        case cudaErrorTensorMemoryLeak:
#endif
            return true;
        default:
            return false;
    }
}

[[noreturn]] inline void throw_cuda(const char* call, cudaError_t error) {
    if (!loses_context(error)) {
        cudaGetLastError(); // the next call begins clean
    }
    FAISS_THROW_FMT(
            "CUDA: %s: %s%s",
            call,
            cudaGetErrorString(error),
            loses_context(error)
                    ? "; the device's context is lost, and all that lies in it"
                    : "");
}

} // namespace faiss_saap::gpu

/// Throws when a CUDA call fails: the sentence names the call and CUDA's words.
#define FAISS_SAAP_CUDA_CHECK(call)                        \
    do {                                                   \
        const cudaError_t cuda_error = (call);             \
        if (cuda_error != cudaSuccess) {                   \
            ::faiss_saap::gpu::throw_cuda(#call, cuda_error); \
        }                                                  \
    } while (false)
