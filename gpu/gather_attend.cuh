/// Attention over rows of the cache that lie anywhere. Included by the files
/// that instantiate it for one head dimension.
#pragma once

#include <algorithm>

#include <faiss_saap/gpu/tile_share.h>

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

/// Numbers of a row's keys, of sink and window or of the far ones, in the order they
/// are read, to slots. A thread asks for ascending numbers, so it walks the row's
/// cells once.
struct SlotReader {
    bool far;
    RowPlan plan;
    RowPlan* shared_plan;   ///< counts what is dropped
    const ListState* lists; ///< of the row's KV head
    const RowCell* cells;
    const uint32_t* probed;
    int64_t sink;
    int at = 0; ///< the cell that holds the last key asked for

    /// Moves to the cell of a key.
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
        if (!far) {
            return i >= plan.dense ? -1
                    : i < plan.sinks ? i
                                     : plan.window_begin + i - plan.sinks;
        }
        if (i >= plan.keys) {
            return -1;
        }
        while (cells[at].end <= i) {
            at++;
        }
        const RowCell cell = cells[at];
        const ListState& list = lists[cell.list];
        const auto entry = static_cast<uint32_t>(i - cell.begin);
        const int e = extent_of(entry);
        const int32_t slot =
                list.slots[list.extents[cell.cell * kExtents + e] +
                           (entry - extent_begin(e))];
#pragma unroll 1
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

/// This block's share of the dense tiles of all rows, or of the far ones.
struct Share : TileShare {
    int row = 0;         ///< the first row that it has tiles of; none: past the last
    int row_begin = 0;   ///< units before that row
    int other_units = 0; ///< and on the line of the other tiles
};

/// Sums of the lanes before this one.
__device__ inline int sum_before(int x) {
    int end = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, end, step);
        end += static_cast<int>(threadIdx.x % 32) >= step ? before : 0;
    }
    return end - x;
}

/// By each warp for itself: no barrier.
/// @param least     tiles of a block at least, if there are so many
/// @param tiles_of  a row's tiles, and its units on the other line
template <class TilesOf>
__device__ Share find_share(int rows, int least, const TilesOf& tiles_of) {
    const int lane = threadIdx.x % 32;
    const int each = (rows + 31) / 32;
    const int first = min(rows, lane * each);
    const int last = min(rows, first + each);
    // Up to 32 rows are one for each lane. It is looked at once, as that takes one or two
    // trips to memory.
    const int2 of_first = first < last ? tiles_of(first) : make_int2(0, 0);
    const auto tiles_at = [&](int r) { return r == first ? of_first : tiles_of(r); };
    int mine = 0;
#pragma unroll 1
    for (int r = first; r < last; r++) {
        mine += tiles_at(r).x;
    }
    const int total = __reduce_add_sync(0xffffffffu, mine);
    Share share;
    static_cast<TileShare&>(share) = TileShare::of(total, rows, gridDim.x, least);
    int units = 0, other = 0;
#pragma unroll 1
    for (int r = first; r < last; r++) {
        const int2 tiles = tiles_at(r);
        units += share.units(tiles.x);
        other += tiles.y;
    }
    int at = sum_before(units), other_at = sum_before(other);
    const int begin = share.first_unit(blockIdx.x);
    const bool here = at <= begin && begin < at + units;
    int r = first;
#pragma unroll 1
    for (; here; r++) {
        const int2 tiles = tiles_at(r);
        if (at + share.units(tiles.x) > begin) {
            break;
        }
        at += share.units(tiles.x);
        other_at += tiles.y;
    }
    const int who = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, here))) - 1;
    share.row = who < 0 ? rows : __shfl_sync(0xffffffffu, r, who);
    share.row_begin = __shfl_sync(0xffffffffu, at, max(0, who));
    share.other_units = __shfl_sync(0xffffffffu, other_at, max(0, who));
    return share;
}

/// What a row reads of sink and window, which is known before its cells are.
__device__ RowPlan dense_plan(const AttendParams& p, const BatchRow& row) {
    const int64_t length = __ldcg(&row.sequence->length);
    return plan_dense(
            reach_of(length, row.q_len, row.token, p.sink, p.window),
            length,
            row.view_length,
            p.attend_dense,
            row.item,
            nullptr);
}

/// Units before a row on the dense line and on the far one. By each warp for itself.
__device__ __noinline__ int2 row_begins(
        const RowPlan* plans,
        const Share& dense,
        const Share& far,
        int r) {
    int of_dense = 0, of_far = 0;
#pragma unroll 1
    for (int q = threadIdx.x % 32; q < r; q += 32) {
        of_dense += dense.units(dense_tiles(plans[q]));
        of_far += far.units(far_tiles(plans[q]));
    }
    return make_int2(
            __reduce_add_sync(0xffffffffu, of_dense),
            __reduce_add_sync(0xffffffffu, of_far));
}

