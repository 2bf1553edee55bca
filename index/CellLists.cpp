#include <faiss_saap/CellLists.h>

#include <algorithm>
#include <cinttypes>
#include <utility>

#include "check.h"

namespace faiss_saap {

namespace {

constexpr int kPerBlock = SlotPool::kSlotsPerBlock;

} // namespace

CellLists::CellLists(
        int ncell,
        int d,
        int64_t first_slot,
        bool with_means,
        std::shared_ptr<SlotPool> pool,
        bool with_newest_keys)
        : d_(d),
          first_slot_(first_slot),
          with_means_(with_means),
          with_newest_keys_(with_newest_keys),
          pool_(pool ? std::move(pool) : std::make_shared<SlotPool>()) {
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            ncell);
    FAISS_THROW_IF_NOT_FMT(d >= 1, "d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(
            first_slot >= 0 && first_slot <= INT32_MAX,
            "first_slot = %" PRId64 " must be between 0 and 2^31 - 1",
            first_slot);
    tail_.assign(ncell, SlotPool::kNone);
    count_.assign(ncell, 0);
    mean_.assign(with_means ? size_t(ncell) * d : 0, 0.0f);
    newest_.assign(ncell, -1);
    newest_key_.assign(with_newest_keys ? size_t(ncell) * d : 0, 0.0f);
}

CellLists::CellLists(const CellLists& other)
        : d_(other.d_),
          first_slot_(other.first_slot_),
          with_means_(other.with_means_),
          with_newest_keys_(other.with_newest_keys_),
          size_(other.size_),
          first_position_(other.first_position_),
          pool_(other.pool_),
          tail_(other.tail_),
          cells_(other.cells_),
          count_(other.count_),
          mean_(other.mean_),
          newest_(other.newest_),
          newest_key_(other.newest_key_) {
    for (uint32_t block : tail_) {
        if (block != SlotPool::kNone) {
            (*pool_)[block].users++;
        }
    }
}

CellLists::CellLists(CellLists&& other) noexcept
        : d_(other.d_),
          first_slot_(other.first_slot_),
          with_means_(other.with_means_),
          with_newest_keys_(other.with_newest_keys_),
          size_(std::exchange(other.size_, 0)),
          first_position_(other.first_position_),
          pool_(std::move(other.pool_)),
          tail_(std::move(other.tail_)),
          cells_(std::move(other.cells_)),
          count_(std::move(other.count_)),
          mean_(std::move(other.mean_)),
          newest_(std::move(other.newest_)),
          newest_key_(std::move(other.newest_key_)) {
    other.tail_.clear();
}

CellLists& CellLists::operator=(CellLists other) noexcept {
    std::swap(d_, other.d_);
    std::swap(first_slot_, other.first_slot_);
    std::swap(with_means_, other.with_means_);
    std::swap(with_newest_keys_, other.with_newest_keys_);
    std::swap(size_, other.size_);
    std::swap(first_position_, other.first_position_);
    std::swap(pool_, other.pool_);
    std::swap(tail_, other.tail_);
    std::swap(cells_, other.cells_);
    std::swap(count_, other.count_);
    std::swap(mean_, other.mean_);
    std::swap(newest_, other.newest_);
    std::swap(newest_key_, other.newest_key_);
    return *this;
}

CellLists::~CellLists() {
    for (uint32_t block : tail_) {
        pool_->release(block);
    }
}

void CellLists::add_to_mean(int32_t count, const float* key, float* mean)
        const {
    for (int j = 0; j < d_; j++) {
        mean[j] += (key[j] - mean[j]) / static_cast<float>(count);
    }
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
    FAISS_THROW_IF_NOT_MSG(
            post_rope || !with_newest_keys_,
            "post_rope is null but the lists keep newest keys");
    push(cell, position);
    if (with_means_) {
        add_to_mean(
                count_[cell], post_rope, mean_.data() + int64_t(cell) * d_);
    }
    if (with_newest_keys_) {
        std::copy_n(post_rope, d_, newest_key_.data() + int64_t(cell) * d_);
    }
}

