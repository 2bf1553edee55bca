/// Attention over rows of the cache that lie anywhere. Included by the files
/// that instantiate it for one head dimension.
#pragma once

#include <algorithm>

#include "attend.h"
#include "device_vectors.cuh"
#include "far_keys.cuh"
#include "last_block.cuh"
#include "launch.h"
#include "mma.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kQueries = 16; ///< rows of a tensor-core tile
/// Probed cells of a row that a block keeps at hand; others stay in memory.
constexpr int kCellsAtHand = 192;

/// Numbers of the keys of one row, in the order they are read, to slots. A
/// thread asks for ascending numbers, so it walks the row's cells once.
struct SlotReader {
    RowPlan plan;
    RowPlan* shared_plan; ///< counts what is dropped
    const ListState* lists; ///< of the row's KV head
    const RowCell* cells;
    const uint32_t* probed;
    int64_t sink;
    int at = 0; ///< the cell that holds the last far key asked for

    /// Moves to the cell of a far key.
    __device__ void seek(int far) {
        int low = 0, high = plan.cells - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (cells[middle].end <= far) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        at = low;
    }

    /// -1: no key, or one that another partition's cell has read.
    __device__ int slot(int i) {
        if (i < plan.dense) {
            return i < plan.sinks ? i : plan.window_begin + i - plan.sinks;
        }
        const int far = i - plan.dense;
        if (far >= plan.keys) {
            return -1;
        }
        while (cells[at].end <= far) {
            at++;
        }
        const RowCell cell = cells[at];
        const ListState& list = lists[cell.list];
        const auto entry = static_cast<uint32_t>(far - cell.begin);
        const int e = extent_of(entry);
        const int32_t slot = list.slots
                [list.extents[int64_t(cell.cell) * kExtents + e] +
                 (entry - extent_begin(e))];
        for (int other = 0; other < cell.list; other++) {
            const int c = lists[other].first_cell +
                    lists[other].cells[slot - sink];
            if (probed[c / 32] >> (c % 32) & 1) {
                atomicAdd(&shared_plan->dropped, 1);
                return -1;
            }
        }
        return slot;
    }
};

/// The tiles of all rows, one row after the other, are one line, of which every
/// block has an equal piece: a row with many keys holds up nobody.
struct Share {
    int64_t each;       ///< tiles of a block; the last ones may have fewer or none
    int64_t begin, end; ///< of this block
    int row;            ///< that begin lies in
    int64_t row_begin;  ///< its first tile
};

/// Room of static variables of gather_attend_kernel and of what it calls.
constexpr int kStaticBytes = 4096;

/// By each warp for itself: no barrier.
__device__ Share find_share(const RowPlan* plans, int rows) {
    const int lane = threadIdx.x % 32;
    const int each = (rows + 31) / 32;
    const int first = min(rows, lane * each);
    const int last = min(rows, first + each);
    int64_t mine = 0;
    for (int r = first; r < last; r++) {
        mine += tiles_of(plans[r]);
    }
    int64_t end = mine; // of this lane's rows
    for (int step = 1; step < 32; step *= 2) {
        const int64_t before = __shfl_up_sync(0xffffffffu, end, step);
        end += lane >= step ? before : 0;
    }
    Share share;
    const int64_t total = __shfl_sync(0xffffffffu, end, 31);
    share.each = (total + gridDim.x - 1) / gridDim.x;
    share.begin = min(total, share.each * blockIdx.x);
    share.end = min(total, share.begin + share.each);
    if (share.begin == total) {
        return share;
    }
    int64_t at = end - mine;
    const bool here = at <= share.begin && share.begin < end;
    int r = first;
    for (; here && at + tiles_of(plans[r]) <= share.begin; r++) {
        at += tiles_of(plans[r]);
    }
    const int who = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, here))) - 1;
    share.row = __shfl_sync(0xffffffffu, r, who);
    share.row_begin = __shfl_sync(0xffffffffu, at, who);
    return share;
}

