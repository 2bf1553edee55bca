/// Where the attention of drawn tokens lies, for all KV heads of a layer at once.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

/// One text of one KV head. The arrays may lie in pinned host memory.
struct DeviceText {
    int tokens = 0;
    /// Rotated keys as split rows (split_products.h), those of a cell one after the
    /// other and in the order of the text
    const __nv_bfloat16* keys = nullptr;
    const int32_t* position = nullptr; ///< of these, size tokens
    const int32_t* cell = nullptr;     ///< likewise
    /// Shares of about as many keys each: the first cell and its first key, and
    /// those of the end, size nsplit + 1
    const int2* share = nullptr;
    const float* queries = nullptr;    ///< pre-RoPE, size tokens * group * d
};

/// A mini-batch, for each KV head of its own tokens. Matrices have a row for each
/// KV head, query head of its group and token, in this order.
struct TargetParams {
    int nhead = 0; ///< KV heads
    int group = 0, d = 0, ncell = 0;
    int batch = 0;             ///< tokens
    int nmember = 0;           ///< parts that tokens come in
    const int* first = nullptr; ///< of each part, size nmember + 1
    int most = 0;              ///< tokens of a part
    const DeviceText* texts = nullptr; ///< size nhead * ntext
    int ntext = 0;
    const int32_t* text = nullptr;  ///< of each part, size nhead * nmember
    const int32_t* token = nullptr; ///< size nhead * batch
    DeviceRotary rotary;
    float magnitude = 1; ///< of rotated queries
    float scale = 1;
    int64_t sink = 0, window = 0;
    const float* mean = nullptr;   ///< of queries, size nhead * group * d
    const float* factor = nullptr; ///< 1 / deviation, likewise
    int nsplit = 1; ///< shares of a text's keys, each a block's

    float* x = nullptr;         ///< output: queries standardised, rows of d
    float* mass = nullptr;      ///< output: rows of ncell
    float* log_count = nullptr; ///< output: a row of ncell for each token, of
                                ///< -infinity where a cell has no far keys
    float2* part = nullptr;     ///< scratch, nsplit for each row
};

/// Attention weights, summed per cell over the far keys of each query. Tiles of
/// keys pass twice, for the sum of all weights and for those of the cells; nothing
/// is added up in an order that may change.
cudaError_t attention_targets(const TargetParams& params, cudaStream_t stream);

/// Rows of a text's keys, sorted and split.
struct SortKeysParams {
    int n = 0, d = 0;
    const float* keys = nullptr;    ///< size n * d, as the text has them
    const int32_t* order = nullptr; ///< the key that comes i-th, size n
    __nv_bfloat16* to = nullptr;
};

cudaError_t sort_keys(const SortKeysParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
