#include "read_kernels.h"

#include <algorithm>

namespace faiss_saap::benchs {

namespace {

constexpr int kThreads = 256;

__device__ uint32_t fold(uint4 x) {
    return x.x ^ x.y ^ x.z ^ x.w;
}

__global__ void __launch_bounds__(kThreads)
        read_all_kernel(const uint4* a, size_t n, uint32_t* sink) {
    uint32_t sum = 0;
    const size_t step = size_t(gridDim.x) * kThreads;
    size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        const uint4 w = __ldcs(a + i), x = __ldcs(a + i + step),
                    y = __ldcs(a + i + 2 * step), z = __ldcs(a + i + 3 * step);
        sum ^= fold(w) ^ fold(x) ^ fold(y) ^ fold(z);
    }
    for (; i < n; i += step) {
        sum ^= fold(__ldcs(a + i));
    }
    if (sum == 0x12345678u) { // never known at compile time
        *sink = sum;
    }
}

__global__ void __launch_bounds__(kThreads) read_rows_kernel(ReadRowsParams p) {
    const int per_row = p.bytes / 16;
    const int64_t total = p.n * per_row;
    uint32_t sum = 0;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total;
         i += int64_t(gridDim.x) * kThreads) {
        const int64_t at = p.offsets[i / per_row] + i % per_row * 16;
        sum ^= fold(*reinterpret_cast<const uint4*>(p.k + at)) ^
                fold(*reinterpret_cast<const uint4*>(p.v + at));
    }
    if (sum == 0x12345678u) {
        *p.sink = sum;
    }
}

} // namespace

cudaError_t read_all(
        const void* a,
        size_t bytes,
        uint32_t* sink,
        cudaStream_t stream) {
    read_all_kernel<<<132 * 8, kThreads, 0, stream>>>(
            static_cast<const uint4*>(a), bytes / 16, sink);
    return cudaGetLastError();
}

cudaError_t read_rows(const ReadRowsParams& p, cudaStream_t stream) {
    const int64_t blocks = (p.n * (p.bytes / 16) + kThreads - 1) / kThreads;
    read_rows_kernel<<<
            static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 132 * 16)),
            kThreads,
            0,
            stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::benchs
