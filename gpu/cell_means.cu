#include <faiss_saap/gpu/cell_means.h>

#include <algorithm>
#include <climits>

#include <faiss_saap/gpu/fixed_point.h>

#include "DeviceBuffer.h"
#include "check.h"
#include "typed_vectors.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
/// Vectors that one block adds up.
constexpr int kChunk = 128;

struct Steps {
    CellMeansParams p;
    unsigned* largest;        ///< per head: bits of the largest |component|
    int* begin;               ///< nhead * (ncell + 1): where a cell's vectors are
    int* cursor;              ///< nhead * ncell: where the next one goes
    int* order;               ///< nhead * n: vectors by cell
    unsigned long long* sums; ///< nhead * ncell * d, two's complement
};

Steps steps(const CellMeansParams& p, Layout& w) {
    Steps s;
    s.p = p;
    const size_t cells = size_t(p.nhead) * p.ncell;
    s.largest = w.take<unsigned>(p.nhead);
    s.begin = w.take<int>(cells + p.nhead);
    s.cursor = w.take<int>(cells);
    s.order = w.take<int>(size_t(p.nhead) * p.n);
    s.sums = w.take<unsigned long long>(cells * p.d);
    return s;
}

__device__ int cell_of(const Steps& s, int64_t head, int64_t i) {
    const int cell = s.p.cells[head * s.p.cells_head_stride + i];
    return cell >= 0 && cell < s.p.ncell ? cell : -1;
}

/// Counts vectors per cell, and finds the largest component. Floats without sign order as
/// their bits do.
__global__ void count_kernel(Steps s) {
    const int64_t head = blockIdx.y;
    const int64_t first = int64_t(blockIdx.x) * kChunk;
    const int64_t last = min(first + kChunk, s.p.n);
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
        const int cell = cell_of(s, head, i);
        if (cell >= 0) {
            atomicAdd(s.p.counts + head * s.p.ncell + cell, 1);
        }
    }
    if (s.p.same_vectors) {
        return;
    }
    unsigned largest = 0;
    for (int64_t i = first + threadIdx.x / 32; i < last; i += kThreads / 32) {
        const int64_t row = head * s.p.x_head_stride + i * s.p.x_row_stride;
#pragma unroll 4
        for (int j = threadIdx.x % 32; j < s.p.d; j += 32) {
            const float x = component(s.p.type, s.p.x, row + j);
            if (isfinite(x)) {
                largest = max(largest, __float_as_uint(fabsf(x)));
            }
        }
    }
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) {
        atomicMax(s.largest + head, largest);
    }
}

/// Exclusive sums of the counts; one block per head.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(Steps s) {
    __shared__ int warp_sum[kScanThreads / 32];
    const int64_t head = blockIdx.x;
    const int* counts = s.p.counts + head * s.p.ncell;
    int* begin = s.begin + head * (s.p.ncell + 1);
    int* cursor = s.cursor + head * s.p.ncell;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int carry = 0;
    for (int c0 = 0; c0 < s.p.ncell; c0 += kScanThreads) {
        const int c = c0 + threadIdx.x;
        const int count = c < s.p.ncell ? counts[c] : 0;
        int sum = count; // inclusive
        for (int apart = 1; apart < 32; apart *= 2) {
            const int before = __shfl_up_sync(~0u, sum, apart);
            sum += lane >= apart ? before : 0;
        }
        if (lane == 31) {
            warp_sum[warp] = sum;
        }
        __syncthreads();
        int total = 0, before_warp = 0;
        for (int w = 0; w < kScanThreads / 32; w++) {
            before_warp += w < warp ? warp_sum[w] : 0;
            total += warp_sum[w];
        }
        if (c < s.p.ncell) {
            begin[c] = cursor[c] = carry + before_warp + sum - count;
        }
        carry += total;
        __syncthreads(); // warp_sum is written again
    }
    if (threadIdx.x == 0) {
        begin[s.p.ncell] = carry;
    }
}

/// Gathers the vectors of each cell, in any order.
__global__ void order_kernel(Steps s) {
    const int64_t head = blockIdx.y;
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < s.p.n) {
        const int cell = cell_of(s, head, i);
        if (cell >= 0) {
            const int at = atomicAdd(s.cursor + head * s.p.ncell + cell, 1);
            s.order[head * s.p.n + at] = static_cast<int>(i);
        }
    }
}

__device__ double factor(const Steps& s, int64_t head) {
    const float largest = __uint_as_float(s.largest[head]);
    return ldexp(1.0, fixed_point_exponent(largest, s.p.n));
}

