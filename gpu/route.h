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
constexpr int kMaxTeam = 16;    ///< blocks of a team
constexpr int kMaxTeamRows = 8; ///< rows of a team

struct RouteParams {
    const BatchItem* items = nullptr;
    const BatchList* lists = nullptr;
    const BatchRow* rows = nullptr;
    const RowTeam* teams = nullptr;
    const int32_t* team_rows = nullptr;
    int nteam = 0, team_blocks = 1;
    int most_team_rows = 1;
    int most_cells = 0; ///< of a partition
    /// floats per query head that scoring keeps at hand: of what rows are
    /// multiplied with first, of vectors after RoPE, of hidden layers
    int most_cols = 0, most_post = 0, most_width = 0;
    size_t room = 0; ///< route_room()
    int staged = 0; ///< scores of a row that selection keeps at hand; by route()
    int heads_q = 0, heads_kv = 0, d = 0;
    int64_t sink = 0, window = 0, position_offset = 0, dense_below = 0;
    float scale = 1;
    int attend_dense = 1;
    const void* queries = nullptr; ///< tokens * heads_q * d, as the cache's type
    int bf16 = 0;                  ///< else float16
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

/// Blocks that a team can have on this device: 1 where it has no clusters.
int most_team_blocks();

/// Shared memory that a block may have on this device, and what route() needs at
/// least, beside what is static: parameters as in RouteParams.
size_t route_room();
size_t route_needs(const RouteParams& params);
/// Rows that a team may have: what it keeps of them must fit, too.
int most_team_rows(const RouteParams& params);

/// Scores all cells for all query heads, and takes cells for each row: one
/// launch.
cudaError_t route(RouteParams params, cudaStream_t stream);

} // namespace faiss_saap::gpu