/// Merges the pieces of a row, and the caller's result; by the block that ends
/// the row. `weights` is shared memory, nq * (blocks + 1).
__device__ void merge_pieces(
        const AttendParams& p,
        const Share& share,
        const RowPlan& plan,
        int dropped,
        int r,
        int64_t row_begin,
        int64_t first_out,
        int nq,
        float* weights) {
    const int64_t first = row_begin / share.each;
    const int64_t last = (row_begin + tiles_of(plan) - 1) / share.each;
    const auto n = static_cast<int>(last - first + 1);
    const int64_t piece0 = r + first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto reduce = [](float x, bool sum) {
        for (int step = 16; step; step /= 2) {
            const float y = __shfl_xor_sync(0xffffffffu, x, step);
            x = sum ? x + y : fmaxf(x, y);
        }
        return x;
    };
    __shared__ float weight_given[kQueries];
    for (int q = warp; q < nq; q += blockDim.x / 32) {
        const auto lse_of = [&](const float* lse, int s) {
            return __ldcg(&lse[(piece0 + s) * nq + q]);
        };
        const float given = p.out.merge ? p.out.lse[first_out + q] : -INFINITY;
        float largest = given;
        for (int s = lane; s < n; s += 32) {
            const float x = lse_of(p.part_lse, s);
            weights[q * n + s] = x;
            largest = fmaxf(largest, x);
        }
        largest = reduce(largest, false);
        const float shift = largest == -INFINITY ? 0.0f : largest;
        float sum = 0, dense = 0;
        for (int s = lane; s < n; s += 32) {
            sum += expf(weights[q * n + s] - shift);
            dense += expf(lse_of(p.part_dense, s) - shift);
        }
        sum = reduce(sum, true) + expf(given - shift);
        dense = reduce(dense, true);
        const float each = sum > 0 ? 1 / sum : 0.0f;
        for (int s = lane; s < n; s += 32) {
            weights[q * n + s] = each * expf(weights[q * n + s] - shift);
        }
        if (lane == 0) {
            weight_given[q] = each * expf(given - shift);
            if (p.out.lse) {
                p.out.lse[first_out + q] =
                        sum > 0 ? shift + logf(sum) : -INFINITY;
            }
            if (p.out.stats) {
                AttendStats& stats = p.out.stats[first_out + q];
                stats.cells = plan.cells;
                stats.keys_read = plan.keys - dropped;
                stats.far_keys = plan.far;
                stats.dense_mass = each * dense;
            }
        }
    }
    __syncthreads();
    const int width = nq * p.d;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const int q = i / p.d;
        auto* to = reinterpret_cast<float4*>(p.out.output + first_out * p.d + i);
        float4 o = make_float4(0, 0, 0, 0);
        const auto add = [&](float w, const float4& x) {
            o.x += w * x.x;
            o.y += w * x.y;
            o.z += w * x.z;
            o.w += w * x.w;
        };
        if (weight_given[q] > 0) { // else it may hold anything
            add(weight_given[q], *to);
        }
#pragma unroll 8
        for (int s = 0; s < n; s++) {
            const auto x = __ldcg(reinterpret_cast<const float4*>(
                    p.part + (piece0 + s) * width + i));
            add(weights[q * n + s], x);
        }
        *to = o;
    }
}

constexpr int kPadding = 8; ///< elements between rows, which spreads the banks
constexpr int kStages = 2;
constexpr uint32_t kNowhere = 0xffffffffu;

constexpr int most_warps(int d) {
    return d > 128 ? 3 : 6;
}

constexpr int max_of(int a, int b) {
    return a > b ? a : b;
}

