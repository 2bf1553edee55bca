/// decode()'s kernel where all keys lie in sink and window: no cell is scored and none
/// taken, so a row's blocks need not tell each other anything before the end, and up
/// to kMostDenseBlocks of them can share it.
#pragma once

#include <algorithm>

#include "append_one.cuh"
#include "decode.h"
#include "device_vectors.cuh"
#include "last_block.cuh"
#include "launch.h"
#include "tile_stream.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kDenseWarps = 8, kDenseThreads = 32 * kDenseWarps;
/// Of them on a processor: with one, too few bytes are on their way.
constexpr int kDenseBlocksAtOnce = 2;
constexpr int kMostDenseBlocks = 256; ///< of a row

/// A block's shared memory.
template <class T, int D>
struct DenseShared {
    using Stream = TileStream<T, D>;
    static constexpr int kResultStride = D + 4; ///< floats, which spreads the banks

    /// Of a warp: a tile of keys and one of values, then its results.
    union Tiles {
        alignas(16) T tiles[2][Stream::kTile];
        float results[kStreamQueries][kResultStride];
    };

    DecodeRow row;
    StreamView view;
    alignas(16) T queries[kStreamQueries * Stream::kStride];
    Tiles of_warp[kDenseWarps];
    float2 sums[kDenseWarps][kStreamQueries]; ///< sum and largest
    float weights[kStreamQueries][kMostDenseBlocks + 1]; ///< of blocks, and the caller's
    int refused; ///< the worst Fault
    int bad_page;
};

/// Attends to the block's share of the row's n keys.
template <class T, int D>
__device__ __forceinline__ void attend_to_share(
        const DecodeParams& p,
        DenseShared<T, D>& s,
        int n,
        int64_t new_slot) {
    using Stream = TileStream<T, D>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = (n + kStreamKeys - 1) / kStreamKeys;
    const int each = (tiles + gridDim.x - 1) / gridDim.x;
    const int first = min(tiles, static_cast<int>(blockIdx.x) * each) + warp;
    const int end = min(tiles, (static_cast<int>(blockIdx.x) + 1) * each);
    const auto slot = [n](int key) { return key < n ? key : -1; };
    Stream stream;
    stream.keys = shared_address(s.of_warp[warp].tiles[0]);
    stream.values = shared_address(s.of_warp[warp].tiles[1]);
    stream.kv = &s.view;
    stream.scale = p.scale * kLog2E;
    bool bad_page = false;
    if (first < end) {
        const int key = first * kStreamKeys + lane % kStreamKeys;
        bad_page = stream.start(
                slot(key),
                first + kDenseWarps < end ? slot(key + kDenseWarps * kStreamKeys) : -1);
    }
    if (p.appends) {
        check_new_keys(p, s.row.kv, new_slot, warp, kDenseWarps, &s.refused);
    }
    stream.clear();
    stream.load_queries(shared_address(s.queries));
    bad_page |= stream.attend(first, end, kDenseWarps, slot);
    stream.end();
    if (bad_page) {
        atomicOr(&s.bad_page, 1);
    }
    __syncwarp(); // results come where tiles were
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = lane % 4 * 2 + i;
        if (lane < 4) {
            s.sums[warp][q] = make_float2(stream.sum[i], stream.largest[i]);
        }
        float* to = s.of_warp[warp].results[q] + lane / 4;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            to[16 * j] = stream.o[j][i];
            to[16 * j + 8] = stream.o[j][2 + i];
        }
    }
    __syncthreads();
}