void CellLists::push(int32_t cell, int64_t position) {
    FAISS_THROW_IF_NOT_FMT(
            first_slot_ + size_ <= INT32_MAX,
            "slot %" PRId64 " is beyond 2^31 - 1",
            first_slot_ + size_);
    const int64_t first = position - size_;
    FAISS_THROW_IF_NOT_FMT(
            size_ == 0 || first == first_position_,
            "position = %" PRId64 ", the slots before it lead to %" PRId64,
            position,
            first_position_ + size_);
    first_position_ = first;
    // Whatever allocates comes first, so that a failure changes nothing.
    const auto chunk = static_cast<size_t>(size_ / kChunk);
    if (chunk == cells_.size()) {
        cells_.push_back(std::make_shared<Chunk>());
    } else if (cells_[chunk].use_count() > 1) { // shared with a fork
        cells_[chunk] = std::make_shared<Chunk>(*cells_[chunk]);
    }
    SlotPool& pool = *pool_;
    uint32_t& tail = tail_[cell];
    const int used = count_[cell] % kPerBlock;
    if (used == 0) {
        tail = pool.allocate(tail);
    } else if (pool[tail].users > 1) {
        const uint32_t own = pool.allocate(pool[tail].previous);
        if (pool[own].previous != SlotPool::kNone) {
            pool[pool[own].previous].users++;
        }
        std::copy_n(pool[tail].slots, used, pool[own].slots);
        pool.release(tail);
        tail = own;
    }
    pool[tail].slots[used] = static_cast<int32_t>(first_slot_ + size_);
    (*cells_[chunk])[size_ % kChunk] = static_cast<uint16_t>(cell);
    size_++;
    count_[cell]++;
    newest_[cell] = position;
}

int32_t CellLists::newest_slot(int32_t cell) const {
    return (*pool_)[tail_[cell]].slots[(count_[cell] - 1) % kPerBlock];
}

void CellLists::pop(int32_t cell) {
    SlotPool& pool = *pool_;
    uint32_t& tail = tail_[cell];
    const int32_t left = --count_[cell];
    if (left % kPerBlock == 0) {
        const uint32_t previous = pool[tail].previous;
        if (previous != SlotPool::kNone) {
            pool[previous].users++;
        }
        pool.release(tail);
        tail = previous;
    }
    if (left == 0) {
        newest_[cell] = -1;
    } else {
        newest_[cell] = first_position_ + newest_slot(cell) - first_slot_;
    }
    size_--;
}

void CellLists::truncate(
        int64_t size,
        const std::function<void(int64_t slot, float* key)>& read_key) {
    FAISS_THROW_IF_NOT_FMT(
            size >= 0 && size <= size_,
            "size = %" PRId64 " must be between 0 and the %" PRId64
            " slots listed",
            size,
            size_);
    FAISS_THROW_IF_NOT_MSG(
            read_key || !reads_keys() || size == size_,
            "read_key is empty but the lists keep means or newest keys");
    // All that allocates or reads comes first, so that a failure changes
    // nothing.
    std::vector<int32_t> left(count_);
    std::vector<int32_t> changed;
    for (int64_t i = size_; i > size; i--) {
        const int32_t cell = cell_of(first_slot_ + i - 1);
        if (reads_keys() && left[cell] == count_[cell]) {
            changed.push_back(cell);
        }
        left[cell]--;
    }
    std::vector<float> mean(with_means_ ? changed.size() * d_ : 0, 0.0f);
    std::vector<float> newest(with_newest_keys_ ? changed.size() * d_ : 0, 0.0f);
    std::vector<float> key(d_);
    for (size_t i = 0; i < changed.size(); i++) {
        const int32_t cell = changed[i];
        std::vector<int32_t> stay(left[cell]);
        copy_slots(cell, left[cell], stay.data());
        if (with_newest_keys_ && !stay.empty()) {
            read_key(stay.back(), newest.data() + i * d_);
        }
        // Summed anew, as subtracting would leave rounding behind.
        for (int32_t n = 0; with_means_ && n < left[cell]; n++) {
            read_key(stay[n], key.data());
            add_to_mean(n + 1, key.data(), mean.data() + i * d_);
        }
    }
    while (size_ > size) {
        pop(cell_of(first_slot_ + size_ - 1));
    }
    cells_.resize((size_ + kChunk - 1) / kChunk);
    for (size_t i = 0; i < changed.size(); i++) {
        const int64_t to = int64_t(changed[i]) * d_;
        std::copy_n(
                mean.data() + i * d_, with_means_ ? d_ : 0, mean_.data() + to);
        std::copy_n(
                newest.data() + i * d_,
                with_newest_keys_ ? d_ : 0,
                newest_key_.data() + to);
    }
}

void CellLists::restore(
        int64_t n,
        const uint16_t* cells,
        int64_t position,
        const float* means,
        const float* newest_keys) {
    FAISS_THROW_IF_NOT_FMT(
            size_ == 0, "lists of %" PRId64 " slots are not empty", size_);
    FAISS_THROW_IF_NOT_MSG(
            (means != nullptr) == with_means_,
            "means must be given exactly where the lists keep them");
    FAISS_THROW_IF_NOT_MSG(
            (newest_keys != nullptr) == with_newest_keys_,
            "newest keys must be given exactly where the lists keep them");
    FAISS_THROW_IF_NOT_FMT(
            n >= 0 && n <= INT32_MAX - first_slot_ + 1,
            "n = %" PRId64 " slots from slot %" PRId64
            " on are negative, or lead beyond 2^31 - 1",
            n,
            first_slot_);
    for (int64_t i = 0; i < n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                cells[i] < ncell(),
                "cells[%" PRId64 "] = %d, there are %d cells",
                i,
                cells[i],
                ncell());
    }
    for (int64_t i = 0; i < n; i++) {
        push(cells[i], position + i);
    }
    std::copy_n(means, mean_.size(), mean_.data());
    std::copy_n(newest_keys, newest_key_.size(), newest_key_.data());
}

