/// Products of float matrices on tensor cores. A number is the sum of two of
/// type bfloat16, a high and a low part, which hold it to 2^-17 of itself; of
/// their four products the one of two low parts is left out.
#pragma once

#include "mma.cuh"
#include "split_products.h"

namespace faiss_saap::gpu {

/// Writes one number of a row.
/// @tparam kLow  rows have low parts
template <bool kLow = true>
__device__ __forceinline__ void store_split(
        __nv_bfloat16* row,
        int cols,
        int j,
        float x) {
    const SplitFloat split(x);
    row[j] = split.high;
    if constexpr (kLow) {
        row[cols + j] = split.low;
    }
}

/// c <- c + a b' of a warp's 16 * M rows of a and N rows of b, in shared memory.
/// c[m][n] is laid out as multiply_add has it: lane l holds rows l / 4 and
/// l / 4 + 8, columns 2 (l % 4) and one more.
/// @tparam kLow       a has low parts
/// @tparam kOtherLow  b has
template <int M, int N, bool kLow, bool kOtherLow = true>
__device__ __forceinline__ void multiply_split(
        const __nv_bfloat16* a,
        const __nv_bfloat16* b,
        int cols,
        float (&c)[M][N / 8][4]) {
    const int lane = threadIdx.x % 32;
    const int a_stride = split_stride(cols, kLow);
    const int b_stride = split_stride(cols, kOtherLow);
    a += lane % 16 * a_stride + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 8;
    for (int k = 0; k < cols; k += 16) {
        uint32_t high[M][4], low[M][4], other[N / 16][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            load_matrices(high[m], a + m * 16 * a_stride + k);
            if constexpr (kLow) {
                load_matrices(low[m], a + m * 16 * a_stride + cols + k);
            }
        }
        const auto add = [&](const uint32_t(&rows)[M][4]) {
#pragma unroll
            for (int n = 0; n < N / 16; n++) {
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_add<__nv_bfloat16>(
                            c[m][2 * n], rows[m], other[n][0], other[n][1]);
                    multiply_add<__nv_bfloat16>(
                            c[m][2 * n + 1], rows[m], other[n][2], other[n][3]);
                }
            }
        };
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            load_matrices(other[n], b + n * 16 * b_stride + k);
        }
        add(high);
        if constexpr (kLow) {
            add(low);
        }
        if constexpr (kOtherLow) {
#pragma unroll
            for (int n = 0; n < N / 16; n++) {
                load_matrices(other[n], b + n * 16 * b_stride + cols + k);
            }
            add(high);
        }
    }
}

/// A warp's 16 * M rows of 16 * K numbers without low parts, in registers: rows that are
/// multiplied again and again are then read from shared memory once.
template <int M, int K>
struct HeldRows {
    uint32_t rows[K][M][4];

    /// @param a  in shared memory
    __device__ __forceinline__ void load(const __nv_bfloat16* a) {
        const int lane = threadIdx.x % 32;
        const int stride = split_stride(16 * K, false);
        a += lane % 16 * stride + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                load_matrices(rows[k][m], a + m * 16 * stride + 16 * k);
            }
        }
    }

    /// multiply_split with these rows.
    template <int N, bool kOtherLow>
    __device__ __forceinline__ void multiply(
            const __nv_bfloat16* b,
            float (&c)[M][N / 8][4]) const {
        const int lane = threadIdx.x % 32;
        const int stride = split_stride(16 * K, kOtherLow);
        b += (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int part = 0; part < (kOtherLow ? 2 : 1); part++) {
#pragma unroll
                for (int n = 0; n < N / 16; n++) {
                    uint32_t other[4];
                    load_matrices(other, b + n * 16 * stride + 16 * (part * K + k));
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        multiply_add<__nv_bfloat16>(
                                c[m][2 * n], rows[k][m], other[0], other[1]);
                        multiply_add<__nv_bfloat16>(
                                c[m][2 * n + 1], rows[k][m], other[2], other[3]);
                    }
                }
            }
        }
    }
};

/// Calls use(tile, first) for tiles of N rows of a split matrix in global memory,
/// in order, each in shared memory while the next one is on its way; zeros
/// behind the last row. By a whole block.
/// @tparam kLow   low parts too
/// @param  tiles  room for 2 * N rows
template <int N, bool kLow = true, class Use>
__device__ void for_each_tile(
        __nv_bfloat16* tiles,
        const __nv_bfloat16* rows,
        int nrow,
        int cols,
        const Use& use) {
    const int stride = split_stride(cols, kLow);
    const int pieces = cols / (kLow ? 4 : 8); // of 16 bytes
    const auto fetch = [&](int first, __nv_bfloat16* to) {
        for (int i = threadIdx.x; i < N * pieces; i += blockDim.x) {
            const int r = i / pieces, j = i % pieces * 8;
            const bool there = first + r < nrow;
            copy_16_bytes(
                    to + r * stride + j,
                    rows + (there ? int64_t(first + r) * 2 * cols + j : 0),
                    there);
        }
        commit_copies();
    };
    __syncthreads(); // what the room held is no longer read
    fetch(0, tiles);
    int buffer = 0;
    for (int first = 0; first < nrow; first += N, buffer ^= 1) {
        wait_for_copies<0>();
        __syncthreads(); // the tile before is no longer read
        if (first + N < nrow) {
            fetch(first + N, tiles + (buffer ^ 1) * N * stride);
        }
        use(tiles + buffer * N * stride, first);
    }
}

/// Where a warp's rows have their largest score, and the first column that has
/// it. Lanes look at columns of their own until `reduce`.
template <int M>
struct LargestOfRows {
    float score[M][2];
    int column[M][2]; ///< 0 where no score is above -infinity

    __device__ LargestOfRows() {
#pragma unroll
        for (int m = 0; m < M; m++) {
            score[m][0] = score[m][1] = -INFINITY;
            column[m][0] = column[m][1] = 0;
        }
    }
    /// @param bias   of the columns of a tile and those behind it, or null
    /// @param first  column of the tile, which must ascend from call to call
    template <int N>
    __device__ void look(
            const float (&c)[M][N / 8][4],
            const float* bias,
            int first,
            int ncol) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const int n = i / 2, odd = i % 2;
            const int col = first + 8 * n + threadIdx.x % 4 * 2 + odd;
            const float b = col >= ncol ? -INFINITY : bias ? bias[col] : 0.0f;
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float x = c[m][n][2 * h + odd] + b;
                    if (x > score[m][h]) {
                        score[m][h] = x;
                        column[m][h] = col;
                    }
                }
            }
        }
    }
    /// Lane l then has the result for rows l / 4 and l / 4 + 8 of each 16.
    __device__ void reduce() {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int apart = 2; apart > 0; apart /= 2) {
                    const float x = __shfl_xor_sync(~0u, score[m][h], apart);
                    const int col = __shfl_xor_sync(~0u, column[m][h], apart);
                    if (x > score[m][h] || (x == score[m][h] && col < column[m][h])) {
                        score[m][h] = x;
                        column[m][h] = col;
                    }
                }
            }
        }
    }
};

} // namespace faiss_saap::gpu