/// Each warp of a block reads tiles of 32 keys with an online softmax of its own,
/// the next tile's rows on their way while one is computed. 16 query rows, of
/// which the group fills some, are multiplied at a time.
template <class T, int D>
__global__ void __launch_bounds__(32 * most_warps(D))
        gather_attend_kernel(AttendParams p) {
    let_next_begin();
    wait_for_previous();
    constexpr int kStride = D + kPadding;
    constexpr int kChunks = D / 8; // 16-byte pieces of a row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int nq = group / choices;

    extern __shared__ __align__(16) char shared[];
    T* queries = reinterpret_cast<T*>(shared); // kQueries * kStride
    T* all_tiles = queries + kQueries * kStride;
    T* tiles = all_tiles + warp * kStages * 2 * kTile * kStride;
    const auto k_tile = [&](int stage) {
        return tiles + stage * 2 * kTile * kStride;
    };
    const auto v_tile = [&](int stage) {
        return tiles + (stage * 2 + 1) * kTile * kStride;
    };
    __shared__ RowCell at_hand[kCellsAtHand];

    const Share share = find_share(p.work.plans, p.nrow * choices);
    int64_t row_begin = share.row_begin;
    int64_t next = share.begin;
    for (int r = share.begin < share.end ? share.row : 0; next < share.end; r++) {
        const BatchRow& row = p.rows[r / choices];
        const BatchItem& item = p.items[row.item];
        const DeviceView kv = item.kv;
        SlotReader reader;
        reader.shared_plan = p.work.plans + r;
        reader.plan = *reader.shared_plan;
        reader.lists = row.lists;
        reader.probed = p.work.probed + r * p.work.probed_words;
        reader.sink = p.sink;
        const int all_of_row = tiles_of(reader.plan);
        const auto tile_begin = static_cast<int>(next - row_begin);
        const auto tile_end = static_cast<int>(
                min(int64_t(all_of_row), share.end - row_begin));
        const int64_t first_query =
                int64_t(item.first_token + row.token) * p.heads_q +
                row.kv_head * group + (p.share_group ? 0 : r % choices);
        for (int i = threadIdx.x; i < kQueries * kChunks; i += blockDim.x) {
            const int q = i / kChunks, c = i % kChunks;
            uint4 bits = {0, 0, 0, 0};
            if (q < nq) {
                bits = reinterpret_cast<const uint4*>(
                        static_cast<const T*>(p.queries) +
                        (first_query + q) * D)[c];
            }
            *reinterpret_cast<uint4*>(queries + q * kStride + 8 * c) = bits;
        }
        reader.cells = p.work.cells + r * p.work.stride;
        if (reader.plan.cells <= kCellsAtHand) {
            for (int i = threadIdx.x; i < reader.plan.cells; i += blockDim.x) {
                at_hand[i] = reader.cells[i];
            }
            reader.cells = at_hand;
        }
        __syncthreads();

        // Tiles are dealt to the warps in turn.
        int tile = tile_begin + warp;
        if (tile < tile_end && reader.plan.keys) {
            const int far = tile * kTile + lane - reader.plan.dense;
            reader.seek(max(0, min(far, reader.plan.keys - 1)));
        }
        const auto slot_of = [&](int t) { // of this lane
            return t < tile_end ? reader.slot(t * kTile + lane) : -1;
        };
        const auto fetch = [&](int slot, int stage) {
            // Where a lane's key lies, in units of 16 bytes from the head's first.
            uint32_t k = kNowhere, v = kNowhere;
            if (slot >= 0) {
                const char* row_k = key_row(kv, row.kv_head, slot);
                const char* row_v = value_row(kv, row.kv_head, slot);
                if (row_k) {
                    k = static_cast<uint32_t>((row_k - kv.k) / 16);
                    v = static_cast<uint32_t>((row_v - kv.v) / 16);
                } else {
                    raise(p.flag, Fault::attend_page, row.item);
                }
            }
#pragma unroll
            for (int i = 0; i < kTile * kChunks / 32; i++) {
                const int key = (32 * i + lane) / kChunks;
                const int c = (32 * i + lane) % kChunks;
                const uint32_t at_k = __shfl_sync(0xffffffffu, k, key);
                const uint32_t at_v = __shfl_sync(0xffffffffu, v, key);
                const bool there = at_k != kNowhere;
                // An address must be valid even where nothing is read.
                copy_16_bytes(
                        k_tile(stage) + key * kStride + 8 * c,
                        there ? kv.k + (uint64_t(at_k) + c) * 16 : kv.k,
                        there);
                copy_16_bytes(
                        v_tile(stage) + key * kStride + 8 * c,
                        there ? kv.v + (uint64_t(at_v) + c) * 16 : kv.v,
                        there);
            }
            return k != kNowhere;
        };

        const float scale = p.scale * 1.44269504088896340736f; // exp2
        float o[D / 8][4] = {};
        float m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0},
              dense_sum[2] = {0, 0};
        int stage = 0;
        bool valid = tile < tile_end && fetch(slot_of(tile), 0);
        asm volatile("cp.async.commit_group;\n");
        int next_slot = slot_of(tile + warps);
        for (; tile < tile_end; tile += warps) {
            bool next_valid = false;
            if (tile + warps < tile_end) {
                next_valid = fetch(next_slot, stage ^ 1);
            }
            asm volatile("cp.async.commit_group;\n");
            next_slot = slot_of(tile + 2 * warps);
            asm volatile("cp.async.wait_group 1;\n");
            __syncwarp();
            const unsigned there = __ballot_sync(0xffffffffu, valid);
            const T* k = k_tile(stage);
            const T* v = v_tile(stage);
            float s[kTile / 8][4] = {};
            const int eighth = lane / 8, in_eighth = lane % 8;
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t a[4];
                load_matrices(
                        a,
                        queries + ((eighth & 1) * 8 + in_eighth) * kStride +
                                16 * j + (eighth >> 1) * 8);
#pragma unroll
                for (int n = 0; n < kTile / 16; n++) {
                    uint32_t b[4];
                    load_matrices(
                            b,
                            k + (16 * n + (eighth >> 1) * 8 + in_eighth) * kStride +
                                    16 * j + (eighth & 1) * 8);
                    multiply_add<T>(s[2 * n], a, b[0], b[1]);
                    multiply_add<T>(s[2 * n + 1], a, b[2], b[3]);
                }
            }
            // This thread has queries lane / 4 and lane / 4 + 8, and of every
            // eight keys 2 * (lane % 4) and the next.
            const int key = lane % 4 * 2;
            const int dense_keys = reader.plan.dense - tile * kTile;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = m[half];
#pragma unroll
                for (int i = 0; i < kTile / 4; i++) {
                    float& x = s[i / 2][2 * half + i % 2];
                    const int at = key + i / 2 * 8 + i % 2;
                    x = there >> at & 1 ? x * scale : -INFINITY;
                    most = fmaxf(most, x);
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                const float shift = most == -INFINITY ? 0.0f : most;
                const float shrink = exp2f(m[half] - shift);
                m[half] = most;
                sum[half] *= shrink;
                dense_sum[half] *= shrink;
#pragma unroll
                for (int i = 0; i < kTile / 4; i++) {
                    float& x = s[i / 2][2 * half + i % 2];
                    x = exp2f(x - shift);
                    sum[half] += x;
                    const int at = key + i / 2 * 8 + i % 2;
                    dense_sum[half] += at < dense_keys ? x : 0.0f;
                }
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    o[j][2 * half] *= shrink;
                    o[j][2 * half + 1] *= shrink;
                }
            }