/// One block adds up kChunk ordered vectors, a thread some components. Cells
/// that several blocks share meet in an atomic addition of integers.
__global__ void sum_kernel(Steps s) {
    __shared__ int id[kChunk], cell[kChunk];
    const int64_t head = blockIdx.y;
    const int valid = s.begin[head * (s.p.ncell + 1) + s.p.ncell];
    const int64_t first = int64_t(blockIdx.x) * kChunk;
    const int count =
            static_cast<int>(min(int64_t(kChunk), int64_t(valid) - first));
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
        id[e] = s.order[head * s.p.n + first + e];
        cell[e] = cell_of(s, head, id[e]);
    }
    __syncthreads();
    if (count <= 0) {
        return;
    }
    const double scale = factor(s, head);
    unsigned long long* sums = s.sums + head * s.p.ncell * s.p.d;
    for (int j = threadIdx.x; j < s.p.d; j += blockDim.x) {
        long long sum = 0;
#pragma unroll 8
        for (int e = 0; e < count; e++) {
            const float x = component(
                    s.p.type,
                    s.p.x,
                    head * s.p.x_head_stride + id[e] * s.p.x_row_stride + j);
            sum += __double2ll_rn(x * scale);
            if (e + 1 == count || cell[e + 1] != cell[e]) {
                atomicAdd(
                        sums + int64_t(cell[e]) * s.p.d + j,
                        static_cast<unsigned long long>(sum));
                sum = 0;
            }
        }
    }
}

__global__ void mean_kernel(Steps s) {
    const int64_t head = blockIdx.y;
    const int64_t size = int64_t(s.p.ncell) * s.p.d;
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size) {
        return;
    }
    const int count = s.p.counts[head * s.p.ncell + at / s.p.d];
    if (count > 0) {
        const auto sum = static_cast<long long>(s.sums[head * size + at]);
        s.p.means[head * size + at] = static_cast<float>(
                static_cast<double>(sum) / (factor(s, head) * count));
    }
}

void check_sizes(const CellMeansParams& p) {
    FAISS_THROW_IF_NOT_FMT(
            p.nhead >= 1 && p.nhead <= 65535,
            "nhead = %d must be between 1 and 65535",
            p.nhead);
    FAISS_THROW_IF_NOT_FMT(
            p.n >= 0 && p.n <= INT_MAX,
            "n = %lld must be between 0 and 2147483647",
            static_cast<long long>(p.n));
    FAISS_THROW_IF_NOT_FMT(p.d >= 1, "d = %d must be at least 1", p.d);
    FAISS_THROW_IF_NOT_FMT(
            p.ncell >= 1 && p.ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            p.ncell);
    FAISS_THROW_IF_NOT_FMT(
            p.type == DType::float32 || p.type == DType::bfloat16,
            "type = %s must be float32 or bfloat16",
            name(p.type));
}

unsigned blocks(int64_t items, int per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

} // namespace

size_t cell_means_workspace(const CellMeansParams& p) {
    check_sizes(p);
    Layout w;
    steps(p, w);
    return w.size();
}

void cell_means(const CellMeansParams& p, void* workspace, cudaStream_t stream) {
    check_sizes(p);
    FAISS_THROW_IF_NOT_MSG(p.n == 0 || p.x, "x is null");
    FAISS_THROW_IF_NOT_MSG(p.n == 0 || p.cells, "cells is null");
    FAISS_THROW_IF_NOT_MSG(p.means, "means is null");
    FAISS_THROW_IF_NOT_MSG(p.counts, "counts is null");
    FAISS_THROW_IF_NOT_MSG(workspace, "workspace is null");
    Layout w(static_cast<char*>(workspace));
    const Steps s = steps(p, w);
    const size_t cells = size_t(p.nhead) * p.ncell;
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(p.counts, 0, cells * 4, stream));
    if (p.n == 0) {
        return;
    }
    if (!p.same_vectors) {
        FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(s.largest, 0, p.nhead * 4, stream));
    }
    FAISS_SAAP_CUDA_CHECK(
            cudaMemsetAsync(s.sums, 0, cells * p.d * sizeof(*s.sums), stream));
    const dim3 chunks(blocks(p.n, kChunk), p.nhead);
    count_kernel<<<chunks, kThreads, 0, stream>>>(s);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    scan_kernel<<<p.nhead, kScanThreads, 0, stream>>>(s);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    order_kernel<<<dim3(blocks(p.n, kThreads), p.nhead), kThreads, 0, stream>>>(s);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    sum_kernel<<<chunks, std::clamp((p.d + 31) / 32 * 32, 32, kThreads), 0, stream>>>(
            s);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    const int64_t size = int64_t(p.ncell) * p.d;
    mean_kernel<<<dim3(blocks(size, kThreads), p.nhead), kThreads, 0, stream>>>(s);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
