/// What each row of a batch reads, decided before its keys are gathered. A row is
/// a token and a KV head, or a token and a query head.
#pragma once

#include <cstdint>

namespace faiss_saap::gpu {

/// A probed cell of a row, and which of the row's far keys it holds.
struct RowCell {
    int list = 0; ///< in BatchRow's lists
    int cell = 0;
    int begin = 0, end = 0; ///< of the row's far keys
};

struct RowPlan {
    int sinks = 0, window_begin = 0; ///< slots [0, sinks), then window_begin on
    int dense = 0;    ///< keys of sink and window that are read
    int keys = 0;     ///< far keys, twice where cells of two partitions share them
    int cells = 0;    ///< distinct ones
    int far = 0;      ///< far keys that there are
    int dropped = 0;  ///< keys that another partition's cell had read
    int tiles_done = 0;
};

constexpr int kTile = 32; ///< keys that a warp takes at a time

#ifdef __CUDACC__
/// Of sink and window.
__device__ inline int dense_tiles(const RowPlan& plan) {
    return (plan.dense + kTile - 1) / kTile;
}
/// One even without a key, so that some block writes the result.
__device__ inline int far_tiles(const RowPlan& plan) {
    return max(1, (plan.keys + kTile - 1) / kTile);
}
#endif

/// Of all rows of a batch.
struct RowWork {
    RowPlan* plans = nullptr; ///< null: nobody reads the work
    int64_t stride = 0;       ///< cells of a KV head's partitions at most
    RowCell* cells = nullptr; ///< rows * stride
    /// a bit for each probed cell of a row with several partitions, size
    /// rows * probed_words
    uint32_t* probed = nullptr;
    int64_t probed_words = 0;
};

} // namespace faiss_saap::gpu