#pragma unroll
            for (int n = 0; n < kTile / 16; n++) {
                const float(*w)[4] = s + 2 * n;
                const uint32_t weights[4] = {
                        pack<T>(w[0][0], w[0][1]),
                        pack<T>(w[0][2], w[0][3]),
                        pack<T>(w[1][0], w[1][1]),
                        pack<T>(w[1][2], w[1][3])};
#pragma unroll
                for (int j = 0; j < D / 16; j++) {
                    uint32_t b[4];
                    load_transposed(
                            b,
                            v + (16 * n + (eighth & 1) * 8 + in_eighth) * kStride +
                                    16 * j + (eighth >> 1) * 8);
                    multiply_add<T>(o[2 * j], weights, b[0], b[1]);
                    multiply_add<T>(o[2 * j + 1], weights, b[2], b[3]);
                }
            }
            __syncwarp(); // the next round overwrites this stage
            stage ^= 1;
            valid = next_valid;
        }
        asm volatile("cp.async.wait_group 0;\n");
        __syncthreads(); // tiles become room for the warps' results

        // m, sum and dense_sum of each warp and query, then their outputs.
        float* all_m = reinterpret_cast<float*>(all_tiles);
        float* all_sum = all_m + warps * kQueries;
        float* all_dense = all_sum + warps * kQueries;
        float* all_o = all_dense + warps * kQueries; // warps * kQueries * D
