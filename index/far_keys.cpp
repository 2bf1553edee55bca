#include "far_keys.h"

#include <algorithm>
#include <numeric>

#include "vector_kernels.h"

namespace faiss_saap {

FarKeys::FarKeys(int64_t first, int64_t slots)
        : first_slot(first), words((slots + 63) / 64, 0), of_word(words.size(), 0) {}

void FarKeys::count() {
    count_bits(static_cast<int64_t>(words.size()), words.data(), of_word.data());
    n = std::accumulate(of_word.begin(), of_word.end(), int64_t(0));
}

void FarKeys::assign(const std::vector<int32_t>& slots) {
    std::fill(words.begin(), words.end(), 0);
    for (int32_t slot : slots) {
        words[(slot - first_slot) / 64] |= uint64_t(1) << (slot - first_slot) % 64;
    }
    count();
}

int32_t* FarKeys::copy_slots(int64_t begin, int64_t end, int32_t* out) const {
    // Five at a time without a branch for each, as most words hold a few: what
    // is not there is overwritten.
    constexpr int kAtOnce = 5;
    for (int64_t w = begin; w < end; w++) {
        const auto first = static_cast<int32_t>(first_slot + 64 * w);
        uint64_t left = words[w];
        do {
            for (int i = 0; i < kAtOnce; i++) {
                *out = first + __builtin_ctzll(left | uint64_t(1) << 63);
                out += left != 0;
                left &= left - 1;
            }
        } while (left);
    }
    return out;
}

std::vector<int32_t> FarKeys::slots() const {
    std::vector<int32_t> all(n + 1);
    copy_slots(0, static_cast<int64_t>(words.size()), all.data());
    all.resize(n);
    return all;
}

std::vector<FarPiece> cut_far(const FarKeys* far, int64_t rows, int64_t length) {
    const auto words = static_cast<int64_t>(far[0].words.size());
    std::vector<int32_t> of_word(words, 0);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t w = 0; w < words; w++) {
            of_word[w] += far[r].of_word[w];
        }
    }
    std::vector<FarPiece> pieces;
    FarPiece next = {0, 0, 0};
    for (int64_t w = 0; w < words; w++) {
        next.keys += of_word[w];
        next.end = w + 1;
        if (next.keys >= length) {
            pieces.push_back(next);
            next = {w + 1, w + 1, 0};
        }
    }
    if (next.keys > 0) {
        pieces.push_back(next);
    }
    return pieces;
}

} // namespace faiss_saap
