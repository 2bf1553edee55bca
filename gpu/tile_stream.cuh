/// Attention of a few queries to keys that lie anywhere, a warp at a time. Device code.
#pragma once

#include "launch.h"
#include "mma.cuh"
#include "sequence_state.h"

namespace faiss_saap::gpu {

constexpr int kStreamKeys = 16;   ///< that a warp multiplies at a time
constexpr int kStreamQueries = 8; ///< columns of a tensor-core tile

/// Where rows of one KV head lie; strides in 16 bytes.
struct StreamView {
    const char *k, *v;
    uint32_t k_token, v_token, k_page, v_page;
    const int32_t* page_table;
    uint32_t page_size, npages;

    StreamView() = default;
    __device__ StreamView(const DeviceView& kv, int head)
            : k(kv.k + head * kv.k_head),
              v(kv.v + head * kv.v_head),
              k_token(static_cast<uint32_t>(kv.k_token / 16)),
              v_token(static_cast<uint32_t>(kv.v_token / 16)),
              k_page(static_cast<uint32_t>(kv.k_page / 16)),
              v_page(static_cast<uint32_t>(kv.v_page / 16)),
              page_table(kv.page_table),
              page_size(static_cast<uint32_t>(kv.page_size)),
              npages(static_cast<uint32_t>(kv.npages)) {}
};

/// A warp's online softmax over tiles of 16 keys, kept in registers. One tile of keys
/// and one of values are in shared memory; each is sent for again as soon as it has
/// been read, so that one of the two is always on its way. Keys are the rows of what is
/// multiplied and queries its columns, as the latter are few.
template <class T, int D>
struct TileStream {
    static constexpr int kStride = D + 8; ///< of rows, which spreads the banks
    static constexpr int kChunks = D / 8; ///< 16-byte pieces of a row
    static constexpr int kTile = kStreamKeys * kStride; ///< elements

    uint32_t keys, values; ///< addresses of this warp's tiles in shared memory
    const StreamView* kv;  ///< in shared memory, which spares registers
    float scale;           ///< of scores, for powers of two
    uint32_t q[D / 16][2]; ///< the queries

    // What this lane's queries, 2 * (lane % 4) and the next, have seen; `o` is of the
    // dimensions 16 * j + lane / 4 (its first half) and that + 8, `sum` of this lane's
    // keys alone until end().
    float o[D / 16][4];
    float largest[2], sum[2];

    /// @param from  kStreamQueries * kStride in shared memory
    __device__ __forceinline__ void load_queries(uint32_t from) {
        const int lane = threadIdx.x % 32;
        from += 2 * (lane % 8 * kStride) + lane / 8 * 16;
#pragma unroll
        for (int j = 0; j < D / 16; j += 2) {
            uint32_t m[4];
            load_matrices(m, from + 32 * j);
            q[j][0] = m[0];
            q[j][1] = m[1];
            q[j + 1][0] = m[2];
            q[j + 1][1] = m[3];
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                o[j][i] = 0;
            }
        }
        largest[0] = largest[1] = -INFINITY;
        sum[0] = sum[1] = 0;
    }

    /// Sends for the first of a line of tiles.
    /// @param slot, next  of key lane % 16 of it and of the one after it; -1: none
    /// @return a page that was not there
    __device__ __forceinline__ bool start(int slot, int next) {
        next_slot = next;
        const bool bad = find(slot);
        send(keys, kv->k, k_at);
        commit_copies();
        send(values, kv->v, v_at);
        commit_copies();
        return bad;
    }

