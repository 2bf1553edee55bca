#include <faiss_saap/gpu/assign_cells.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "check.h"

namespace faiss_saap::gpu {

namespace {

/// Components that one step of a tile reads.
constexpr int kStep = 16;

/// A tile of Rows vectors against Cols cells. Each thread owns a register block
/// of RowsPerThread * ColsPerThread products, in groups of 4 that lie apart by
/// 4 times the threads of that direction: neighbouring threads then read
/// neighbouring 16 bytes of shared memory.
template <int Rows_, int Cols_, int RowsPerThread_, int ColsPerThread_>
struct Tile {
    static constexpr int Rows = Rows_, Cols = Cols_;
    static constexpr int RowsPerThread = RowsPerThread_;
    static constexpr int ColsPerThread = ColsPerThread_;
    static constexpr int ThreadsX = Cols / ColsPerThread;
    static constexpr int ThreadsY = Rows / RowsPerThread;
    static constexpr int Threads = ThreadsX * ThreadsY;
    static constexpr int Pad = 4; ///< keeps 16-byte alignment, halves conflicts
    static_assert(RowsPerThread % 4 == 0 && ColsPerThread % 4 == 0);
    static_assert(ThreadsX <= 32 && 32 % ThreadsX == 0, "rows lie in one warp");
    static_assert(Threads % 32 == 0);

    struct Shared {
        alignas(16) float x[2][kStep][Rows + Pad];
        alignas(16) float c[2][kStep][Cols + Pad];
    };

    static __device__ int row(int r) {
        return r / 4 * (4 * ThreadsY) + threadIdx.x / ThreadsX * 4 + r % 4;
    }
    static __device__ int col(int c) {
        return c / 4 * (4 * ThreadsX) + threadIdx.x % ThreadsX * 4 + c % 4;
    }
};

using BigTile = Tile<128, 128, 8, 8>;
using SmallTile = Tile<16, 128, 4, 4>; ///< for few vectors

/// One step of Count rows, on its way from global to shared memory. What lies
/// outside is zero.
template <int Count, int Threads, bool Aligned>
struct Fetch {
    static constexpr int Quads = Count * kStep / 4;
    static constexpr int PerThread = (Quads + Threads - 1) / Threads;
    float4 value[PerThread];

    __device__ void load(
            const float* rows,
            int64_t stride,
            int64_t count,
            int d,
            int k0) {
#pragma unroll
        for (int i = 0; i < PerThread; i++) {
            const int quad = threadIdx.x + i * Threads;
            const int row = quad / (kStep / 4);
            const int k = k0 + quad % (kStep / 4) * 4;
            float4 v = make_float4(0, 0, 0, 0);
            if (quad < Quads && row < count) {
                const float* from = rows + row * stride + k;
                if constexpr (Aligned) { // d is a multiple of 4 then
                    if (k < d) {
                        v = *reinterpret_cast<const float4*>(from);
                    }
                } else {
                    v.x = k + 0 < d ? from[0] : 0.0f;
                    v.y = k + 1 < d ? from[1] : 0.0f;
                    v.z = k + 2 < d ? from[2] : 0.0f;
                    v.w = k + 3 < d ? from[3] : 0.0f;
                }
            }
            value[i] = v;
        }
    }