/// Writes the warps' results, as one, to where the row's last block finds them.
template <class T, int D>
__device__ __forceinline__ void write_piece(
        const DecodeParams& p,
        const DenseShared<T, D>& s,
        int group) {
    const int64_t piece = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < group * (D / 4); i += kDenseThreads) {
        const int q = i / (D / 4), j = i % (D / 4) * 4;
        float largest = -INFINITY, sum = 0;
#pragma unroll
        for (int w = 0; w < kDenseWarps; w++) {
            largest = fmaxf(largest, s.sums[w][q].y);
        }
        const float shift = largest == -INFINITY ? 0.0f : largest;
        float4 o = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < kDenseWarps; w++) {
            const float2 of_warp = s.sums[w][q];
            const float weight = exp2f(of_warp.y - shift);
            const auto x =
                    *reinterpret_cast<const float4*>(s.of_warp[w].results[q] + j);
            sum += weight * of_warp.x;
            add_scaled(o, weight, x);
        }
        const float each = sum > 0 ? 1 / sum : 0.0f;
        reinterpret_cast<float4*>(p.pieces + piece * group * D)[i] =
                make_float4(each * o.x, each * o.y, each * o.z, each * o.w);
        if (j == 0) {
            p.piece_lse[piece * group + q] = sum > 0 ? shift + log2f(sum) : -INFINITY;
        }
    }
}

