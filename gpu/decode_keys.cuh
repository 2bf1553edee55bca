/// Which keys a block of decode() reads, and where they are. Device code.
#pragma once

#include "decode_block.cuh"

namespace faiss_saap::gpu {

namespace {

/// Tiles of keys, by number among the row's.
struct TileRange {
    int begin, end;
};

/// A block's share of a row's n keys.
__device__ __forceinline__ TileRange tiles_of_block(const DecodeBlock& b, int n) {
    const int tiles = (n + kStreamKeys - 1) / kStreamKeys;
    const int each = DecodeLayout::share(tiles, b.blocks);
    const int begin = min(tiles, b.rank * each);
    return {begin, min(tiles, begin + each)};
}

enum class KeyRange : int {
    dense, ///< sink and window
    far,   ///< of the cells that are taken, or of the first of them where others follow
    others ///< of the cells that the warps for sink and window take
};

/// Slots of a range of keys, by their number. A lane asks for ascending numbers, so it
/// walks the cells once.
struct KeySlots {
    const DecodeBlock& b;
    const KeyRange range;
    int at;            ///< the lane's cell, among those that are taken
    int first_at_hand; ///< the first cell of DecodeLayout::extents, among them

    __device__ __forceinline__ KeySlots(const DecodeBlock& b, KeyRange range)
            : b(b), range(range), at(before().x), first_at_hand(0) {}

    /// Whether these are the range. The compiler knows that they are not where no warps are
    /// for them.
    __device__ __forceinline__ bool others() const {
        return b.window_warps && range == KeyRange::others;
    }
    /// Numbers of keys that there are.
    __device__ __forceinline__ int count() const {
        return range == KeyRange::dense ? b.s.step.dense : ends().y - before().y;
    }

    /// Goes to the cells of the block's keys, the first of which is `begin`, before it is
    /// asked for any. By all that choose.
    __device__ __forceinline__ void go_to(int begin) {
        int before = 0; // cells that begin at or before it
#pragma unroll 1
        for (int i0 = 0; i0 < ends().x; i0 += 32) {
            const int i = i0 + b.lane;
            before += __popc(__ballot_sync(
                    0xffffffffu, i < ends().x && b.taken()[i].y <= begin));
            if (before < i0 + 32) {
                break;
            }
        }
        at = first_at_hand = before - 1;
        const int n = min(kCellsAtHand, ends().x - first_at_hand);
#pragma unroll 1
        for (int i = threadIdx.x; i < n * kExtentsAtHand; i += kThreads) {
            const int cell = b.taken()[first_at_hand + i / kExtentsAtHand].x;
            extents()[i] = __ldcg(
                    b.s.list.extents + int64_t(cell) * kExtents + i % kExtentsAtHand);
        }
        sync_choosers();
    }

    /// -1: there is no such key.
    __device__ __forceinline__ int operator()(int i) {
        const DecodeStep& step = b.s.step;
        if (range == KeyRange::dense) {
            return i >= step.dense ? -1
                    : i < step.sinks ? i
                                     : step.window_begin + i - step.sinks;
        }
        i += before().y;
        if (i >= ends().y) {
            return -1;
        }
        if (i == b.s.leaving_at[others()]) { // it may not be listed yet
            return step.leaving;
        }
        while (at + 1 < ends().x && b.taken()[at + 1].y <= i) {
            at++;
        }
        const int2 cell = b.taken()[at];
        const auto entry = static_cast<uint32_t>(i - cell.y);
        const int e = extent_of(entry), near = at - first_at_hand;
        const uint32_t extent =
                e < kExtentsAtHand && near < kCellsAtHand && !others()
                ? extents()[near * kExtentsAtHand + e]
                : __ldcg(b.s.list.extents + int64_t(cell.x) * kExtents + e);
        return __ldcg(b.s.list.slots + extent + (entry - extent_begin(e)));
    }

   private:
    /// Cells and keys before the range, and with it. What other warps write is not read, as
    /// it would be by a choice between two places.
    __device__ __forceinline__ int2 before() const {
        return b.window_warps ? b.s.choice.taken[others()][CellChoice::kBefore]
                              : make_int2(0, 0);
    }
    __device__ __forceinline__ int2 ends() const {
        return b.s.choice.taken[others()][CellChoice::kWith];
    }
    __device__ __forceinline__ uint32_t* extents() const {
        return reinterpret_cast<uint32_t*>(b.shared + b.layout.extents);
    }
};

} // namespace

} // namespace faiss_saap::gpu