void CellLists::copy_slots(int cell, int64_t n, int32_t* out) const {
    const SlotPool& pool = *pool_;
    uint32_t block = tail_[cell];
    for (int64_t left = count_[cell]; left > 0;) {
        const int64_t first = (left - 1) / kPerBlock * kPerBlock;
        if (first < n) {
            std::copy_n(
                    pool[block].slots, std::min(left, n) - first, out + first);
        }
        left = first;
        block = pool[block].previous;
    }
}

int64_t CellLists::mark_slots(
        const std::vector<int32_t>& cells,
        int64_t end,
        uint64_t* bits) const {
    struct Part {
        const SlotPool::Block* block;
        int32_t before; ///< slots of its cell in the blocks before it
        int32_t n;      ///< slots in this one
    };
    const SlotPool& pool = *pool_;
    // A block is two cache lines. First ones are asked for together, as a
    // prefetch whose address must be translated holds up what follows it.
    std::vector<Part> parts, previous;
    const auto first_line = [&pool](uint32_t block, int32_t left) {
        __builtin_prefetch(&pool[block]);
        const int32_t before = (left - 1) / kPerBlock * kPerBlock;
        return Part{&pool[block], before, left - before};
    };
    const auto other_lines = [](const std::vector<Part>& of) {
        for (const Part& part : of) {
            __builtin_prefetch(&part.block->slots[kPerBlock - 1]);
        }
    };
    for (int32_t cell : cells) {
        if (count_[cell] > 0) {
            parts.push_back(first_line(tail_[cell], count_[cell]));
        }
    }
    other_lines(parts);
    // Chains side by side, as following one is waiting for the memory; all are
    // followed a step before any slot is looked at.
    int64_t marked = 0;
    while (!parts.empty()) {
        previous.clear();
        for (const Part& part : parts) {
            if (part.before > 0) {
                previous.push_back(first_line(part.block->previous, part.before));
            }
        }
        other_lines(previous);
        for (const Part& part : parts) {
            for (int j = 0; j < part.n; j++) {
                const int32_t slot = part.block->slots[j];
                if (slot >= end) {
                    break;
                }
                const uint64_t at = slot - first_slot_;
                bits[at / 64] |= uint64_t(1) << (at % 64);
                marked++;
            }
        }
        parts.swap(previous);
    }
    return marked;
}

std::vector<int32_t> CellLists::slots(int cell) const {
    std::vector<int32_t> all(count_[cell]);
    copy_slots(cell, count_[cell], all.data());
    return all;
}

int64_t CellLists::count_before(int cell, int64_t end) const {
    // Most queries are the newest token, which sees whole lists.
    if (end >= first_slot_ + size_) {
        return count_[cell];
    }
    const SlotPool& pool = *pool_;
    uint32_t block = tail_[cell];
    for (int64_t left = count_[cell]; left > 0;) {
        const int64_t first = (left - 1) / kPerBlock * kPerBlock;
        const int32_t* slots = pool[block].slots;
        if (slots[0] < end) {
            return slots[left - first - 1] < end
                    ? left
                    : std::lower_bound(slots, slots + (left - first), end) -
                            slots + first;
        }
        left = first;
        block = pool[block].previous;
    }
    return 0;
}

CellStats CellLists::stats() const {
    CellStats stats;
    stats.count = count_.data();
    stats.mean_post_rope = with_means_ ? mean_.data() : nullptr;
    stats.newest = newest_.data();
    stats.newest_post_rope = with_newest_keys_ ? newest_key_.data() : nullptr;
    return stats;
}

size_t CellLists::bytes_used(std::unordered_set<const void*>* counted) const {
    size_t bytes = sizeof(*this) + tail_.capacity() * sizeof(tail_[0]) +
            cells_.capacity() * sizeof(cells_[0]) +
            count_.capacity() * sizeof(count_[0]) +
            mean_.capacity() * sizeof(mean_[0]) +
            newest_.capacity() * sizeof(newest_[0]) +
            newest_key_.capacity() * sizeof(newest_key_[0]);
    for (const auto& chunk : cells_) {
        if (!counted || counted->insert(chunk.get()).second) {
            bytes += sizeof(Chunk);
        }
    }
    return bytes;
}

} // namespace faiss_saap
