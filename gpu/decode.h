/// A decode step in one launch: a token of each sequence is routed, attends and, where
/// it is new, is appended.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/host_device.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

/// Blocks that decode() is launched with.
struct DecodeGrid {
    int row_blocks = 0; ///< of each row; 0: other kernels are needed (route.h, attend.h)
    int dense = 0;      ///< by the kernel for keys in sink and window alone (dense_rows.cuh)
    int seekers = 0;    ///< clusters that find cells for later steps (seek_ahead.cuh)
    int visits = 1;     ///< of a sequence for its next eight keys: 1, 2, 4, or 8, of which 7 do
    int pairs = 0;      ///< rows, of one block each, are clusters of two that share weights

    /// n rows as they are numbered: the last pair may have one.
    FAISS_SAAP_HOST_DEVICE int numbered(int n) const {
        return pairs ? (n + 1) / 2 * 2 : n;
    }
};

struct DecodeParams {
    BatchItem* items = nullptr;
    const DecodeRow* rows = nullptr;
    int nrow = 0;
    DecodeGrid grid; ///< decode_grid()
    int64_t bytes = 0;  ///< of keys and values that all rows read, about
    int64_t most_keys = 0; ///< of the longest cache view
    int all_near = 0;      ///< sink and window have all of them
    int most_cells = 0; ///< of a partition
    int most_cell_bytes = 0; ///< of a cell's vector that keys are compared with
    /// floats per query head: of what rows are multiplied with first, of hidden layers
    int most_cols = 0, most_width = 0;
    /// Rows that can come in pairs: the same KV head of two sequences, which have the same
    /// partition there, with one network for all heads of the group. With DecodeGrid::pairs they
    /// are the first ones, two by two.
    int paired = 0;
    int heads_q = 0, heads_kv = 0, d = 0;
    int64_t sink = 0, window = 0, position_offset = 0, dense_below = 0;
    float scale = 1;
    int attend_dense = 1;
    const void* queries = nullptr; ///< rows / heads_kv * heads_q * d, as the cache's type
    int bf16 = 0;                  ///< else float16
    /// Each sequence is appended a token first (append_one.cuh), which its only query
    /// sees.
    int appends = 0;
    // policy
    int nprobe = 0;
    int64_t max_keys = 0;
    double max_selectivity = 1;
    double share = 1; ///< of the budget for the head's only partition
    AttendOutput out;
    FaultFlag* flag = nullptr;
    // Of DecodeGrid::dense: normalised results of each row's blocks, group * d, and
    // logarithms to the base 2 of their sums; and how many there are, 0 before and after.
    float* pieces = nullptr;
    float* piece_lse = nullptr;
    int32_t* row_done = nullptr;
};

/// DecodeParams::grid for decode() with these parameters, whatever the policy. Without
/// blocks where this device, this head dimension, groups so large or what rows would keep in
/// shared memory need the other kernels.
DecodeGrid decode_grid(const DecodeParams& params);

/// Makes DecodeParams::rows of what the device knows of a batch.
/// @param order  which row comes there, size n; null: as they are
cudaError_t describe_rows(
        int n,
        const BatchRow* rows,
        const BatchItem* items,
        const int32_t* order,
        DecodeRow* to,
        cudaStream_t stream);

/// Attends for the one token of each sequence. KV heads have one partition each, whose
/// query assigner reads no means and no newest keys, and cells are chosen for groups.
cudaError_t decode(const DecodeParams& params, cudaStream_t stream);

/// decode() and decode_grid() for one type and head dimension.
template <class T, int D>
cudaError_t decode_rows(const DecodeParams& params, cudaStream_t stream);
template <class T, int D>
DecodeGrid decode_row_grid(const DecodeParams& params);

} // namespace faiss_saap::gpu