#pragma unroll
        for (int half = 0; half < 2; half++) {
            for (int step = 1; step < 4; step *= 2) {
                sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], step);
                dense_sum[half] +=
                        __shfl_xor_sync(0xffffffffu, dense_sum[half], step);
            }
            const int q = lane / 4 + 8 * half;
            if (q >= nq) {
                continue;
            }
            const int at = warp * kQueries + q;
            if (lane % 4 == 0) {
                all_m[at] = m[half];
                all_sum[at] = sum[half];
                all_dense[at] = dense_sum[half];
            }
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                *reinterpret_cast<float2*>(all_o + at * D + 8 * j + lane % 4 * 2) =
                        make_float2(o[j][2 * half], o[j][2 * half + 1]);
            }
        }
        __syncthreads();
        const int64_t piece = int64_t(r) + blockIdx.x;
        for (int i = threadIdx.x; i < nq * (D / 4); i += blockDim.x) {
            const int q = i / (D / 4), j = i % (D / 4) * 4;
            float most = -INFINITY;
            for (int w = 0; w < warps; w++) {
                most = fmaxf(most, all_m[w * kQueries + q]);
            }
            const float shift = most == -INFINITY ? 0.0f : most;
            float total = 0, dense = 0;
            float4 x = make_float4(0, 0, 0, 0);
            for (int w = 0; w < warps; w++) {
                const int at = w * kQueries + q;
                const float weight = exp2f(all_m[at] - shift);
                total += weight * all_sum[at];
                dense += weight * all_dense[at];
                const auto y = *reinterpret_cast<const float4*>(all_o + at * D + j);
                x.x += weight * y.x;
                x.y += weight * y.y;
                x.z += weight * y.z;
                x.w += weight * y.w;
            }
            const float each = total > 0 ? 1 / total : 0.0f;
            *reinterpret_cast<float4*>(p.part + (piece * nq + q) * D + j) =
                    make_float4(each * x.x, each * x.y, each * x.z, each * x.w);
            if (j == 0) {
                constexpr float kLn2 = 0.693147180559945309417f;
                p.part_lse[piece * nq + q] =
                        total > 0 ? shift * kLn2 + logf(total) : -INFINITY;
                p.part_dense[piece * nq + q] =
                        dense > 0 ? shift * kLn2 + logf(dense) : -INFINITY;
            }
        }
        // The block that ends a row merges its pieces.
        const int here = tile_end - tile_begin;
        const bool ends =
                arrive(&reader.shared_plan->tiles_done, here) + here == all_of_row;
        if (ends) {
            merge_pieces(
                    p,
                    share,
                    reader.plan,
                    __ldcg(&reader.shared_plan->dropped),
                    r,
                    row_begin,
                    first_query,
                    nq,
                    reinterpret_cast<float*>(all_tiles));
        }
        __syncthreads(); // before the next row's queries, cells and tiles
        next = row_begin + tile_end;
        row_begin += all_of_row;
    }
}

} // namespace

template <class T, int D>
cudaError_t gather_attend(const AttendParams& p, cudaStream_t stream) {
    int device = 0, room = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(
                &room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    // As many warps as fit: each has its own tiles, and their results the same
    // room.
    constexpr int kQueryBytes = kQueries * (D + kPadding) * int(sizeof(T));
    constexpr int kWarpBytes =
            max_of(kStages * 2 * kTile * (D + kPadding) * int(sizeof(T)),
                   kQueries * (3 + D) * int(sizeof(float)));
    const int warps = std::min(
            most_warps(D), (room - kStaticBytes - kQueryBytes) / kWarpBytes);
    const int shared = kQueryBytes + warps * kWarpBytes;
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(
                gather_attend_kernel<T, D>,
                cudaFuncAttributeMaxDynamicSharedMemorySize,
                shared);
    }
    if (error != cudaSuccess) {
        return error;
    }
    return launch(
            gather_attend_kernel<T, D>, p.blocks, 32 * warps, shared, stream, p);
}

} // namespace faiss_saap::gpu
