/// Attention of a batch's queries over sink, window and the far keys of cells.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include <faiss_saap/AttentionAdapter.h>

#include "row_work.h"
#include "sequence_state.h"

namespace faiss_saap::gpu {

struct AttendParams {
    const BatchItem* items = nullptr;
    const BatchRow* rows = nullptr;
    int nrow = 0;
    int most_cells = 0; ///< of a list
    int heads_q = 0, heads_kv = 0, d = 0;
    int64_t sink = 0, window = 0;
    float scale = 1;
    int attend_dense = 1;
    int bf16 = 0;
    const void* queries = nullptr; ///< tokens * heads_q * d, as the cache's type
    int share_group = 1;
    int64_t stride = 0;             ///< room for the cells of a row
    const int32_t* cells = nullptr; ///< rows * stride
    const int32_t* count = nullptr; ///< rows
    // between the stages
    RowWork work;
    int blocks = 0; ///< that share all tiles of the batch
    /// Normalised results of pieces, each nq * d: what a block has read of a row's
    /// sink and window, and what of its far keys. Row r and block b share pieces
    /// r + b of the first and of the second `pieces`.
    float* part = nullptr;
    float* part_lse = nullptr; ///< nq for each
    int pieces = 0;            ///< rows and blocks
    AttendOutput out;
    FaultFlag* flag = nullptr;
};

/// Makes the work of the rows from `cells` and `count`.
cudaError_t plan_rows(const AttendParams& params, cudaStream_t stream);

/// Reads what the work says.
/// @return cudaErrorInvalidValue for a head dimension without a kernel (there
///         are 64, 96, 128 and 256)
cudaError_t attend(const AttendParams& params, cudaStream_t stream);

/// attend() for one head dimension.
template <class T, int D>
cudaError_t gather_attend(const AttendParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
