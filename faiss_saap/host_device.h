/// Marks functions that run on the host and, where a CUDA compiler reads them,
/// on the device.
#pragma once

#if defined(__CUDACC__)
#define FAISS_SAAP_HOST_DEVICE __host__ __device__
#else
#define FAISS_SAAP_HOST_DEVICE
#endif
