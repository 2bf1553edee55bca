/// Which cells the queries of a batch probe.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "row_work.h"
#include "sequence_state.h"

namespace faiss_saap::gpu {

constexpr int kMaxGroup = 16;
constexpr int kMaxPartitions = 16; ///< of a KV head
/// Cells of a partition: what selection sorts in shared memory.
constexpr int kMaxCells = 8192;

struct RouteParams {
    const BatchItem* items = nullptr;
    const BatchList* lists = nullptr;
    int nlist = 0;
    const BatchRow* rows = nullptr;
    int nrow = 0;
    int most_q_len = 0, most_cells = 0;
    int most_cols = 0; ///< floats per query head that scoring keeps at hand
    int heads_q = 0, heads_kv = 0, d = 0;
    int64_t sink = 0, window = 0, position_offset = 0, dense_below = 0;
    float scale = 1;
    int attend_dense = 1;
    const void* queries = nullptr; ///< tokens * heads_q * d, as the cache's type
    float* hidden = nullptr;       ///< see BatchList::hidden
    float* scores = nullptr;       ///< see BatchList::scores
    // policy
    int share_group = 1, nprobe = 0;
    int64_t max_keys = 0;
    double max_selectivity = 1;
    int nsplit = 0; ///< 0: equal shares for a head's partitions
    double split[kMaxPartitions] = {};
    // result: nrow * (share_group ? 1 : group) rows
    int64_t stride = 0;       ///< room for the cells of a row
    int32_t* cells = nullptr; ///< rows * stride
    int32_t* count = nullptr; ///< rows
    RowWork work;             ///< for an attend that follows
    FaultFlag* flag = nullptr;
};

/// Scores all cells for all query heads, and takes cells for each row.
/// @param any_network  some assigner has hidden layers
cudaError_t route(const RouteParams& params, bool any_network, cudaStream_t stream);

} // namespace faiss_saap::gpu
