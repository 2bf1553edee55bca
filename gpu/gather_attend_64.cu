#include "gather_attend.cuh"

namespace faiss_saap::gpu {

template cudaError_t gather_attend<__half, 64>(const AttendParams&, cudaStream_t);
template cudaError_t gather_attend<__nv_bfloat16, 64>(
        const AttendParams&,
        cudaStream_t);

} // namespace faiss_saap::gpu
