/// Four bits for each component of a key: enough to rank keys before any of
/// them is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <vector>

namespace faiss_saap {

/// Codes of the keys of consecutive slots, for one sequence and one KV head.
///
/// A 4-bit scalar quantizer with groups of 32 components: a block is coded as
/// base + step * n, n = 0 .. 15; base and step (bfloat16) are the block's own,
/// so that a channel of large components coarsens only its block. Queries stay
/// as they are (asymmetric distances). In Faiss's words the codes are those of a
/// first index and the cache refines it (IndexRefine, its k_factor is
/// ProbePolicy::refine). Nothing is learnt: a code depends on its key alone,
/// and keys appended in bulk, one by one or again after `truncate` have the same
/// ones. A key of d components takes 20 bytes for every 32 of them, rounded
/// up: a sixth of a 16-bit key and value.
///
/// A copy shares all that both have until one of them changes it.
///
/// Not synchronised: changing codes, or copying or destroying any that share
/// memory, needs exclusive access to them.
class KeyCodes {
   public:
    /// @param d           components of a key
    /// @param first_slot  the first slot that will be appended
    KeyCodes(int d, int64_t first_slot);

    /// Bytes of the code of one key.
    static size_t code_size(int d);

    /// Appends the key of the next slot.
    /// @param key  size d, its squared norm finite
    void append(const float* key);
    /// Drops the newest slots until `size` are left, at most those there are.
    void truncate(int64_t size);
    /// Fills empty codes, as from a file.
    /// @param n      number of slots
    /// @param codes  size n * code_size(d), slot after slot
    /// @throws faiss::FaissException when there are codes already, n is
    ///         negative, or a base or step is not finite
    void restore(int64_t n, const uint8_t* codes);

    /// Number of slots coded.
    int64_t size() const {
        return size_;
    }
    /// Code of a coded slot, size code_size(d).
    const uint8_t* code(int64_t slot) const {
        const int64_t i = slot - first_slot_;
        return chunks_[i / kChunk]->data() + i % kChunk * code_size_;
    }
    /// The key that the code of a coded slot stands for.
    /// @param key  output, size d
    void decode(int64_t slot, float* key) const;

    /// Those of some slots whose coded keys have the most attention: for
    /// several queries their masses among these slots are summed, as
    /// `share_scores` does for cells.
    /// @param nq       queries, at least 1
    /// @param queries  size nq * d
    /// @param scale    multiplies q.k; positive
    /// @param slots    size n, each once
    /// @param limit    slots wanted; n or more: all
    /// @return  min(n, limit) of them, ascending; of equals the lower ones
    std::vector<int32_t> best(
            int nq,
            const float* queries,
            float scale,
            const std::vector<int32_t>& slots,
            int64_t limit) const;

    /// Bytes held.
    /// @param counted  parts shared with copies are counted unless they are in
    ///                 here, and are put in; null: all are counted
    size_t bytes_used(std::unordered_set<const void*>* counted = nullptr) const;

   private:
    /// Keys that are allocated, and copied after a fork, together.
    static constexpr int64_t kChunk = 128;
    using Chunk = std::vector<uint8_t>;

    Chunk& chunk_for_next();

    int d_;
    int64_t first_slot_;
    size_t code_size_;
    int64_t size_ = 0;
    std::vector<std::shared_ptr<Chunk>> chunks_;
};

} // namespace faiss_saap
