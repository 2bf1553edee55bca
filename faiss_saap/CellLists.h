/// The index over one sequence: which tokens lie in which cell.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <faiss_saap/CellAssigner.h>

namespace faiss_saap {

/// Lists of token slots per cell, for one sequence, one KV head and one
/// partition. Keys and values stay in the caller's cache: an entry is 4 bytes,
/// plus 2 for the cell of each slot. Slots are appended in increasing order, so
/// each list is sorted.
///
/// Not synchronised: appending needs exclusive access.
class CellLists {
   public:
    /// @param first_slot  the first slot that will be appended
    /// @param with_means  keep the mean key of each cell (for assigners that
    ///                    need statistics)
    CellLists(int ncell, int d, int64_t first_slot, bool with_means);

    /// Appends the next slot.
    /// @param post_rope  its key, size d; may be null without means
    /// @param position   of its token
    void append(int32_t cell, const float* post_rope, int64_t position);

    int ncell() const {
        return static_cast<int>(slots_.size());
    }
    /// Number of slots listed.
    int64_t size() const {
        return static_cast<int64_t>(cell_of_slot_.size());
    }
    const std::vector<int32_t>& slots(int cell) const {
        return slots_[cell];
    }
    /// Cell of a listed slot.
    int cell_of(int64_t slot) const {
        return cell_of_slot_[slot - first_slot_];
    }
    /// Number of slots of a cell below `end`.
    int64_t count_before(int cell, int64_t end) const;
    /// Statistics; means are null where they are not kept.
    CellStats stats() const;
    /// Bytes held.
    size_t bytes_used() const;

   private:
    int d_;
    int64_t first_slot_;
    bool with_means_;
    std::vector<std::vector<int32_t>> slots_;
    std::vector<uint16_t> cell_of_slot_;
    std::vector<int32_t> count_;
    std::vector<float> mean_;
    std::vector<int64_t> newest_;
};

} // namespace faiss_saap
