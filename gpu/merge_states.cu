#include <faiss_saap/gpu/merge_states.h>

#include <algorithm>

#include <faiss_saap/merge_states.h>

#include "check.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 128;

/// One block per partial result.
__global__ void merge_states_kernel(MergeStatesParams p) {
    for (int64_t i = blockIdx.x; i < p.n; i += gridDim.x) {
        const MergeWeights w = merge_weights(p.lse[i], p.lse_b[i]);
        __syncthreads(); // all have read lse before one writes it
        for (int j = threadIdx.x; j < p.d_v; j += blockDim.x) {
            float& o = p.output[i * p.d_v + j];
            o = w.a * o + w.b * p.output_b[i * p.d_v + j];
        }
        if (threadIdx.x == 0) {
            p.lse[i] = w.lse;
        }
    }
}

} // namespace

void merge_states(const MergeStatesParams& p, cudaStream_t stream) {
    FAISS_THROW_IF_NOT_FMT(
            p.n >= 0,
            "n = %lld must not be negative",
            static_cast<long long>(p.n));
    FAISS_THROW_IF_NOT_FMT(p.d_v >= 1, "d_v = %d must be at least 1", p.d_v);
    if (p.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(p.output, "output is null");
    FAISS_THROW_IF_NOT_MSG(p.lse, "lse is null");
    FAISS_THROW_IF_NOT_MSG(p.output_b, "output_b is null");
    FAISS_THROW_IF_NOT_MSG(p.lse_b, "lse_b is null");
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(p.n, 65535));
    merge_states_kernel<<<blocks, kThreads, 0, stream>>>(p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
