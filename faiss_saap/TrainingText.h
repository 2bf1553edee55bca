/// One text's keys and queries of a KV head, and the targets of its queries.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/rope.h>

namespace faiss_saap {

/// Queries of some tokens, all heads of the group, with their targets.
/// Matrices have the rows of a head one after the other.
struct TargetBatch {
    std::vector<float> x;         ///< pre-RoPE queries, size group * n * d
    std::vector<float> mass;      ///< size group * n * ncell
    std::vector<float> total;     ///< size group * n
    std::vector<float> log_count; ///< size n * ncell
    std::vector<int64_t> far;     ///< far keys, size n

    /// scratch
    std::vector<float> rotated, scores;
    std::vector<int64_t> counts;
};

struct TrainingText {
    std::string name;
    int64_t tokens = 0;
    int d = 0, group = 0;
    int64_t sink = 0, window = 0;
    std::vector<float> keys_pre, keys_post; ///< size tokens * d
    std::vector<float> queries;   ///< pre-RoPE, size tokens * group * d
    std::vector<int32_t> cells;   ///< of each key, size tokens
    int64_t begin = 0, end = 0;   ///< tokens whose queries are asked

    /// @throws faiss::FaissException when no token has a far key
    TrainingText(
            const Trace& trace,
            int layer,
            int kv_head,
            int64_t sink,
            int64_t window);

    void assign_cells(const CellAssigner& key);

    /// @param at  tokens, ascending, from begin .. end - 1; size n
    void targets(
            const RotaryEmbedding& rotary,
            float scale,
            int ncell,
            int64_t n,
            const int64_t* at,
            TargetBatch& batch) const;
};

} // namespace faiss_saap
