/// Attention of a batch's queries over sink, window and the far keys of cells.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include <faiss_saap/AttentionAdapter.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

/// A probed cell of a row, and which of the row's far keys it holds.
struct RowCell {
    int list = 0; ///< in BatchRow's lists
    int cell = 0;
    int begin = 0, end = 0; ///< of the row's far keys
};

struct AttendParams {
    const BatchItem* items = nullptr;
    const BatchList* lists = nullptr;
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
    int64_t row_stride = 0;       ///< cells of a KV head's partitions at most
    RowCell* row_cells = nullptr; ///< rows * row_stride
    int32_t* row_cell_count = nullptr; ///< distinct ones
    int32_t* row_keys = nullptr;  ///< far keys, twice where cells share them
    int32_t* row_twice = nullptr; ///< far keys that were dropped
    uint32_t* probed = nullptr;   ///< a bit per cell of the row
    int64_t probed_words = 0;     ///< of each row
    int splits = 1;               ///< pieces of each row
    float* part = nullptr;     ///< normalised, rows * splits * nq * d
    float* part_lse = nullptr; ///< rows * splits * nq
    float* part_dense = nullptr; ///< LSE of sink and window alone, likewise
    AttendOutput out;
    FaultFlag* flag = nullptr;
};

/// Pieces of each row, so that all processors are busy.
int attend_splits(int processors, int64_t rows);

/// @return cudaErrorInvalidValue for a head dimension without a kernel (there
///         are 64, 96, 128 and 256)
cudaError_t attend(const AttendParams& params, cudaStream_t stream);

/// The middle stage for one head dimension.
template <class T, int D>
cudaError_t gather_attend(const AttendParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
