#include "attention_targets.h"

#include "device_vectors.cuh"
#include "split_products.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kMostWarps = 8;

/// What a block works on: rows of one part of one KV head, and a share of the
/// cells of its text. Rows are the tokens' query heads, heads of a token one
/// after the other.
struct Share {
    int head, rows, first_row; ///< first_row of the part, of this block
    int first_token, ntoken;   ///< of the part, within the batch
    const DeviceText* text;
    int begin_cell, end_cell;
    int begin, end; ///< its keys

    __device__ Share(const TargetParams& p, int tile) {
        head = blockIdx.y / p.nmember;
        const int member = blockIdx.y % p.nmember;
        first_token = p.first[member];
        ntoken = p.first[member + 1] - first_token;
        rows = ntoken * p.group;
        first_row = blockIdx.x * tile;
        text = p.texts + int64_t(head) * p.ntext +
                p.text[head * p.nmember + member];
        const int2 from = text->share[blockIdx.z], to = text->share[blockIdx.z + 1];
        begin_cell = from.x;
        begin = from.y;
        end_cell = to.x;
        end = to.y;
    }
    /// Token of a row of the part; -1 behind the last.
    __device__ int token(const TargetParams& p, int row) const {
        return row < rows ? p.token[int64_t(head) * p.batch + first_token +
                                    row / p.group]
                          : -1;
    }
    /// Row of the batch's matrices.
    __device__ int64_t matrix_row(const TargetParams& p, int row) const {
        return (int64_t(head) * p.group + row % p.group) * p.batch +
                first_token + row / p.group;
    }
};

/// Rotated queries of a block's rows to shared memory.
/// @param writes  also writes them before rotation, standardised
__device__ void load_queries(
        const TargetParams& p,
        const Share& share,
        int tile,
        bool writes,
        __nv_bfloat16* to) {
    const int cols = split_cols(p.d), stride = split_stride(cols);
    const int half = p.d / 2;
#pragma unroll 4
    for (int i = threadIdx.x; i < tile * half; i += blockDim.x) {
        const int r = i / half, pair = i % half;
        const int row = share.first_row + r;
        const int token = share.token(p, row);
        const int2 at = rotary_pair(p.rotary, p.d, pair);
        float a = 0, b = 0;
        if (token >= 0) {
            const float* q = share.text->queries +
                    (int64_t(token) * p.group + row % p.group) * p.d;
            a = q[at.x];
            b = q[at.y];
            if (writes) {
                const int64_t of = (int64_t(share.head) * p.group + row % p.group) * p.d;
                float* x = p.x + share.matrix_row(p, row) * p.d;
                x[at.x] = (a - p.mean[of + at.x]) * p.factor[of + at.x];
                x[at.y] = (b - p.mean[of + at.y]) * p.factor[of + at.y];
            }
            if (p.rotary.inverse_frequency) {
                const float2 turn = rotation(p.rotary, token, pair);
                const float c = a * turn.x - b * turn.y;
                b = p.magnitude * (b * turn.x + a * turn.y);
                a = p.magnitude * c;
            }
        }
        store_split(to + r * stride, cols, at.x, a);
        store_split(to + r * stride, cols, at.y, b);
    }
    // Products read whole blocks of columns.
    const int more = cols - p.d;
    for (int i = threadIdx.x; i < tile * more; i += blockDim.x) {
        store_split(to + i / more * stride, cols, p.d + i % more, 0);
    }
}

/// The largest score of a row and the sum of 2^(score - largest) over keys.
__device__ inline float2 merge(float2 a, float2 b) {
    const float largest = fmaxf(a.x, b.x);
    if (largest == -INFINITY) {
        return make_float2(-INFINITY, 0);
    }
    return make_float2(
            largest,
            a.y * exp2f(a.x - largest) + b.y * exp2f(b.x - largest));
}