    template <int Width>
    __device__ void store(float (&to)[kStep][Width]) const {
#pragma unroll
        for (int i = 0; i < PerThread; i++) {
            const int quad = threadIdx.x + i * Threads;
            if (quad < Quads) {
                const int row = quad / (kStep / 4);
                const int k = quad % (kStep / 4) * 4;
                to[k + 0][row] = value[i].x;
                to[k + 1][row] = value[i].y;
                to[k + 2][row] = value[i].z;
                to[k + 3][row] = value[i].w;
            }
        }
    }
};

/// The inner products of one tile, summed in the order of the components.
/// @param rows, cols  how many vectors and cells are really there
template <class T, bool Aligned>
__device__ void multiply_tile(
        typename T::Shared& shared,
        const float* x,
        int64_t x_row_stride,
        int64_t rows,
        const float* centroids,
        int64_t cols,
        int d,
        float (&sum)[T::RowsPerThread][T::ColsPerThread]) {
    Fetch<T::Rows, T::Threads, Aligned> fetch_x;
    Fetch<T::Cols, T::Threads, Aligned> fetch_c;
#pragma unroll
    for (int r = 0; r < T::RowsPerThread; r++) {
#pragma unroll
        for (int c = 0; c < T::ColsPerThread; c++) {
            sum[r][c] = 0.0f;
        }
    }
    fetch_x.load(x, x_row_stride, rows, d, 0);
    fetch_c.load(centroids, d, cols, d, 0);
    __syncthreads(); // the tile before is no longer read
    fetch_x.store(shared.x[0]);
    fetch_c.store(shared.c[0]);
    __syncthreads();
    int buffer = 0;
    for (int k0 = 0; k0 < d; k0 += kStep, buffer ^= 1) {
        const bool more = k0 + kStep < d;
        if (more) {
            fetch_x.load(x, x_row_stride, rows, d, k0 + kStep);
            fetch_c.load(centroids, d, cols, d, k0 + kStep);
        }
#pragma unroll
        for (int k = 0; k < kStep; k++) {
            float a[T::RowsPerThread], b[T::ColsPerThread];
#pragma unroll
            for (int r = 0; r < T::RowsPerThread; r += 4) {
                const float4 v = *reinterpret_cast<const float4*>(
                        &shared.x[buffer][k][T::row(r)]);
                a[r] = v.x, a[r + 1] = v.y, a[r + 2] = v.z, a[r + 3] = v.w;
            }
#pragma unroll
            for (int c = 0; c < T::ColsPerThread; c += 4) {
                const float4 v = *reinterpret_cast<const float4*>(
                        &shared.c[buffer][k][T::col(c)]);
                b[c] = v.x, b[c + 1] = v.y, b[c + 2] = v.z, b[c + 3] = v.w;
            }
#pragma unroll
            for (int r = 0; r < T::RowsPerThread; r++) {
#pragma unroll
                for (int c = 0; c < T::ColsPerThread; c++) {
                    sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
                }
            }
        }
        if (more) {
            fetch_x.store(shared.x[buffer ^ 1]);
            fetch_c.store(shared.c[buffer ^ 1]);
            __syncthreads();
        }
    }
}

/// One block per tile of vectors; it walks over the cells.
template <class T, bool Aligned>
__global__ void __launch_bounds__(T::Threads)
        assign_cells_kernel(AssignCellsParams p) {
    __shared__ typename T::Shared shared;
    const int64_t head = blockIdx.y;
    const int64_t first = int64_t(blockIdx.x) * T::Rows;
    const int64_t rows = p.n - first;
    const float* x = p.x + head * p.x_head_stride + first * p.x_row_stride;
    const float* centroids = p.centroids + head * p.centroids_head_stride;
    const float* bias = p.bias ? p.bias + head * p.bias_head_stride : nullptr;

    float best[T::RowsPerThread];
    int cell[T::RowsPerThread];
#pragma unroll
    for (int r = 0; r < T::RowsPerThread; r++) {
        best[r] = -INFINITY;
        cell[r] = INT_MAX;
    }
    for (int c0 = 0; c0 < p.ncell; c0 += T::Cols) {
        float sum[T::RowsPerThread][T::ColsPerThread];
        multiply_tile<T, Aligned>(
                shared,
                x,
                p.x_row_stride,
                rows,
                centroids + int64_t(c0) * p.d,
                p.ncell - c0,
                p.d,
                sum);
#pragma unroll
        for (int c = 0; c < T::ColsPerThread; c++) {
            const int id = c0 + T::col(c); // ascends with c and c0
            if (id < p.ncell) {
                const float b = bias ? bias[id] : 0.0f;
#pragma unroll
                for (int r = 0; r < T::RowsPerThread; r++) {
                    const float score = sum[r][c] + b;
                    if (score > best[r]) {
                        best[r] = score;
                        cell[r] = id;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < T::RowsPerThread; r++) {
        // The threads of one row are neighbours in one warp.
#pragma unroll
        for (int apart = T::ThreadsX / 2; apart > 0; apart /= 2) {
            const float score = __shfl_xor_sync(~0u, best[r], apart);
            const int id = __shfl_xor_sync(~0u, cell[r], apart);
            if (score > best[r] || (score == best[r] && id < cell[r])) {
                best[r] = score;
                cell[r] = id;
            }
        }
        const int row = T::row(r);
        if (threadIdx.x % T::ThreadsX == 0 && row < rows) {
            const int64_t at = head * p.cells_head_stride + first + row;
            p.cells[at] = cell[r] == INT_MAX ? -1 : cell[r];
            if (p.scores) {
                p.scores[at] = best[r];
            }
        }
    }
}

/// One block per tile of vectors and cells.
template <class T, bool Aligned>
__global__ void __launch_bounds__(T::Threads)
        score_cells_kernel(ScoreCellsParams p) {
    __shared__ typename T::Shared shared;
    const int64_t head = blockIdx.z;
    const int64_t first = int64_t(blockIdx.x) * T::Rows;
    const int64_t rows = p.n - first;
    const int c0 = static_cast<int>(blockIdx.y) * T::Cols;
    const float* bias = p.bias ? p.bias + head * p.bias_head_stride : nullptr;
    float sum[T::RowsPerThread][T::ColsPerThread];
    multiply_tile<T, Aligned>(
            shared,
            p.x + head * p.x_head_stride + first * p.x_row_stride,
            p.x_row_stride,
            rows,
            p.centroids + head * p.centroids_head_stride + int64_t(c0) * p.d,
            p.ncell - c0,
            p.d,
            sum);
    float* scores =
            p.scores + head * p.scores_head_stride + first * p.scores_row_stride;
#pragma unroll
    for (int c = 0; c < T::ColsPerThread; c++) {
        const int id = c0 + T::col(c);
        const float b = bias && id < p.ncell ? bias[id] : 0.0f;
#pragma unroll
        for (int r = 0; r < T::RowsPerThread; r++) {
            const int row = T::row(r);
            if (row < rows && id < p.ncell) {
                scores[row * p.scores_row_stride + id] = sum[r][c] + b;
            }
        }
    }
}

/// One warp per vector.
__global__ void half_norms_kernel(HalfNormsParams p) {
    const int64_t warps = int64_t(gridDim.x) * blockDim.x / 32;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
         i < p.n;
         i += warps) {
        const float* v = p.vectors + i * p.d;
        float sum = 0.0f;
        for (int j = threadIdx.x % 32; j < p.d; j += 32) {
            sum = fmaf(v[j], v[j], sum);
        }
        for (int apart = 16; apart > 0; apart /= 2) {
            sum += __shfl_xor_sync(~0u, sum, apart);
        }
        if (threadIdx.x % 32 == 0) {
            p.minus_half_norm[i] = -0.5f * sum;
        }
    }
}

bool aligned16(const void* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0;
}

/// What both kernels ask of their vectors and centroids.
template <class Params>
void check_vectors(const Params& p) {
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
    FAISS_THROW_IF_NOT_MSG(p.n == 0 || p.x, "x is null");
    FAISS_THROW_IF_NOT_MSG(p.centroids, "centroids is null");
}

template <class Params>
bool reads_quads(const Params& p) {
    return p.d % 4 == 0 && aligned16(p.x, p.x_head_stride | p.x_row_stride) &&
            aligned16(p.centroids, p.centroids_head_stride);
}

/// Calls launch(tile, aligned) with the kinds that fit.
template <class Params, class Launch>
void dispatch(const Params& p, const Launch& launch) {
    const bool small = p.n <= 4 * SmallTile::Rows;
    const bool aligned = reads_quads(p);
    if (small && aligned) {
        launch(SmallTile(), std::true_type());
    } else if (small) {
        launch(SmallTile(), std::false_type());
    } else if (aligned) {
        launch(BigTile(), std::true_type());
    } else {
        launch(BigTile(), std::false_type());
    }
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

template <class T>
unsigned row_tiles(int64_t n) {
    return static_cast<unsigned>((n + T::Rows - 1) / T::Rows);
}

} // namespace

void assign_cells(const AssignCellsParams& p, cudaStream_t stream) {
    check_vectors(p);
    if (p.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(p.cells, "cells is null");
    dispatch(p, [&](auto tile, auto aligned) {
        using T = decltype(tile);
        const dim3 grid(row_tiles<T>(p.n), p.nhead);
        assign_cells_kernel<T, decltype(aligned)::value>
                <<<grid, T::Threads, 0, stream>>>(p);
    });
}

void score_cells(const ScoreCellsParams& p, cudaStream_t stream) {
    check_vectors(p);
    if (p.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(p.scores, "scores is null");
    dispatch(p, [&](auto tile, auto aligned) {
        using T = decltype(tile);
        const dim3 grid(
                row_tiles<T>(p.n), (p.ncell + T::Cols - 1) / T::Cols, p.nhead);
        score_cells_kernel<T, decltype(aligned)::value>
                <<<grid, T::Threads, 0, stream>>>(p);
    });
}

void half_norms(const HalfNormsParams& p, cudaStream_t stream) {
    FAISS_THROW_IF_NOT_FMT(
            p.n >= 0,
            "n = %lld must not be negative",
            static_cast<long long>(p.n));
    FAISS_THROW_IF_NOT_FMT(p.d >= 1, "d = %d must be at least 1", p.d);
    if (p.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(p.vectors, "vectors is null");
    FAISS_THROW_IF_NOT_MSG(p.minus_half_norm, "minus_half_norm is null");
    constexpr int kThreads = 128;
    const auto blocks = static_cast<unsigned>(
            std::min<int64_t>((p.n + 3) / 4, 65535));
    half_norms_kernel<<<blocks, kThreads, 0, stream>>>(p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
