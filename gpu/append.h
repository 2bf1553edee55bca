/// Tokens join the lists of a batch's sequences.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

/// Tokens of an item up to which an append is one launch.
constexpr int kFewTokens = 32;

struct AppendParams {
    BatchItem* items = nullptr;
    int nitem = 0;
    const BatchList* lists = nullptr;
    int nlist = 0;
    /// Of few tokens: (score, cell) of each leaving one's best cell so far, size
    /// nlist * most_tokens; 0 before and after
    unsigned long long* best = nullptr;
    /// Of many: room for what append_centroids() and append_counts() say
    __nv_bfloat16* centroids = nullptr;
    int32_t* counts = nullptr;
    int keys_are_bf16 = 0; ///< as they are multiplied, in all lists
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

/// The same for any number of tokens, made for many: a launch for each of these
/// steps and those of listing. Scores are products on tensor cores, within 2^-16
/// |key| |centroid| of float32's: a key that is nearer to two cells than that may
/// lie in either.
cudaError_t append_many(const AppendParams& params, cudaStream_t stream);

/// Elements that AppendParams::centroids and counts need.
int64_t append_centroids(int nlist, int most_cells, int d);
int64_t append_counts(int nlist, int64_t most_tokens, int most_cells);

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