/// The sum over all keys up to the query's own, of this block's share.
template <int M, int N>
__global__ void __launch_bounds__(32 * kMostWarps) sum_weights(TargetParams p) {
    extern __shared__ __align__(16) __nv_bfloat16 shared[];
    const int tile = static_cast<int>(blockDim.x) / 32 * 16 * M;
    const Share share(p, tile);
    if (share.first_row >= share.rows) {
        return;
    }
    const int cols = split_cols(p.d), stride = split_stride(cols);
    load_queries(p, share, tile, blockIdx.z == 0, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale = p.scale * kLog2E;
    float2 sum[M][2];
    int token[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        sum[i / 2][i % 2] = make_float2(-INFINITY, 0);
        token[i / 2][i % 2] = share.token(
                p, share.first_row + warp * 16 * M + 8 * i + lane / 4);
    }
    for_each_tile<N>(
            shared + tile * stride,
            share.text->keys + int64_t(share.begin) * 2 * cols,
            share.end - share.begin,
            cols,
            [&](const __nv_bfloat16* keys, int first) {
                float score[M][N / 8][4] = {};
                multiply_split<M, N, true>(
                        shared + warp * 16 * M * stride, keys, cols, score);
                int position[N / 4];
#pragma unroll
                for (int i = 0; i < N / 4; i++) {
                    const int key = share.begin + first + i / 2 * 8 +
                            lane % 4 * 2 + i % 2;
                    position[i] = key < share.end
                            ? share.text->position[key]
                            : INT32_MAX;
                }
#pragma unroll
                for (int h = 0; h < 2 * M; h++) {
                    float2 tile_sum = make_float2(-INFINITY, 0);
#pragma unroll
                    for (int i = 0; i < N / 4; i++) {
                        float& s = score[h / 2][i / 2][h % 2 * 2 + i % 2];
                        s = position[i] <= token[h / 2][h % 2] ? s * scale
                                                               : -INFINITY;
                        tile_sum.x = fmaxf(tile_sum.x, s);
                    }
                    if (tile_sum.x > -INFINITY) {
#pragma unroll
                        for (int i = 0; i < N / 4; i++) {
                            tile_sum.y += exp2f(
                                    score[h / 2][i / 2][h % 2 * 2 + i % 2] -
                                    tile_sum.x);
                        }
                        sum[h / 2][h % 2] = merge(sum[h / 2][h % 2], tile_sum);
                    }
                }
            });
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        float2& s = sum[i / 2][i % 2];
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) {
            // The same order on both sides, so that they have the same bits.
            const float2 other = make_float2(
                    __shfl_xor_sync(~0u, s.x, apart),
                    __shfl_xor_sync(~0u, s.y, apart));
            s = lane & apart ? merge(other, s) : merge(s, other);
        }
        const int row = share.first_row + warp * 16 * M + 8 * i + lane / 4;
        if (lane % 4 == 0 && row < share.rows) {
            p.part[share.matrix_row(p, row) * p.nsplit + blockIdx.z] = s;
        }
    }
}

/// Weights of this block's cells. A lane walks along its row of a tile and writes
/// a cell's sum where the next one begins.
template <int M, int N>
__global__ void __launch_bounds__(32 * kMostWarps) sum_cells(TargetParams p) {
    extern __shared__ __align__(16) __nv_bfloat16 shared[];
    const int tile = static_cast<int>(blockDim.x) / 32 * 16 * M;
    const Share share(p, tile);
    if (share.first_row >= share.rows) {
        return;
    }
    const int cols = split_cols(p.d), stride = split_stride(cols);
    load_queries(p, share, tile, false, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale = p.scale * kLog2E;
    constexpr int kPitch = N + 1; // lanes in different banks
    auto* all_weights = reinterpret_cast<float*>(
            shared + (tile + 2 * N) * stride);
    float* weights = all_weights + warp * 16 * M * kPitch;
    auto* keys_of_warp = reinterpret_cast<int2*>(
            all_weights + tile * kPitch + tile * kPitch % 2);
    int2* key_of = keys_of_warp + warp * N; // position and cell

    // log2 of the sum of all weights, of the rows of this lane in products.
    float lse[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = share.first_row + warp * 16 * M + 8 * i + lane / 4;
        float2 all = make_float2(-INFINITY, 0);
        if (row < share.rows) {
            const float2* part = p.part + share.matrix_row(p, row) * p.nsplit;
            for (int s = 0; s < p.nsplit; s++) {
                all = merge(all, part[s]);
            }
        }
        lse[i / 2][i % 2] = all.y > 0 ? all.x + log2f(all.y) : 0;
    }

    // The row that this lane walks along.
    const int row = share.first_row + warp * 16 * M + lane;
    const bool walks = lane < 16 * M && row < share.rows;
    const int token = walks ? share.token(p, row) : -1;
    const int64_t far_end = token + 1 - p.window;
    const int64_t at = walks ? share.matrix_row(p, row) : 0;
    float* mass = p.mass + at * p.ncell;
    float* log_count = p.log_count +
            (int64_t(share.head) * p.batch + share.first_token + row / p.group) *
                    p.ncell;
    const bool counts = walks && row % p.group == 0;
    float sum = 0;
    int count = 0, cell = share.begin_cell;
    const auto end_cells_before = [&](int next) {
        for (; cell < next; cell++) {
            if (walks) {
                mass[cell] = sum;
            }
            if (counts) {
                log_count[cell] =
                        count ? logf(static_cast<float>(count)) : -INFINITY;
            }
            sum = 0;
            count = 0;
        }
    };
    for_each_tile<N>(
            shared + tile * stride,
            share.text->keys + int64_t(share.begin) * 2 * cols,
            share.end - share.begin,
            cols,
            [&](const __nv_bfloat16* keys, int first) {
                float score[M][N / 8][4] = {};
                multiply_split<M, N, true>(
                        shared + warp * 16 * M * stride, keys, cols, score);
                __syncwarp(); // the tile before has been walked along
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < N / 2; i++) {
                        const int n = i / 4, e = i % 4;
                        const float weight = exp2f(
                                score[m][n][e] * scale - lse[m][e / 2]);
                        weights[(16 * m + e / 2 * 8 + lane / 4) * kPitch +
                                8 * n + lane % 4 * 2 + e % 2] = weight;
                    }
                }
                for (int i = lane; i < N; i += 32) {
                    const int key = share.begin + first + i;
                    key_of[i] = key < share.end
                            ? make_int2(
                                      share.text->position[key],
                                      share.text->cell[key])
                            : make_int2(-1, -1);
                }
                __syncwarp();
                const int there = min(N, share.end - share.begin - first);
                const float* mine = weights + min(lane, 16 * M - 1) * kPitch;
                constexpr int kAhead = 8; // loads that do not wait for each other
                for (int i = 0; i < there; i += kAhead) {
                    int2 key[kAhead];
                    float weight[kAhead];
#pragma unroll
                    for (int k = 0; k < kAhead; k++) {
                        key[k] = key_of[i + k];
                        weight[k] = mine[i + k];
                    }
#pragma unroll
                    for (int k = 0; k < kAhead; k++) {
                        if (i + k < there) {
                            end_cells_before(key[k].y);
                            const bool far =
                                    key[k].x >= p.sink && key[k].x < far_end;
                            sum += far ? weight[k] : 0.0f;
                            count += far;
                        }
                    }
                }
            });
    end_cells_before(share.end_cell);
}

