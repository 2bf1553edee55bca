/// The kernel of decode(): a step of all rows.
///
/// A cluster of blocks has a row: a KV head of one sequence. Each block scores its share
/// of the cells, and all tell each other what they found. So each block takes the same cells
/// and attends to its share of the keys. Warps of their own attend to sink and window
/// meanwhile, and then choose the last few cells while the others go on with the first; or,
/// where rows are many, all warps do that before or after all else. At the end the blocks
/// exchange their results.
/// Beside the rows' blocks there may be some that find cells for later steps.
#pragma once

#include "decode_begin.cuh"
#include "decode_cells.cuh"
#include "decode_keys.cuh"
#include "decode_results.cuh"
#include "find_cells.cuh"
#include "launch.h"
#include "seek_ahead.cuh"

namespace faiss_saap::gpu {

namespace {

struct DecodeArguments {
    DecodeParams params;
    DecodeLayout layout;
};

/// A warp's attention to nothing yet.
template <class T, int D>
__device__ __forceinline__ TileStream<T, D> begin_stream(const DecodeBlock& b) {
    using Stream = TileStream<T, D>;
    constexpr int kTileBytes = Stream::kTile * int(sizeof(T));
    Stream stream;
    stream.keys = shared_address(b.shared) + b.layout.tiles +
            max(b.place(), 0) * 2 * kTileBytes;
    stream.values = stream.keys + kTileBytes;
    stream.kv = &b.s.view;
    stream.scale = b.p.scale * kLog2E;
    return stream;
}

/// A warp's share of a row's keys, in tiles.
struct WarpTiles {
    int first, end, step;