/// Merges the pieces of a row, and the caller's result; by the block that ends
/// the row. `weights` is shared memory, nq for each piece and one for the caller's.
__device__ void merge_pieces(
        const AttendParams& p,
        const RowPlan& plan,
        int dropped,
        int first_dense, ///< pieces
        int ndense,
        int first_far,
        int nfar,
        int64_t first_out,
        int nq,
        float* weights) {
    const int n = ndense + nfar;
    const int width = nq * p.d; // of a piece
    const auto piece = [&](int s) {
        return s < ndense ? first_dense + s : p.pieces + first_far + s - ndense;
    };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Many at once, and before their weights are known: each takes long.
    constexpr int kAtOnce = 8;
    float4 parts[kAtOnce];
    const auto load_parts = [&](int first, int i) {
        const float* from = p.part + i;
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            if (first + k < n) {
                parts[k] = __ldcg(reinterpret_cast<const float4*>(
                        from + int64_t(piece(first + k)) * width));
            }
        }
    };
    int i = 4 * threadIdx.x;
    if (i < width) {
        load_parts(0, i);
    }
#pragma unroll 1
    for (int q = warp; q < nq; q += blockDim.x / 32) {
        float* w = weights + q * (n + 1);
        // The caller's comes last.
        const auto lse_of = [&](int s) {
            return s < n ? __ldcg(&p.part_lse[int64_t(piece(s)) * nq + q])
                    : p.out.merge ? p.out.lse[first_out + q]
                                  : -INFINITY;
        };
        float largest = -INFINITY;
#pragma unroll 1
        for (int s = lane; s <= n; s += 32) {
            w[s] = lse_of(s);
            largest = fmaxf(largest, w[s]);
        }
        largest = most_of_warp(largest);
        const float shift = largest == -INFINITY ? 0.0f : largest;
        float sum = 0, dense_sum = 0;
#pragma unroll 1
        for (int s = lane; s <= n; s += 32) {
            const float x = __expf(w[s] - shift);
            w[s] = x;
            sum += x;
            dense_sum += s < ndense ? x : 0.0f;
        }
        sum = sum_of_warp(sum);
        dense_sum = sum_of_warp(dense_sum);
        const float each = sum > 0 ? 1 / sum : 0.0f;
#pragma unroll 1
        for (int s = lane; s <= n; s += 32) {
            w[s] *= each;
        }
        if (lane == 0) {
            if (p.out.lse) {
                p.out.lse[first_out + q] =
                        sum > 0 ? shift + logf(sum) : -INFINITY;
            }
            if (p.out.stats) {
                AttendStats& stats = p.out.stats[first_out + q];
                stats.cells = plan.cells;
                stats.keys_read = plan.keys - dropped;
                stats.far_keys = plan.far;
                stats.dense_mass = each * dense_sum;
                stats.keys_ranked = 0;
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    while (i < width) {
        const float* w = weights + i / p.d * (n + 1);
        auto* to = reinterpret_cast<float4*>(p.out.output + first_out * p.d + i);
        float4 o = make_float4(0, 0, 0, 0);
        if (w[n] > 0) { // else it may hold anything
            add_scaled(o, w[n], *to);
        }
#pragma unroll 1
        for (int first = 0; first < n; first += kAtOnce) {
#pragma unroll
            for (int k = 0; k < kAtOnce; k++) {
                if (first + k < n) {
                    add_scaled(o, w[first + k], parts[k]);
                }
            }
            load_parts(first + kAtOnce, i);
        }
        *to = o;
        i += 4 * blockDim.x;
        if (i < width) {
            load_parts(0, i);
        }
    }
}

/// Notes that a block has read `here` of a row's tiles, and merges the row if it was
/// the last.
/// @param begins  units before the row on the dense line and on the far one
__device__ __noinline__ void end_row(
        const AttendParams& p,
        const RowPlan& plan,
        int r,
        int here,
        const Share& dense,
        const Share& far,
        int2 begins,
        int64_t first_out,
        int nq,
        float* weights) {
    RowPlan* shared_plan = p.work.plans + r;
    const int all = dense_tiles(plan) + far_tiles(plan);
    if (arrive(&shared_plan->tiles_done, here) + here == all) {
        const TileShare::Range of_dense = dense.blocks(begins.x, dense_tiles(plan));
        const TileShare::Range of_far = far.blocks(begins.y, far_tiles(plan));
        merge_pieces(
                p,
                plan,
                __ldcg(&shared_plan->dropped),
                r + of_dense.begin,
                of_dense.end - of_dense.begin,
                r + of_far.begin,
                of_far.end - of_far.begin,
                first_out,
                nq,
                weights);
    }
    __syncthreads(); // before the next row's queries, cells and tiles
}

constexpr int kPadding = 8; ///< elements between rows, which spreads the banks
constexpr int kStages = 2;
constexpr uint32_t kNowhere = 0xffffffffu;
/// Room of static variables of gather_attend_kernel and of what it calls.
constexpr int kStaticBytes = 4096;
/// Left for the blocks of the kernel before, beside which this one begins.
constexpr int kRouteBytes = 48 << 10;

constexpr int most_warps(int d) {
    return d > 128 ? 2 : d > 64 ? 4 : 8;
}

constexpr int max_of(int a, int b) {
    return a > b ? a : b;
}

/// Where rows lie, in units of 16 bytes from the head's first.
struct RowStrides {
    uint32_t head, token, page;

    __device__ RowStrides(int64_t head_bytes, int64_t token_bytes, int64_t page_bytes)
            : head(head_bytes / 16), token(token_bytes / 16), page(page_bytes / 16) {}
};

/// A row's queries against tiles of its keys, by a block: each warp reads tiles of
/// 32 keys with an online softmax of its own, the next tile's rows on their way
/// while one is computed. 16 query rows, of which the group fills some, are
/// multiplied at a time.
/// @param shared  dynamic shared memory
/// @param piece   where the result goes
template <class T, int D>
__device__ __forceinline__ void attend_tiles(
        const AttendParams& p,
        char* shared,
        const DeviceView& kv,
        int kv_head,
        int item,
        int64_t first_query,
        int nq,
        int tile_begin,
        int tile_end,
        SlotReader& reader,
        int piece) {
    constexpr int kStride = D + kPadding;
    constexpr int kChunks = D / 8; // 16-byte pieces of a row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    T* queries = reinterpret_cast<T*>(shared); // kQueries * kStride
    T* all_tiles = queries + kQueries * kStride;
    T* tiles = all_tiles + warp * kStages * 2 * kTile * kStride;
    const auto k_tile = [&](int stage) {
        return tiles + stage * 2 * kTile * kStride;
    };
    const auto v_tile = [&](int stage) {
        return tiles + (stage * 2 + 1) * kTile * kStride;
    };
    const RowStrides k_stride(kv.k_head, kv.k_token, kv.k_page);
    const RowStrides v_stride(kv.v_head, kv.v_token, kv.v_page);
    const auto page_size = static_cast<uint32_t>(kv.page_size);
    const int npages = static_cast<int>(kv.npages);
    for (int i = threadIdx.x; i < kQueries * kChunks; i += blockDim.x) {
        const int q = i / kChunks, c = i % kChunks;
        uint4 bits = {0, 0, 0, 0};
        if (q < nq) {
            bits = __ldcg(
                    reinterpret_cast<const uint4*>(
                            static_cast<const T*>(p.queries) +
                            (first_query + q) * D) +
                    c);
        }
        *reinterpret_cast<uint4*>(queries + q * kStride + 8 * c) = bits;
    }
    __syncthreads();
    const float scale = p.scale * kLog2E;
    float o[D / 8][4] = {};
    float m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    // Tiles are dealt to the warps in turn. A round asks for the slots of the tile
    // after the next, sends for the rows of the next and computes one; the first
    // two have nothing to compute yet. Of each there is one piece of code.
    int stage = 0, slot = -1;
    unsigned there = 0, next_there = 0;
#pragma unroll 1
    for (int tile = tile_begin + warp - 2 * warps; tile < tile_end;
         tile += warps, stage ^= 1) {
        if (__any_sync(0xffffffffu, slot >= 0)) {
            uint32_t k = kNowhere, v = kNowhere;
            if (slot >= 0) {
                uint32_t page = 0, in_page = slot;
                if (kv.page_table) {
                    const int at = kv.page_table[slot / page_size];
                    page = at;
                    in_page = slot % page_size;
                    if (at < 0 || at >= npages) {
                        slot = -1;
                        raise(p.flag, Fault::attend_page, item);
                    }
                }
                if (slot >= 0) {
                    k = kv_head * k_stride.head + page * k_stride.page +
                            in_page * k_stride.token;
                    v = kv_head * v_stride.head + page * v_stride.page +
                            in_page * v_stride.token;
                }
            }
#pragma unroll
            for (int i = 0; i < kTile * kChunks / 32; i++) {
                const int key = (32 * i + lane) / kChunks;
                const int c = (32 * i + lane) % kChunks;
                const uint32_t at_k = __shfl_sync(0xffffffffu, k, key);
                const uint32_t at_v = __shfl_sync(0xffffffffu, v, key);
                const bool is_there = at_k != kNowhere;
                // An address must be valid even where nothing is read.
                copy_16_bytes(
                        k_tile(stage) + key * kStride + 8 * c,
                        kv.k + (is_there ? uint64_t(at_k) + c : 0) * 16,
                        is_there);
                copy_16_bytes(
                        v_tile(stage) + key * kStride + 8 * c,
                        kv.v + (is_there ? uint64_t(at_v) + c : 0) * 16,
                        is_there);
            }
        }
        commit_copies();
        there = next_there;
        next_there = __ballot_sync(0xffffffffu, slot >= 0);
        const int ahead = tile + 2 * warps;
        slot = ahead < tile_end ? reader.slot(ahead * kTile + lane) : -1;
        if (!there) {
            continue;
        }
        wait_for_copies<1>();
        __syncwarp();
        const T* k = k_tile(stage ^ 1);
        const T* v = v_tile(stage ^ 1);
        float s[kTile / 8][4] = {};
        const int eighth = lane / 8, in_eighth = lane % 8;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t a[4];
            load_matrices(
                    a,
                    queries + ((eighth & 1) * 8 + in_eighth) * kStride + 16 * j +
                            (eighth >> 1) * 8);
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
        // This thread has queries lane / 4 and lane / 4 + 8, and of every eight
        // keys 2 * (lane % 4) and the next.
        const int key = lane % 4 * 2;
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
#pragma unroll
            for (int i = 0; i < kTile / 4; i++) {
                float& x = s[i / 2][2 * half + i % 2];
                x = exp2f(x - shift);
                sum[half] += x;
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
    }
    wait_for_copies<0>();
    __syncthreads(); // tiles become room for the warps' results

    // m and sum of each warp and query, then their outputs.
    float* all_m = reinterpret_cast<float*>(all_tiles);
    float* all_sum = all_m + warps * kQueries;
    float* all_o = all_sum + warps * kQueries; // warps * kQueries * D
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int step = 1; step < 4; step *= 2) {
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], step);
        }
        const int q = lane / 4 + 8 * half;
        if (q >= nq) {
            continue;
        }
        const int at = warp * kQueries + q;
        if (lane % 4 == 0) {
            all_m[at] = m[half];
            all_sum[at] = sum[half];
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            *reinterpret_cast<float2*>(all_o + at * D + 8 * j + lane % 4 * 2) =
                    make_float2(o[j][2 * half], o[j][2 * half + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < nq * (D / 4); i += blockDim.x) {
        const int q = i / (D / 4), j = i % (D / 4) * 4;
        float most = -INFINITY;
        for (int w = 0; w < warps; w++) {
            most = fmaxf(most, all_m[w * kQueries + q]);
        }
        const float shift = most == -INFINITY ? 0.0f : most;
        float total = 0;
        float4 x = make_float4(0, 0, 0, 0);
        for (int w = 0; w < warps; w++) {
            const int at = w * kQueries + q;
            const float weight = exp2f(all_m[at] - shift);
            total += weight * all_sum[at];
            const auto y = *reinterpret_cast<const float4*>(all_o + at * D + j);
            add_scaled(x, weight, y);
        }
        const float each = total > 0 ? 1 / total : 0.0f;
        *reinterpret_cast<float4*>(p.part + (piece * nq + q) * D + j) =
                make_float4(each * x.x, each * x.y, each * x.z, each * x.w);
        if (j == 0) {
            constexpr float kLn2 = 0.693147180559945309417f;
            p.part_lse[piece * nq + q] =
                    total > 0 ? shift * kLn2 + logf(total) : -INFINITY;
        }
    }
    __syncthreads(); // before queries and tiles are overwritten
}

/// Attends to sink and window while the cells are still being taken, then to the
/// far keys of the cells. The block that ends a row merges its pieces.
template <class T, int D>
__global__ void __launch_bounds__(32 * most_warps(D))
        gather_attend_kernel(const __grid_constant__ AttendParams p) {
    let_next_begin();
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int nq = group / choices, rows = p.nrow * choices;
    extern __shared__ __align__(16) char shared[];
    __shared__ RowCell at_hand[kCellsAtHand];
    const RowPlan* plans = p.work.plans;
    const auto first_query = [&](const BatchRow& row, int r) {
        return int64_t(row.query) * p.heads_q + row.kv_head * group +
                (p.share_group ? 0 : r % choices);
    };

    // Of the dense tiles, and of the far ones; and the rows that they are of.
    Share dense, share;
    int dense_rows_end = 0, far_rows_end = 0;
    // The kernel before this one lets it begin when all that came before has
    // ended: for sink and window, queries, caches and lengths are there.
#pragma unroll 1
    for (int far = 0; far < 2; far++) {
        if (far) {
            wait_for_previous();
        }
        const auto plan_of = [&](int r) {
            return far ? plans[r] : dense_plan(p, p.rows[r / choices]);
        };
        share = find_share(rows, warps, [&](int r) {
            const RowPlan plan = plan_of(r);
            return far ? make_int2(far_tiles(plan), dense.units(dense_tiles(plan)))
                       : make_int2(dense_tiles(plan), 0);
        });
        int r = share.row, row_begin = share.row_begin;
        int dense_begin = share.other_units;
        if (!far) {
            dense = share;
        }
#pragma unroll 1
        for (; r < rows && row_begin < share.first_unit(blockIdx.x + 1); r++) {
            const BatchRow& row = p.rows[r / choices];
            SlotReader reader;
            reader.far = far;
            reader.plan = plan_of(r);
            reader.shared_plan = p.work.plans + r;
            reader.lists = row.lists;
            reader.probed = p.work.probed + r * p.work.probed_words;
            reader.sink = p.sink;
            reader.cells = p.work.cells + r * p.work.stride;
            const int tiles = far ? far_tiles(reader.plan) : dense_tiles(reader.plan);
            const TileShare::Range mine = share.tiles(blockIdx.x, row_begin, tiles);
            if (far && reader.plan.keys) {
                if (reader.plan.cells <= kCellsAtHand) {
                    for (int i = threadIdx.x; i < reader.plan.cells; i += blockDim.x) {
                        at_hand[i] = reader.cells[i];
                    }
                    reader.cells = at_hand;
                    __syncthreads();
                }
                const int first =
                        (mine.begin + static_cast<int>(threadIdx.x) / 32) * kTile + lane;
                reader.seek(min(first, reader.plan.keys - 1));
            }
            if (mine.begin < mine.end) {
                attend_tiles<T, D>(
                        p,
                        shared,
                        p.items[row.item].kv,
                        row.kv_head,
                        row.item,
                        first_query(row, r),
                        nq,
                        mine.begin,
                        mine.end,
                        reader,
                        (far ? p.pieces : 0) + r + blockIdx.x);
            }
            if (far) {
                const int of_dense = dense_tiles(reader.plan);
                const TileShare::Range also =
                        dense.tiles(blockIdx.x, dense_begin, of_dense);
                end_row(p,
                        reader.plan,
                        r,
                        mine.end - mine.begin + also.end - also.begin,
                        dense,
                        share,
                        make_int2(dense_begin, row_begin),
                        first_query(row, r),
                        nq,
                        reinterpret_cast<float*>(shared));
                dense_begin += dense.units(of_dense);
            }
            row_begin += share.units(tiles);
        }
        (far ? far_rows_end : dense_rows_end) = r;
    }
    // Rows of which this block has read sink and window alone.
#pragma unroll 1
    for (int r = dense.row; r < dense_rows_end; r++) {
        if (r >= share.row && r < far_rows_end) {
            continue;
        }
        const int2 begins = row_begins(plans, dense, share, r);
        const RowPlan plan = plans[r];
        const TileShare::Range mine =
                dense.tiles(blockIdx.x, begins.x, dense_tiles(plan));
        if (mine.begin < mine.end) {
            end_row(p,
                    plan,
                    r,
                    mine.end - mine.begin,
                    dense,
                    share,
                    begins,
                    first_query(p.rows[r / choices], r),
                    nq,
                    reinterpret_cast<float*>(shared));
        }
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
    bool begins_early = false;
    if (error == cudaSuccess) {
        error = compiled_for_90(
                reinterpret_cast<const void*>(gather_attend_kernel<T, D>), begins_early);
    }
    const int reserved = kStaticBytes + (begins_early ? kRouteBytes : 0);
    // Each warp has its own tiles, and their results the same room.
    constexpr int kQueryBytes = kQueries * (D + kPadding) * int(sizeof(T));
    constexpr int kWarpBytes =
            max_of(kStages * 2 * kTile * (D + kPadding) * int(sizeof(T)),
                   kQueries * (2 + D) * int(sizeof(float)));
    const int warps = std::min(
            most_warps(D),
            std::max(1, (room - reserved - kQueryBytes) / kWarpBytes));
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
