/// Tokens join the lists of a batch's sequences.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

struct AppendParams {
    BatchItem* items = nullptr;
    int nitem = 0;
    const BatchList* lists = nullptr;
    int nlist = 0;
    /// (score, cell) of each leaving token's best cell so far, size
    /// nlist * most_tokens; 0 before and after an append of few tokens
    unsigned long long* best = nullptr;
    int most_tokens = 0; ///< of an item
    int most_cells = 0;  ///< of a list
    int heads_kv = 0, d = 0;
    int64_t sink = 0, window = 0, position_offset = 0;
    int keeps_means = 0; ///< some list does
    FaultFlag* flag = nullptr;
};

/// Appends q_len tokens to each sequence: check, assign, list, update the means.
/// An item whose keys are not finite, or that does not fit its capacity or its
/// view, changes nothing and raises the flag.
cudaError_t append(const AppendParams& params, cudaStream_t stream);

struct TruncateParams {
    SequenceState* sequence = nullptr;
    int nlist = 0;
    int64_t length = 0; ///< what is left
    int64_t sink = 0, window = 0;
    int d = 0;
    uint32_t slack = 0; ///< idle entries that an arena has room for
    DeviceView kv;
};

/// Drops the newest tokens of one sequence.
cudaError_t truncate(const TruncateParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