    /// @param warp, warps  this one of so many that share the block's
    __device__ __forceinline__ WarpTiles(const TileRange& block, int warp, int warps)
            : first(warp < warps ? block.begin + warp : block.end),
              end(block.end),
              step(warps) {}
};

/// Sends for the first of a warp's tiles.
/// @return a page that was not there
template <class T, int D>
__device__ __forceinline__ bool start(
        TileStream<T, D>& stream,
        const WarpTiles& tiles,
        KeySlots& slots) {
    if (tiles.first >= tiles.end) {
        return false;
    }
    const int key = tiles.first * kStreamKeys + threadIdx.x % kStreamKeys;
    const int slot = slots(key);
    const bool more = tiles.first + tiles.step < tiles.end;
    return stream.start(slot, more ? slots(key + tiles.step * kStreamKeys) : -1);
}

/// Attends to the block's share of a range of keys, where all warps choose cells.
/// @param warps  that attend
template <class T, int D>
__device__ __forceinline__ void attend_to_range(
        DecodeBlock& b,
        KeyRange range,
        int warps) {
    const bool far = range == KeyRange::far;
    auto stream = begin_stream<T, D>(b);
    KeySlots slots(b, range);
    const TileRange mine = tiles_of_block(b, slots.count());
    const WarpTiles tiles(mine, b.warp, warps);
    if (far && mine.begin < mine.end) {
        slots.go_to(mine.begin * kStreamKeys);
    }
    bool bad_page = start(stream, tiles, slots);
    stream.clear();
    stream.load_queries(shared_address(b.shared) + b.layout.queries);
    bad_page |= stream.attend(tiles.first, tiles.end, tiles.step, slots);
    if (!far && b.p.out.stats && b.place() >= 0) {
        keep_dense_sums(b, stream);
    }
    stream.end();
    if (bad_page) {
        atomicOr(&b.s.bad_page, 1);
    }
    keep_results(b, stream);
}

/// Where all warps choose cells and attend: to the block's share of the cells' keys, and
/// before or after that to its share of sink and window.
template <class T, int D>
__device__ __forceinline__ void choose_and_attend(DecodeBlock& b) {
    const bool window_first = b.window_first();
    if (window_first) { // not in the loop below, where registers would not do
        attend_to_range<T, D>(b, KeyRange::dense, b.layout.early_warps);
        keep_first_turn<T, D>(b);
    }
    score_cells<D>(b);
    tell_cells(b);
    if (b.p.appends && b.s.step.refused == Fault::none) {
        check_new_keys(
                b.p, b.s.kv, b.s.step.length - 1, b.warp, kWarps, &b.s.refused_by);
    }
    take_cells_of_row(b);
    // One loop, as little code as can be: it comes from memory.
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const bool early = !window_first && turn == 0;
        attend_to_range<T, D>(
                b,
                turn ? KeyRange::dense : KeyRange::far,
                early ? b.layout.middle_warps : b.layout.tile_warps);
        if (window_first || turn) {
            break;
        }
        keep_first_turn<T, D>(b);
    }
}

/// Attends to the block's share of a range of keys; to the others after sink and window,
/// by the same warps. Not inlined: the code is there once, and what is around it does not
/// change how well it is compiled.
template <class T, int D>
static __device__ __noinline__ void attend_to_keys(
        const DecodeParams& p,
        const DecodeLayout& layout,
        DecodeShared& s,
        char* shared,
        KeyRange range) {
    const DecodeBlock b(p, layout, s, shared, kWindowWarps);
    auto stream = begin_stream<T, D>(b);
    KeySlots slots(b, range);
    const bool far = range == KeyRange::far;
    const TileRange mine = tiles_of_block(b, slots.count());
    const WarpTiles tiles(
            mine, far ? b.warp : b.warp - kWarps, far ? layout.tile_warps : kWindowWarps);
    stream.clear();
    if (range == KeyRange::others) {
        take_up_results(b, stream);
    }
    if (far && mine.begin < mine.end) {
        slots.go_to(mine.begin * kStreamKeys);
    }
    bool bad_page = start(stream, tiles, slots);
    stream.load_queries(shared_address(shared) + layout.queries);
    bad_page |= stream.attend(tiles.first, tiles.end, tiles.step, slots);
    if (p.out.stats && b.place() >= 0) {
        if (far) {
            no_dense_sums(b);
        } else if (range == KeyRange::dense) {
            keep_dense_sums(b, stream);
        }
    }
    stream.end();
    if (bad_page) {
        atomicOr(&s.bad_page, 1);
    }
    keep_results(b, stream);
}

/// @tparam WindowWarps  kWindowWarps, for blocks that are alone on a processor; or 0
/// @tparam Seekers      whether blocks beside the rows' ones find cells for later steps, instead
///                      of warps of these; always so without WindowWarps, if there are any
template <class T, int D, int WindowWarps, bool Seekers = false>
__global__ void __launch_bounds__(kThreads + 32 * WindowWarps, WindowWarps ? 1 : 2)
        decode_kernel(const __grid_constant__ DecodeArguments arguments) {
    let_next_begin();
    __shared__ __align__(16) char fixed_bytes[sizeof(DecodeShared)]; // none is constructed
    auto& fixed = *reinterpret_cast<DecodeShared*>(fixed_bytes);
    extern __shared__ __align__(16) char shared[];
    if constexpr (Seekers || WindowWarps == 0) {
        const int first = arguments.params.grid.numbered(arguments.params.nrow);
        if (static_cast<int>(blockIdx.y) >= first) {
            seek_ahead<D>(arguments.params, shared, first);
            return;
        }
    }
    if (WindowWarps == 0 && blockIdx.y >= arguments.params.nrow) {
        wait_for_previous(); // the last pair has one row
        return;
    }
    DecodeBlock block(arguments.params, arguments.layout, fixed, shared, WindowWarps);
    block.finds_later = WindowWarps > 0 && !Seekers;
    // While the kernels before still run: what no step changes, and hints.
    const SequenceReading early = read_row<T, D>(block);
    if (block.prepares()) {
        if (WindowWarps) {
            prefetch_weights(block);
        }
        send_for_weights(block, early);
        prefetch_keys<T, D>(block, early);
    }
    if (block.chooses()) {
        prepare_step<D>(
                block.p, block.layout, fixed, shared, early, block.finds_later);
        clear_padding<D>(block);
    }
    block.exchange.await_begin();
    wait_for_previous();

    if (block.chooses()) {
        begin_step<T, D>(block, early);
    } else {
        wait_for_copies<0>(); // of biases
    }
    __syncthreads();
    if (WindowWarps == 0) {
        choose_and_attend<T, D>(block);
    } else if (block.chooses()) {
        score_cells<D>(block);
        tell_cells(block);
        take_cells_of_row(block);
        attend_to_keys<T, D>(
                arguments.params, arguments.layout, fixed, shared, KeyRange::far);
    } else {
        attend_to_keys<T, D>(
                arguments.params, arguments.layout, fixed, shared, KeyRange::dense);
        if (block.p.appends && fixed.step.refused == Fault::none) {
            check_new_keys(
                    block.p,
                    fixed.kv,
                    fixed.step.length - 1,
                    block.warp - kWarps,
                    WindowWarps,
                    &fixed.refused_by);
        }
        if (block.finds_later && fixed.step.finds_later) {
            find_cells_for_later<D>(
                    arguments.params, arguments.layout, fixed, shared);
        }
        await_choosers(32 * WindowWarps);
        if (block.finds_later && fixed.step.finds_later) {
            tell_found_later(block);
        }
        if (block.takes_cells()) {
            take_other_cells(block);
            const auto& others = fixed.choice.taken[CellChoice::kOthers];
            if (others[CellChoice::kWith].y > others[CellChoice::kBefore].y) {
                attend_to_keys<T, D>(
                        arguments.params, arguments.layout, fixed, shared, KeyRange::others);
            }
        }
    }
    __syncthreads();
    if (block.chooses()) {
        end_row<T, D>(block);
        raise_faults(block);
    }
}

} // namespace

} // namespace faiss_saap::gpu
