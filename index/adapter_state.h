/// What an AttentionAdapter knows of a sequence.
#pragma once

#include <memory>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>

namespace faiss_saap {

struct AttentionAdapter::Sequence {
    /// A partition and where it has put the sequence's keys.
    struct Listed {
        Partition partition;
        /// null where vectors need not be rotated back
        std::shared_ptr<const RotaryEmbedding> rotary;
        CellLists lists;
    };
    std::vector<std::vector<Listed>> heads; ///< per KV head
    std::vector<KeyCodes> codes; ///< per KV head; empty where none are kept
    int64_t length = 0;
};

/// Keys or queries with the vectors that an assigner wants: pre-RoPE ones are
/// computed from post-RoPE ones.
struct RoutedVectors {
    RoutingInput input;

    /// @param n          vectors; where the assigner needs query heads, those
    ///                   of one group
    /// @param post_rope  size n * d
    RoutedVectors(
            const RotaryEmbedding* rotary,
            const CellAssigner& assigner,
            int64_t n,
            const float* post_rope,
            std::vector<int64_t> positions);
    RoutedVectors(const RoutedVectors&) = delete;
    RoutedVectors& operator=(const RoutedVectors&) = delete;

   private:
    std::vector<int64_t> position_;
    std::vector<int32_t> head_;
    std::vector<float> pre_rope_;
};

} // namespace faiss_saap