__global__ void sort_keys_kernel(SortKeysParams p) {
    const int cols = split_cols(p.d);
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t row = i / cols;
    const auto j = static_cast<int>(i % cols);
    if (row < p.n) {
        store_split(
                p.to + row * 2 * cols,
                cols,
                j,
                j < p.d ? p.keys[int64_t(p.order[row]) * p.d + j] : 0.0f);
    }
}

/// Launches both kernels if their tiles fit into the device's shared memory.
template <int M, int N>
bool sum_if_it_fits(
        const TargetParams& p,
        int most_warps,
        size_t most,
        cudaStream_t stream) {
    const int rows = p.most * p.group;
    const int warps = max(1, min(most_warps, (rows + 16 * M - 1) / (16 * M)));
    const int tile = warps * 16 * M;
    const size_t products = size_t(tile + 2 * N) *
            split_stride(split_cols(p.d)) * sizeof(__nv_bfloat16);
    const size_t walk = size_t(tile * (N + 1) + 1) * sizeof(float) +
            size_t(warps) * N * sizeof(int2);
    if (products + walk > most) {
        return false;
    }
    cudaFuncSetAttribute(
            sum_weights<M, N>,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(products));
    cudaFuncSetAttribute(
            sum_cells<M, N>,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(products + walk));
    const dim3 grid((rows + tile - 1) / tile, p.nhead * p.nmember, p.nsplit);
    sum_weights<M, N><<<grid, 32 * warps, products, stream>>>(p);
    sum_cells<M, N><<<grid, 32 * warps, products + walk, stream>>>(p);
    return true;
}

} // namespace

cudaError_t attention_targets(const TargetParams& p, cudaStream_t stream) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(
            &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    bool done = false;
    for (int warps = kMostWarps; !done && warps >= 4; warps /= 2) {
        done = sum_if_it_fits<2, 32>(p, warps, most, stream);
    }
    for (int warps = kMostWarps; !done && warps >= 1; warps /= 2) {
        done = sum_if_it_fits<1, 32>(p, warps, most, stream);
    }
    return done ? cudaGetLastError() : cudaErrorInvalidConfiguration;
}

cudaError_t sort_keys(const SortKeysParams& p, cudaStream_t stream) {
    constexpr int kThreads = 256;
    const int64_t n = int64_t(p.n) * split_cols(p.d);
    sort_keys_kernel<<<
            static_cast<unsigned>((n + kThreads - 1) / kThreads),
            kThreads,
            0,
            stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
