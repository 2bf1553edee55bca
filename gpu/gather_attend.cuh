/// Attention over rows of the cache that lie anywhere. Included by the files
/// that instantiate it for one head dimension.
#pragma once

#include "attend.h"
#include "device_vectors.cuh"
#include "far_keys.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kTile = 16;   ///< keys that a warp takes at a time
constexpr int kQueries = 16; ///< rows of a tensor-core tile
/// Probed cells of a row that a block keeps at hand; others stay in memory.
constexpr int kCellsAtHand = 192;

__device__ __forceinline__ void copy_16_bytes(
        void* to,
        const void* from,
        bool there) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at),
                 "l"(from),
                 "r"(there ? 16 : 0));
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
            : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
            : "r"(at)
            : "memory");
}

__device__ __forceinline__ void load_transposed(
        uint32_t (&m)[4],
        const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, "
            "[%4];\n"
            : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
            : "r"(at)
            : "memory");
}

template <class T>
__device__ __forceinline__ void multiply_add(
        float (&c)[4],
        const uint32_t (&a)[4],
        uint32_t b0,
        uint32_t b1) {
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
        asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 h = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&h);
    } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&h);
    }
}

/// Numbers of the keys of one row, in the order they are read, to slots. A
/// thread asks for ascending numbers, so it walks the row's cells once.
struct SlotReader {
    const BatchItem* item;
    const ListState* lists; ///< of the row's KV head
    const RowCell* cells;
    const uint32_t* probed;
    int32_t* twice;
    Reach reach;
    int64_t sink;
    int64_t dense, total; ///< dense keys come first
    int at = 0;           ///< the cell that holds the last far key asked for

    /// Moves to the cell of a far key.
    __device__ void seek(int64_t far, int ncell) {
        int low = 0, high = ncell - 1;
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
    __device__ int64_t slot(int64_t i) {
        if (i >= total) {
            return -1;
        }
        if (i < dense) {
            const int64_t sinks = reach.sink_end;
            return i < sinks ? i : reach.window_begin + i - sinks;
        }
        const auto far = static_cast<int>(i - dense);
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
                atomicAdd(twice, 1);
                return -1;
            }
        }
        return slot;
    }
};

