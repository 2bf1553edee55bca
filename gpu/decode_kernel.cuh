/// The kernel of decode(): a step of all rows.
///
/// A cluster of blocks has a row: a KV head of one sequence. Each block scores its share
/// of the cells, and all tell each other what they found. So each block takes the same cells
/// and attends to its share of the keys; sink and window are read while the blocks wait
/// for each other. At the end they exchange their results.
#pragma once

#include "decode_begin.cuh"
#include "decode_cells.cuh"
#include "decode_keys.cuh"
#include "decode_results.cuh"
#include "launch.h"

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
            min(b.warp, b.layout.tile_warps - 1) * 2 * kTileBytes;
    stream.values = stream.keys + kTileBytes;
    stream.kv = &b.s.view;
    stream.scale = b.p.scale * kLog2E;
    return stream;
}

/// Attends to the block's share of sink and window, which are on their way while the
/// blocks tell each other what they have found, and then to its share of the cells that
/// are taken.
template <class T, int D>
__device__ __forceinline__ void attend_to_row(
        DecodeBlock& b,
        TileStream<T, D>& stream) {
    const int tile_warps = b.layout.tile_warps;
    bool bad_page = false;
    // One loop, as little code as can be: it comes from memory.
#pragma unroll 1
    for (int far = 0; far < 2; far++) {
        if (far) {
            take_cells_of_row(b);
        }
        KeySlots slots(b, far);
        const TileRange mine = tiles_of_block(b, slots.count());
        const int tile = b.warp < tile_warps ? mine.begin + b.warp : mine.end;
        if (far && mine.begin < mine.end) {
            slots.go_to(mine.begin * kStreamKeys);
        }
        if (tile < mine.end) {
            const int key = tile * kStreamKeys + b.lane % kStreamKeys;
            const int slot = slots(key);
            const bool more = tile + tile_warps < mine.end;
            bad_page |= stream.start(
                    slot, more ? slots(key + tile_warps * kStreamKeys) : -1);
        }
        if (!far) {
            tell_cells(b);
            if (b.p.appends && b.s.step.refused == Fault::none) {
                check_new_keys(b, b.s.step.length - 1);
            }
            stream.clear();
            stream.load_queries(shared_address(b.shared) + b.layout.queries);
        }
        bad_page |= stream.attend(tile, mine.end, tile_warps, slots);
        if (!far && b.p.out.stats && b.warp < tile_warps) {
            keep_dense_sums(b, stream);
        }
    }
    stream.end();
    if (bad_page && b.refused() == Fault::none) { // else raise_faults() says why
        raise(b.p.flag, Fault::attend_page, b.s.row.item);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
        decode_kernel(const __grid_constant__ DecodeArguments arguments) {
    let_next_begin();
    __shared__ DecodeShared fixed;
    extern __shared__ __align__(16) char shared[];
    DecodeBlock block(arguments.params, arguments.layout, fixed, shared);
    // While the kernels before still run: what no step changes, and hints.
    const EarlyState early = read_row<T, D>(block);
    send_for_weights(block, early);
    clear_padding<D>(block);
    prefetch_keys<T, D>(block, early);
    block.exchange.await_begin();
    wait_for_previous();

    begin_step<T, D>(block);
    // Before the first keys are sent for: sending takes longer than they do.
    score_cells<D>(block);
    auto stream = begin_stream<T, D>(block);
    attend_to_row(block, stream);
    keep_results(block, stream);
    end_row<T, D>(block);
    raise_faults(block);
}

} // namespace

} // namespace faiss_saap::gpu
