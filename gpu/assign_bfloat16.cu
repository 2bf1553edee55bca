#include <faiss_saap/gpu/assign_bfloat16.h>

#include <climits>
#include <type_traits>

#include "check.h"
#include "split_products.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

__global__ void split_rows(AssignBfloat16Params p, __nv_bfloat16* to) {
    const int cols = split_cols(p.d);
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t head = blockIdx.y, c = i / cols;
    const auto j = static_cast<int>(i % cols);
    if (c < p.ncell) {
        store_split(
                to + (head * p.ncell + c) * 2 * cols,
                cols,
                j,
                j < p.d ? p.centroids[head * p.centroids_head_stride + c * p.d + j]
                        : 0.0f);
    }
}

/// A warp has 16 * M vectors.
/// @tparam N           cells of a tile
/// @tparam kOtherLow   centroids have low parts
/// @tparam K           sixteenths of a vector, which is held in registers; 0: it is not
template <int M, int N, bool kOtherLow, int K>
__global__ void __launch_bounds__(kThreads, 2)
        assign_kernel(AssignBfloat16Params p, const __nv_bfloat16* centroids) {
    extern __shared__ __align__(16) __nv_bfloat16 shared[];
    const int64_t head = blockIdx.y;
    const int tile = static_cast<int>(blockDim.x) / 32 * 16 * M;
    const int64_t first = int64_t(blockIdx.x) * tile;
    const int cols = split_cols(p.d), stride = split_stride(cols, false);
    const auto* x = static_cast<const __nv_bfloat16*>(p.x) +
            head * p.x_head_stride;
    const int pieces = cols / 8;
    for (int i = threadIdx.x; i < tile * pieces; i += blockDim.x) {
        const int r = i / pieces, j = i % pieces * 8;
        const bool there = first + r < p.n && j < p.d;
        copy_16_bytes(
                shared + r * stride + j,
                there ? x + (first + r) * p.x_row_stride + j : x,
                there);
    }
    commit_copies();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* bias = p.bias ? p.bias + head * p.bias_head_stride : nullptr;
    const __nv_bfloat16* own = shared + warp * 16 * M * stride;
    HeldRows<M, K ? K : 1> held;
    if constexpr (K > 0) {
        wait_for_copies<0>();
        __syncthreads();
        held.load(own);
    }
    LargestOfRows<M> best;
    for_each_tile<N, kOtherLow>(
            shared + tile * stride,
            centroids + head * p.ncell * 2 * cols,
            p.ncell,
            cols,
            [&](const __nv_bfloat16* rows, int cell) {
                float score[M][N / 8][4] = {};
                if constexpr (K > 0) {
                    held.template multiply<N, kOtherLow>(rows, score);
                } else {
                    multiply_split<M, N, false, kOtherLow>(own, rows, cols, score);
                }
                best.template look<N>(score, bias, cell, p.ncell);
            });
    best.reduce();
    if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const int64_t row = first + warp * 16 * M + 8 * i + lane / 4;
            if (row < p.n) {
                p.cells[head * p.cells_head_stride + row] =
                        best.column[i / 2][i % 2];
            }
        }
    }
}

/// Launches the kernel if its tiles fit into the device's shared memory.
template <int M, int N, bool kOtherLow, int K>
bool assign_if_it_fits(
        const AssignBfloat16Params& p,
        const __nv_bfloat16* centroids,
        int warps,
        size_t most,
        cudaStream_t stream) {
    const int tile = warps * 16 * M;
    const int cols = split_cols(p.d);
    const size_t bytes = sizeof(__nv_bfloat16) *
            (size_t(tile) * split_stride(cols, false) +
             size_t(2 * N) * split_stride(cols, kOtherLow));
    if (bytes > most) {
        return false;
    }
    FAISS_SAAP_CUDA_CHECK(cudaFuncSetAttribute(
            assign_kernel<M, N, kOtherLow, K>,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(bytes)));
    const dim3 grid(static_cast<unsigned>((p.n + tile - 1) / tile), p.nhead);
    assign_kernel<M, N, kOtherLow, K>
            <<<grid, 32 * warps, bytes, stream>>>(p, centroids);
    return true;
}

template <bool kOtherLow>
void assign(
        const AssignBfloat16Params& p,
        const __nv_bfloat16* centroids,
        cudaStream_t stream) {
    int device = 0, most = 0;
    FAISS_SAAP_CUDA_CHECK(cudaGetDevice(&device));
    FAISS_SAAP_CUDA_CHECK(cudaDeviceGetAttribute(
            &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const auto with_two = [&](auto k) {
        return assign_if_it_fits<2, 32, kOtherLow, decltype(k)::value>(
                p, centroids, kThreads / 32, most, stream);
    };
    const int cols = split_cols(p.d);
    bool done = cols == 64 ? with_two(std::integral_constant<int, 4>())
            : cols == 96   ? with_two(std::integral_constant<int, 6>())
            : cols == 128  ? with_two(std::integral_constant<int, 8>())
                           : with_two(std::integral_constant<int, 0>());
    for (int warps = kThreads / 32; !done && warps > 0; warps /= 2) {
        done = assign_if_it_fits<1, 32, kOtherLow, 0>(
                p, centroids, warps, most, stream);
    }
}

void check_sizes(const AssignBfloat16Params& p) {
    FAISS_THROW_IF_NOT_FMT(
            p.nhead >= 1 && p.nhead <= 65535,
            "nhead = %d must be between 1 and 65535",
            p.nhead);
    FAISS_THROW_IF_NOT_FMT(
            p.n >= 0 && p.n <= INT_MAX,
            "n = %lld must be between 0 and 2147483647",
            static_cast<long long>(p.n));
    FAISS_THROW_IF_NOT_FMT(
            p.d >= 8 && p.d <= 256 && p.d % 8 == 0,
            "d = %d must be a multiple of 8 up to 256",
            p.d);
    FAISS_THROW_IF_NOT_FMT(
            p.ncell >= 1 && p.ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            p.ncell);
}

} // namespace

size_t assign_bfloat16_workspace(const AssignBfloat16Params& p) {
    check_sizes(p);
    return size_t(p.nhead) * p.ncell * 2 * split_cols(p.d) *
            sizeof(__nv_bfloat16);
}

void assign_bfloat16(
        const AssignBfloat16Params& p,
        void* workspace,
        cudaStream_t stream) {
    check_sizes(p);
    if (p.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(p.x, "x is null");
    FAISS_THROW_IF_NOT_MSG(p.centroids, "centroids is null");
    FAISS_THROW_IF_NOT_MSG(p.cells, "cells is null");
    FAISS_THROW_IF_NOT_MSG(workspace, "workspace is null");
    FAISS_THROW_IF_NOT_FMT(
            reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                    p.x_head_stride % 8 == 0 && p.x_row_stride % 8 == 0,
            "x = %p with strides of %lld and %lld elements: rows must begin at "
            "multiples of 16 bytes",
            p.x,
            static_cast<long long>(p.x_head_stride),
            static_cast<long long>(p.x_row_stride));
    auto* rows = static_cast<__nv_bfloat16*>(workspace);
    const int64_t size = int64_t(p.ncell) * split_cols(p.d);
    const dim3 grid(
            static_cast<unsigned>((size + kThreads - 1) / kThreads), p.nhead);
    split_rows<<<grid, kThreads, 0, stream>>>(p, rows);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    p.rounds_centroids ? assign<false>(p, rows, stream)
                       : assign<true>(p, rows, stream);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
