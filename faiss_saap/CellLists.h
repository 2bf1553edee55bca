/// The index over one sequence: which tokens lie in which cell.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_set>
#include <vector>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/SlotPool.h>

namespace faiss_saap {

/// Lists of token slots per cell, for one sequence, one KV head and one
/// partition. Keys and values stay in the caller's cache: an entry is 4 bytes,
/// plus 2 for the cell of each slot. Slots are appended in increasing order, so
/// each list is sorted. Appending is O(1): memory comes in blocks, and nothing
/// is ever moved.
///
/// A copy shares all that both have until one of them changes it (statistics
/// are copied): that is how sequences fork.
///
/// Not synchronised: changing lists, or copying or destroying any that share a
/// pool, needs exclusive access to that pool.
class CellLists {
   public:
    /// @param first_slot  the first slot that will be appended
    /// @param with_means  keep the mean key of each cell (for assigners that
    ///                    need statistics)
    /// @param pool        where the lists grow; null: one of their own
    /// @param with_newest_keys  keep a copy of the newest key of each cell (for
    ///                    assigners with NEEDS_NEWEST_KEYS)
    CellLists(
            int ncell,
            int d,
            int64_t first_slot,
            bool with_means,
            std::shared_ptr<SlotPool> pool = nullptr,
            bool with_newest_keys = false);
    CellLists(const CellLists& other);
    CellLists(CellLists&& other) noexcept;
    CellLists& operator=(CellLists other) noexcept;
    ~CellLists();

    /// Appends the next slot.
    /// @param post_rope  its key, size d; may be null without means and newest
    ///                   keys
    /// @param position   of its token: that of the slot before plus one
    void append(int32_t cell, const float* post_rope, int64_t position);

    /// Drops the newest slots until `size` are left; the state, means and newest
    /// keys included, is as if they had never been appended.
    /// @param read_key  reads the key of a slot, size d; may be empty without
    ///                  means and newest keys
    void truncate(
            int64_t size,
            const std::function<void(int64_t slot, float* key)>& read_key);

    /// Fills empty lists with slots whose cells are known, as from a file.
    /// @param n         number of slots
    /// @param cells     size n
    /// @param position  of the first one; the others follow
    /// @param means     size ncell * d; null without means
    /// @param newest_keys  size ncell * d; null without newest keys
    void restore(
            int64_t n,
            const uint16_t* cells,
            int64_t position,
            const float* means,
            const float* newest_keys = nullptr);

    int ncell() const {
        return static_cast<int>(tail_.size());
    }
    /// Number of slots listed.
    int64_t size() const {
        return size_;
    }
    bool with_means() const {
        return with_means_;
    }
    bool with_newest_keys() const {
        return with_newest_keys_;
    }
    /// Slots of a cell, ascending.
    std::vector<int32_t> slots(int cell) const;
    /// The first n slots of a cell, ascending.
    /// @param n    at most the cell's count
    /// @param out  size n
    void copy_slots(int cell, int64_t n, int32_t* out) const;
    /// Sets bit slot - first_slot of each slot below `end` of some cells.
    /// @param bits  size (end - first_slot) / 64, rounded up
    /// @returns how many slots that are
    int64_t mark_slots(
            const std::vector<int32_t>& cells,
            int64_t end,
            uint64_t* bits) const;
    /// Cell of a listed slot.
    int cell_of(int64_t slot) const {
        const int64_t i = slot - first_slot_;
        return (*cells_[i / kChunk])[i % kChunk];
    }
    /// Number of slots of a cell below `end`.
    int64_t count_before(int cell, int64_t end) const;
    /// Statistics; means and newest keys are null where they are not kept.
    CellStats stats() const;
    /// Bytes held apart from the pool's.
    /// @param counted  parts shared with copies are counted unless they are in
    ///                 here, and are put in; null: all are counted
    size_t bytes_used(std::unordered_set<const void*>* counted = nullptr) const;
    const std::shared_ptr<SlotPool>& pool() const {
        return pool_;
    }

   private:
    static constexpr int64_t kChunk = 4096;
    using Chunk = std::array<uint16_t, kChunk>;

    void push(int32_t cell, int64_t position);
    void pop(int32_t cell);
    int32_t newest_slot(int32_t cell) const; ///< of a cell that is not empty
    void add_to_mean(int32_t count, const float* key, float* mean) const;
    bool reads_keys() const {
        return with_means_ || with_newest_keys_;
    }

    int d_;
    int64_t first_slot_;
    bool with_means_, with_newest_keys_;
    int64_t size_ = 0, first_position_ = 0;
    std::shared_ptr<SlotPool> pool_;
    std::vector<uint32_t> tail_; ///< newest block of each cell
    std::vector<std::shared_ptr<Chunk>> cells_; ///< cell of each slot
    std::vector<int32_t> count_;
    std::vector<float> mean_;
    std::vector<int64_t> newest_;
    std::vector<float> newest_key_;
};

} // namespace faiss_saap