    /// Attends to tiles tile, tile + step, ... before `end`, the first of which is on
    /// its way.
    /// @param slot_of  slot of a key, by number; -1: none
    /// @return a page that was not there
    template <class SlotOf>
    __device__ __forceinline__ bool attend(int tile, int end, int step, SlotOf& slot_of) {
        const int lane = threadIdx.x % 32;
        // The row of a matrix of 16 * 16 that this lane names, its quarters numbered down
        // the columns first, or along the rows.
        const int quarter = lane / 8, in_quarter = lane % 8;
        const uint32_t down = 2 * (((quarter & 1) * 8 + in_quarter) * kStride) +
                (quarter >> 1) * 16;
        const uint32_t along = 2 * (((quarter >> 1) * 8 + in_quarter) * kStride) +
                (quarter & 1) * 16;
        bool bad = false;
#pragma unroll 1
        for (; tile < end; tile += step) {
            const unsigned here = there;
            const int next = tile + step;
            const int slot = next_slot;
            next_slot = next + step < end
                    ? slot_of((next + step) * kStreamKeys + lane % kStreamKeys)
                    : -1;
            wait_for_copies<1>();
            __syncwarp();
            float s[2][4] = {}; // two sums, as products wait for each other
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t a[4];
                load_matrices(a, keys + down + 32 * j);
                multiply_add<T>(s[j % 2], a, q[j][0], q[j][1]);
            }
            __syncwarp(); // all have read the keys
            if (next < end) {
                bad |= find(slot);
                send(keys, kv->k, k_at);
            }
            commit_copies(); // nothing, at the end: the waits count
            uint32_t weights[2];
            weigh(here, s, weights);
            wait_for_copies<1>();
            __syncwarp();
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t a[4];
                load_transposed(a, values + along + 32 * j);
                multiply_add<T>(o[j], a, weights[0], weights[1]);
            }
            __syncwarp(); // all have read the values
            if (next < end) {
                send(values, kv->v, v_at);
            }
            commit_copies();
        }
        return bad;
    }

    /// Sums over the lanes of a query.
    __device__ __forceinline__ void end() {
        wait_for_copies<0>();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] = sum_of_query(sum[i]);
        }
    }

    __device__ __forceinline__ static float sum_of_query(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 4);
        x += __shfl_xor_sync(0xffffffffu, x, 8);
        return x + __shfl_xor_sync(0xffffffffu, x, 16);
    }

   private:
    // The tile on its way: offsets of this lane's key, and which keys there are.
    uint32_t k_at, v_at;
    unsigned there;
    int next_slot; ///< of the tile after it: its number takes as long as its rows

    /// @param slot  of key lane % 16 of the next tile; -1: none
    /// @return a page that was not there
    __device__ __forceinline__ bool find(int slot) {
        uint32_t page = 0, in_page = slot;
        bool bad = false;
        if (kv->page_table && slot >= 0) {
            page = kv->page_table[slot / kv->page_size];
            in_page = slot % kv->page_size;
            bad = page >= kv->npages;
        }
        const bool is = slot >= 0 && !bad;
        // An address must be valid even where nothing is read.
        k_at = is ? page * kv->k_page + in_page * kv->k_token : 0;
        v_at = is ? page * kv->v_page + in_page * kv->v_token : 0;
        there = __ballot_sync(0xffffffffu, is) & 0xffffu;
        return bad;
    }

    /// Some lanes take a row, so that few rows are a lane's.
    __device__ __forceinline__ void send(
            uint32_t tile,
            const char* from,
            uint32_t offset) {
        constexpr int kLanes = D % 64 == 0 ? 8 : 4; // of a row at once
        constexpr int kRows = 32 / kLanes;
        constexpr uint32_t kElement = sizeof(T);
        const int lane = threadIdx.x % 32, c = lane % kLanes;
        const uint32_t to = tile + kElement * (lane / kLanes * kStride + 8 * c);
#pragma unroll
        for (int i = 0; i < kStreamKeys / kRows; i++) {
            const int key = i * kRows + lane / kLanes;
            const uint32_t at = __shfl_sync(0xffffffffu, offset, key);
            const char* row = from + 16 * c + uint64_t(at) * 16;
#pragma unroll
            for (int j = 0; j < kChunks / kLanes; j++) {
                stream_16_bytes(
                        to + kElement * (i * kRows * kStride + 8 * kLanes * j),
                        row + 16 * kLanes * j,
                        there >> key & 1);
            }
        }
    }

    /// Softmax weights of a tile's keys, as a factor of the product with its values; what
    /// was summed before shrinks where a larger score has come.
    /// @param here  which keys there are
    /// @param s     two sums of each score, of keys lane / 4 and that + 8
    __device__ __forceinline__ void weigh(
            unsigned here,
            const float (&s)[2][4],
            uint32_t (&weights)[2]) {
        const int lane = threadIdx.x % 32;
        float x[2][2], shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) { // queries
#pragma unroll
            for (int k = 0; k < 2; k++) { // keys
                x[k][i] = here >> (lane / 4 + 8 * k) & 1
                        ? (s[0][2 * k + i] + s[1][2 * k + i]) * scale
                        : -INFINITY;
            }
            float most = fmaxf(largest[i], fmaxf(x[0][i], x[1][i]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 4));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 8));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 16));
            const float shift = most == -INFINITY ? 0.0f : most;
            shrink[i] = exp2f(largest[i] - shift);
            largest[i] = most;
            x[0][i] = exp2f(x[0][i] - shift);
            x[1][i] = exp2f(x[1][i] - shift);
            sum[i] = sum[i] * shrink[i] + x[0][i] + x[1][i];
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            o[j][0] *= shrink[0];
            o[j][1] *= shrink[1];
            o[j][2] *= shrink[0];
            o[j][3] *= shrink[1];
        }
        weights[0] = transpose(pack<T>(x[0][0], x[0][1]));
        weights[1] = transpose(pack<T>(x[1][0], x[1][1]));
    }
};

} // namespace faiss_saap::gpu
