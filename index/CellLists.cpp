#include <faiss_saap/CellLists.h>

#include <algorithm>
#include <cinttypes>

#include "check.h"

namespace faiss_saap {

CellLists::CellLists(int ncell, int d, int64_t first_slot, bool with_means)
        : d_(d),
          first_slot_(first_slot),
          with_means_(with_means),
          slots_(ncell),
          count_(ncell, 0),
          mean_(with_means ? size_t(ncell) * d : 0, 0.0f),
          newest_(ncell, -1) {
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            ncell);
    FAISS_THROW_IF_NOT_FMT(
            first_slot >= 0 && first_slot <= INT32_MAX,
            "first_slot = %" PRId64 " must be between 0 and 2^31 - 1",
            first_slot);
}

void CellLists::append(int32_t cell, const float* post_rope, int64_t position) {
    FAISS_THROW_IF_NOT_FMT(
            cell >= 0 && cell < ncell(),
            "cell = %d, there are %d cells",
            cell,
            ncell());
    FAISS_THROW_IF_NOT_MSG(
            post_rope || !with_means_,
            "post_rope is null but the lists keep means");
    slots_[cell].push_back(static_cast<int32_t>(first_slot_ + size()));
    cell_of_slot_.push_back(static_cast<uint16_t>(cell));
    const int32_t count = ++count_[cell];
    newest_[cell] = position;
    if (with_means_) {
        float* mean = mean_.data() + int64_t(cell) * d_;
        for (int j = 0; j < d_; j++) {
            mean[j] += (post_rope[j] - mean[j]) / static_cast<float>(count);
        }
    }
}

int64_t CellLists::count_before(int cell, int64_t end) const {
    const auto& s = slots_[cell];
    // Most queries are the newest token, which sees whole lists.
    if (s.empty() || s.back() < end) {
        return static_cast<int64_t>(s.size());
    }
    return std::lower_bound(s.begin(), s.end(), end) - s.begin();
}

CellStats CellLists::stats() const {
    CellStats stats;
    stats.count = count_.data();
    stats.mean_post_rope = with_means_ ? mean_.data() : nullptr;
    stats.newest = newest_.data();
    return stats;
}

size_t CellLists::bytes_used() const {
    size_t bytes = sizeof(*this) + slots_.capacity() * sizeof(slots_[0]) +
            cell_of_slot_.capacity() * sizeof(uint16_t) +
            count_.capacity() * sizeof(int32_t) +
            mean_.capacity() * sizeof(float) +
            newest_.capacity() * sizeof(int64_t);
    for (const auto& s : slots_) {
        bytes += s.capacity() * sizeof(int32_t);
    }
    return bytes;
}

} // namespace faiss_saap