/// Merges the row's pieces with each other and with the caller's result. By its last block.
template <class T, int D>
__device__ __forceinline__ void merge_row(
        const DecodeParams& p,
        DenseShared<T, D>& s,
        int group) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n = gridDim.x;
    const int64_t first_piece = int64_t(blockIdx.y) * n;
    const int64_t head = int64_t(s.row.row.query) * p.heads_q + s.row.row.kv_head * group;
    for (int q = warp; q < group; q += kDenseWarps) {
        // The caller's comes last.
        float* weights = s.weights[q];
        float largest = -INFINITY, sum = 0;
        for (int b = lane; b <= n; b += 32) {
            weights[b] = b < n ? __ldcg(p.piece_lse + (first_piece + b) * group + q)
                    : p.out.merge ? kLog2E * p.out.lse[head + q]
                                  : -INFINITY;
            largest = fmaxf(largest, weights[b]);
        }
        largest = most_of_warp(largest);
        const float shift = largest == -INFINITY ? 0.0f : largest;
        for (int b = lane; b <= n; b += 32) {
            weights[b] = exp2f(weights[b] - shift);
            sum += weights[b];
        }
        sum = sum_of_warp(sum);
        const float each = sum > 0 ? 1 / sum : 0.0f;
        for (int b = lane; b <= n; b += 32) {
            weights[b] *= each;
        }
        __syncwarp();
        if (lane == 0) {
            if (p.out.lse) {
                p.out.lse[head + q] =
                        sum > 0 ? (shift + log2f(sum)) / kLog2E : -INFINITY;
            }
            if (p.out.stats) {
                AttendStats& stats = p.out.stats[head + q];
                stats.cells = stats.keys_read = stats.far_keys = stats.keys_ranked = 0;
                stats.dense_mass = sum > 0 ? 1 - weights[n] : 0.0f;
            }
        }
    }
    __syncthreads();
    constexpr int kAtOnce = 8; // on their way
    for (int i = threadIdx.x; i < group * (D / 4); i += kDenseThreads) {
        const float* weights = s.weights[i / (D / 4)];
        auto* to = reinterpret_cast<float4*>(p.out.output + head * D) + i;
        float4 o = make_float4(0, 0, 0, 0);
        if (weights[n] > 0) { // else it may hold anything
            add_scaled(o, weights[n], *to);
        }
#pragma unroll 1
        for (int b0 = 0; b0 < n; b0 += kAtOnce) {
            float4 x[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; k++) {
                x[k] = b0 + k < n
                        ? __ldcg(reinterpret_cast<const float4*>(
                                         p.pieces + (first_piece + b0 + k) * group * D) +
                                 i)
                        : make_float4(0, 0, 0, 0);
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; k++) {
                if (b0 + k < n) {
                    add_scaled(o, weights[b0 + k], x[k]);
                }
            }
        }
        *to = o;
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kDenseThreads, kDenseBlocksAtOnce)
        dense_kernel(const __grid_constant__ DecodeParams p) {
    using Stream = TileStream<T, D>;
    let_next_begin();
    extern __shared__ __align__(16) char shared[];
    auto& s = *reinterpret_cast<DenseShared<T, D>*>(shared); // none is constructed
    const int group = p.heads_q / p.heads_kv;
    copy_words<DecodeRow>(&s.row, p.rows + blockIdx.y);
    for (int i = threadIdx.x; i < kStreamQueries * Stream::kStride; i += kDenseThreads) {
        s.queries[i] = T(0.0f); // of heads that are not there
    }
    if (threadIdx.x == 0) {
        s.refused = s.bad_page = 0;
    }
    __syncthreads();
    const BatchRow& row = s.row.row;
    if (threadIdx.x == 0) {
        s.view = StreamView(s.row.kv, row.kv_head);
    }
    wait_for_previous();

    SequenceState& sequence = *row.sequence;
    const int64_t before = __ldcg(&sequence.length);
    const int64_t length = before + (p.appends ? 1 : 0);
    const bool readable = length <= row.view_length;
    Fault refused = !p.appends                     ? Fault::none
            : length > __ldcg(&sequence.capacity) ? Fault::append_capacity
            : !readable                           ? Fault::append_view
                                                  : Fault::none;
    const T* queries = static_cast<const T*>(p.queries) +
            (int64_t(row.query) * p.heads_q + row.kv_head * group) * D;
    for (int i = threadIdx.x; i < group * Stream::kChunks; i += kDenseThreads) {
        const int g = i / Stream::kChunks, c = i % Stream::kChunks;
        copy_16_bytes(s.queries + g * Stream::kStride + 8 * c, queries + g * D + 8 * c, true);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (readable && refused == Fault::none) {
        attend_to_share<T, D>(
                p, s, p.attend_dense ? static_cast<int>(length) : 0, length - 1);
        refused = static_cast<Fault>(s.refused);
        write_piece<T, D>(p, s, group);
    }
    const bool attends = readable && refused == Fault::none;
    if (s.bad_page && attends && threadIdx.x == 0) {
        raise(p.flag, Fault::attend_page, row.item);
    }
    // All blocks of all rows of the sequence have read its length when it changes.
    int* const done = p.row_done + blockIdx.y;
    if (arrive(done, 1) + 1 != static_cast<int>(gridDim.x)) {
        return;
    }
    if (attends) {
        merge_row<T, D>(p, s, group);
    }
    if (threadIdx.x != 0) {
        return;
    }
    *done = 0;
    if (row.kv_head == 0 && !attends) {
        raise(p.flag, refused != Fault::none ? refused : Fault::attend_view, row.item);
    }
    BatchItem& item = p.items[row.item];
    if (p.appends && atomicAdd(&item.done, 1) == p.heads_kv - 1) {
        item.done = 0;
        if (refused == Fault::none) {
            sequence.length = length;
        }
    }
}

/// Blocks of each row, so that all run at once and each has keys for all its warps, if there
/// are so many; 0: there are too many rows.
inline int dense_blocks(const DecodeParams& p, int processors) {
    constexpr int kLeastKeys = 2 * kDenseWarps * kStreamKeys;
    const int64_t of_keys = (p.most_keys + kLeastKeys - 1) / kLeastKeys;
    const int64_t at_once = kDenseBlocksAtOnce * processors / p.nrow;
    return static_cast<int>(std::min<int64_t>(
            at_once, std::clamp<int64_t>(of_keys, 1, kMostDenseBlocks)));
}

template <class T, int D>
cudaError_t attend_densely(const DecodeParams& p, cudaStream_t stream) {
    constexpr int kBytes = sizeof(DenseShared<T, D>);
    const cudaError_t error = cudaFuncSetAttribute(
            dense_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return error != cudaSuccess ? error
                                : launch(dense_kernel<T, D>,
                                         dim3(p.grid.row_blocks, p.nrow),
                                         kDenseThreads,
                                         kBytes,
                                         stream,
                                         p);
}

} // namespace

} // namespace faiss_saap::gpu
