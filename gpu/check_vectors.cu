#include "check_vectors.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

/// The first vector whose squared norm is not finite or that has a component beyond
/// the largest. One warp per vector.
__global__ void find_too_large_kernel(
        const float* x,
        int64_t n,
        int d,
        float largest,
        unsigned long long* first) {
    const int64_t warps = int64_t(gridDim.x) * blockDim.x / 32;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
         i < n;
         i += warps) {
        float sum = 0.0f;
        bool beyond = false;
        for (int j = threadIdx.x % 32; j < d; j += 32) {
            sum = fmaf(x[i * d + j], x[i * d + j], sum);
            beyond |= fabsf(x[i * d + j]) > largest;
        }
        beyond = __any_sync(~0u, beyond);
        for (int apart = 16; apart > 0; apart /= 2) {
            sum += __shfl_xor_sync(~0u, sum, apart);
        }
        if (threadIdx.x % 32 == 0 && (beyond || !isfinite(sum))) {
            atomicMin(first, static_cast<unsigned long long>(i));
        }
    }
}

__global__ void find_negative_kernel(
        const int64_t* ids,
        int64_t n,
        unsigned long long* first) {
    const int64_t threads = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += threads) {
        if (ids[i] < 0) {
            atomicMin(first, static_cast<unsigned long long>(i));
        }
    }
}

unsigned blocks(int64_t items, int per_block) {
    return static_cast<unsigned>(
            std::min<int64_t>((items + per_block - 1) / per_block, 65535));
}

/// What launch(first) finds, or -1.
template <class Launch>
int64_t find(const StreamMemory& memory, const Launch& launch) {
    StreamBuffer<unsigned long long> first(memory, 1);
    FAISS_SAAP_CUDA_CHECK(
            cudaMemsetAsync(first.get(), 0xff, sizeof(*first.get()), memory.stream));
    launch(first.get());
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    unsigned long long found = 0;
    copy_async(&found, first.get(), 1, memory.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    return static_cast<int64_t>(found); // all bits set is -1
}

} // namespace

void check_finite(
        const float* x,
        int64_t n,
        int d,
        int64_t first,
        const char* name,
        const StreamMemory& memory,
        float largest) {
    if (n == 0) {
        return;
    }
    const int64_t bad = find(memory, [&](unsigned long long* found) {
        find_too_large_kernel<<<blocks(n, kThreads / 32), kThreads, 0, memory.stream>>>(
                x, n, d, largest, found);
    });
    if (bad < 0) {
        return;
    }
    std::vector<float> vector(d);
    copy_async(vector.data(), x + bad * d, d, memory.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    const long long number = first + bad;
    for (int j = 0; j < d; j++) {
        FAISS_THROW_IF_NOT_FMT(
                std::isfinite(vector[j]),
                "%s[%lld] (vector %lld, component %d) is %f: values must be "
                "finite",
                name,
                number * d + j,
                number,
                j,
                static_cast<double>(vector[j]));
    }
    for (int j = 0; j < d; j++) {
        FAISS_THROW_IF_NOT_FMT(
                std::fabs(vector[j]) <= largest,
                "%s[%lld] = %g is beyond the %g that float16 can store",
                name,
                number * d + j,
                static_cast<double>(vector[j]),
                static_cast<double>(largest));
    }
    FAISS_THROW_FMT(
            "%s: the squared norm of vector %lld is too large for a float",
            name,
            number);
}

void check_ids(const int64_t* ids, int64_t n, const StreamMemory& memory) {
    if (n == 0) {
        return;
    }
    const int64_t bad = find(memory, [&](unsigned long long* found) {
        find_negative_kernel<<<blocks(n, kThreads), kThreads, 0, memory.stream>>>(
                ids, n, found);
    });
    if (bad >= 0) {
        int64_t id = 0;
        copy_async(&id, ids + bad, 1, memory.stream);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
        FAISS_THROW_FMT(
                "xids[%lld] = %lld must not be negative",
                static_cast<long long>(bad),
                static_cast<long long>(id));
    }
}

} // namespace faiss_saap::gpu