/// A block reads one piece of a row; each of its warps reads tiles of 16 keys
/// with an online softmax of its own, the next tile's rows on their way while
/// one is computed. 16 query rows, of which the group fills some, are
/// multiplied at a time.
template <class T, int D, int Warps>
__global__ void __launch_bounds__(32 * Warps) gather_attend_kernel(AttendParams p) {
    constexpr int kStride = D + 8; // elements; the padding spreads the banks
    constexpr int kStages = 2;
    constexpr int kChunks = D / 8; // 16-byte pieces of a row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int nq = group / choices;
    const BatchRow& row = p.rows[blockIdx.y / choices];
    const int64_t r = blockIdx.y;
    const int split = blockIdx.x;
    const BatchItem& item = p.items[row.item];
    const DeviceView kv = item.kv;

    extern __shared__ __align__(16) char shared[];
    T* queries = reinterpret_cast<T*>(shared); // kQueries * kStride
    T* tiles = queries + kQueries * kStride +
            warp * kStages * 2 * kTile * kStride;
    const auto k_tile = [&](int stage) {
        return tiles + stage * 2 * kTile * kStride;
    };
    const auto v_tile = [&](int stage) {
        return tiles + (stage * 2 + 1) * kTile * kStride;
    };

    const int64_t first_query =
            int64_t(item.first_token + row.token) * p.heads_q +
            row.kv_head * group + (p.share_group ? 0 : blockIdx.y % choices);
    for (int i = threadIdx.x; i < kQueries * kChunks; i += 32 * Warps) {
        const int q = i / kChunks, c = i % kChunks;
        uint4 bits = {0, 0, 0, 0};
        if (q < nq) {
            bits = reinterpret_cast<const uint4*>(
                    static_cast<const T*>(p.queries) + (first_query + q) * D)[c];
        }
        *reinterpret_cast<uint4*>(queries + q * kStride + 8 * c) = bits;
    }
    __shared__ RowCell at_hand[kCellsAtHand];
    const RowCell* cells = p.row_cells + r * p.row_stride;
    const int ncell = p.row_cell_count[r];
    if (ncell <= kCellsAtHand) {
        for (int i = threadIdx.x; i < ncell; i += 32 * Warps) {
            at_hand[i] = cells[i];
        }
        cells = at_hand;
    }
    __syncthreads();

    SlotReader reader;
    reader.item = &item;
    reader.lists = item.sequence->lists + p.lists[row.first_list].list;
    reader.cells = cells;
    reader.probed = p.probed + r * p.probed_words;
    reader.twice = p.row_twice + r;
    reader.reach = reach_of(item, row.token, p.sink, p.window);
    reader.sink = p.sink;
    const bool readable = item.sequence->length <= kv.length;
    reader.dense = p.attend_dense && readable
            ? reader.reach.sink_end + reader.reach.window_end -
                    reader.reach.window_begin
            : 0;
    reader.total = reader.dense + p.row_keys[r];

    // Tiles of this piece, dealt to the warps in turn.
    const int64_t ntile = (reader.total + kTile - 1) / kTile;
    const int64_t tile_begin = ntile * split / p.splits;
    const int64_t tile_end = ntile * (split + 1) / p.splits;
    int64_t tile = tile_begin + warp;
    if (tile < tile_end) {
        const int64_t far = tile * kTile + lane % kTile - reader.dense;
        const int64_t most = p.row_keys[r];
        if (most) {
            reader.seek(far < 0 ? 0 : far < most ? far : most - 1, ncell);
        }
    }
    // Lanes of the upper half repeat those of the lower one, except that they
    // must not count a key twice.
    const auto slot_of = [&](int64_t t) {
        int64_t slot = -1;
        if (t < tile_end && lane < kTile) {
            slot = reader.slot(t * kTile + lane);
        }
        return static_cast<int>(__shfl_sync(0xffffffffu, (int)slot, lane % kTile));
    };
    const auto fetch = [&](int slot, int stage) {
        const char *k = nullptr, *v = nullptr;
        if (slot >= 0) {
            k = key_row(kv, row.kv_head, slot);
            v = value_row(kv, row.kv_head, slot);
            if (!k) {
                raise(p.flag, Fault::attend_page, row.item);
            }
        }
        for (int i = lane; i < kTile * kChunks; i += 32) {
            // kTile * kChunks is a multiple of 32: no lane misses a shuffle.
            const int key = i / kChunks, c = i % kChunks;
            const auto* from_k = reinterpret_cast<const char*>(__shfl_sync(
                    0xffffffffu, reinterpret_cast<unsigned long long>(k), key));
            const auto* from_v = reinterpret_cast<const char*>(__shfl_sync(
                    0xffffffffu, reinterpret_cast<unsigned long long>(v), key));
            const bool there = from_k != nullptr;
            // An address must be valid even where nothing is read.
            copy_16_bytes(
                    k_tile(stage) + key * kStride + 8 * c,
                    there ? from_k + 16 * c : static_cast<const char*>(p.queries),
                    there);
            copy_16_bytes(
                    v_tile(stage) + key * kStride + 8 * c,
                    there ? from_v + 16 * c : static_cast<const char*>(p.queries),
                    there);
        }
        return k != nullptr;
    };

    const float scale = p.scale * 1.44269504088896340736f; // exp2
    float o[D / 8][4] = {};
    float m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, dense_sum[2] = {0, 0};
    int stage = 0;
    bool valid = tile < tile_end && fetch(slot_of(tile), 0);
    asm volatile("cp.async.commit_group;\n");
    int next_slot = slot_of(tile + Warps);
    for (; tile < tile_end; tile += Warps) {
        bool next_valid = false;
        if (tile + Warps < tile_end) {
            next_valid = fetch(next_slot, stage ^ 1);
        }
        asm volatile("cp.async.commit_group;\n");
        next_slot = slot_of(tile + 2 * Warps);
        asm volatile("cp.async.wait_group 1;\n");
        __syncwarp();

        const unsigned there = __ballot_sync(0xffffffffu, valid) & 0xffffu;
        const T* k = k_tile(stage);
        const T* v = v_tile(stage);
        float s[2][4] = {};
        const int eighth = lane / 8, in_eighth = lane % 8;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t a[4], b[4];
            load_matrices(
                    a,
                    queries + ((eighth & 1) * 8 + in_eighth) * kStride +
                            16 * j + (eighth >> 1) * 8);
            load_matrices(
                    b,
                    k + ((eighth >> 1) * 8 + in_eighth) * kStride + 16 * j +
                            (eighth & 1) * 8);
            multiply_add<T>(s[0], a, b[0], b[1]);
            multiply_add<T>(s[1], a, b[2], b[3]);
        }
        // This thread has queries lane / 4 and lane / 4 + 8, keys 2 * (lane %
        // 4) + {0, 1} and those + 8.
        const int key = lane % 4 * 2;
        const int64_t dense_keys = reader.dense - tile * kTile;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = m[half];
#pragma unroll
            for (int i = 0; i < 4; i++) {
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
            for (int i = 0; i < 4; i++) {
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
        const uint32_t weights[4] = {
                pack<T>(s[0][0], s[0][1]),
                pack<T>(s[0][2], s[0][3]),
                pack<T>(s[1][0], s[1][1]),
                pack<T>(s[1][2], s[1][3])};
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t b[4];
            load_transposed(
                    b,
                    v + ((eighth & 1) * 8 + in_eighth) * kStride + 16 * j +
                            (eighth >> 1) * 8);
            multiply_add<T>(o[2 * j], weights, b[0], b[1]);
            multiply_add<T>(o[2 * j + 1], weights, b[2], b[3]);
        }
        __syncwarp(); // the next round overwrites this stage
        stage ^= 1;
        valid = next_valid;
    }
    asm volatile("cp.async.wait_group 0;\n");
    __syncthreads(); // tiles become room for the warps' results

    // m, sum and dense_sum of each warp and query, then their outputs.
    float* all_m = reinterpret_cast<float*>(shared);
    float* all_sum = all_m + Warps * kQueries;
    float* all_dense = all_sum + Warps * kQueries;
    float* all_o = all_dense + Warps * kQueries; // Warps * kQueries * D
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int step = 1; step < 4; step *= 2) {
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], step);
            dense_sum[half] += __shfl_xor_sync(0xffffffffu, dense_sum[half], step);
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
            float* to = all_o + at * D + 8 * j + lane % 4 * 2;
            to[0] = o[j][2 * half];
            to[1] = o[j][2 * half + 1];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < nq * D; i += 32 * Warps) {
        const int q = i / D, j = i % D;
        float most = -INFINITY;
        for (int w = 0; w < Warps; w++) {
            most = fmaxf(most, all_m[w * kQueries + q]);
        }
        const float shift = most == -INFINITY ? 0.0f : most;
        float total = 0, dense = 0, x = 0;
        for (int w = 0; w < Warps; w++) {
            const float weight = exp2f(all_m[w * kQueries + q] - shift);
            total += weight * all_sum[w * kQueries + q];
            dense += weight * all_dense[w * kQueries + q];
            x += weight * all_o[(w * kQueries + q) * D + j];
        }
        const int64_t at = (r * p.splits + split) * nq + q;
        p.part[at * D + j] = total > 0 ? x / total : 0.0f;
        if (j == 0) {
            constexpr float kLn2 = 0.693147180559945309417f;
            p.part_lse[at] = total > 0 ? shift * kLn2 + logf(total) : -INFINITY;
            p.part_dense[at] = dense > 0 ? shift * kLn2 + logf(dense) : -INFINITY;
        }
    }
}

} // namespace

template <class T, int D>
cudaError_t gather_attend(const AttendParams& p, cudaStream_t stream) {
    constexpr int kWarps = D > 128 ? 2 : 4;
    constexpr int kTiles =
            (kQueries + kWarps * 4 * kTile) * (D + 8) * int(sizeof(T));
    constexpr int kResults =
            kWarps * kQueries * (3 + D) * int(sizeof(float));
    constexpr int kShared = kTiles > kResults ? kTiles : kResults;
    const cudaError_t error = cudaFuncSetAttribute(
            gather_attend_kernel<T, D, kWarps>,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            kShared);
    if (error != cudaSuccess) {
        return error;
    }
    const int choices = p.share_group ? 1 : p.heads_q / p.heads_kv;
    gather_attend_kernel<T, D, kWarps>
            <<<dim3(p.splits, p.nrow * choices), 32 * kWarps, kShared, stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
