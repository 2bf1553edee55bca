/// The far keys that a token reads.
#pragma once

#include <cstdint>
#include <vector>

namespace faiss_saap {

/// The far keys in the cells that a row probes, as a bitmap. So their slots come in ascending
/// order, which is kinder to the memory, those that two cells share come once, and it can be cut
/// anywhere.
struct FarKeys {
    int64_t first_slot = 0; ///< of the first word's first bit
    int64_t cells = 0;      ///< distinct ones
    int64_t ranked = 0;     ///< keys compared by their codes
    int64_t n = 0;          ///< keys
    std::vector<uint64_t> words;
    std::vector<uint8_t> of_word; ///< keys of each

    FarKeys() = default;
    /// No keys yet, of `slots` possible ones.
    FarKeys(int64_t first_slot, int64_t slots);
    /// To be called when bits of words have been set.
    void count();
    /// Keeps these alone.
    void assign(const std::vector<int32_t>& slots);
    /// The slots in words begin .. end - 1, ascending.
    /// @param out  has room for one more than that
    /// @returns    their end
    int32_t* copy_slots(int64_t begin, int64_t end, int32_t* out) const;
    std::vector<int32_t> slots() const;
};

/// Words begin .. end - 1 of all rows of a token.
struct FarPiece {
    int64_t begin, end;
    int64_t keys; ///< of all rows
};

/// Cuts the words of a token's rows where all rows together have `length` keys.
/// @param rows  at least one; their first slots and numbers of words are the same
/// @returns     pieces that have keys
std::vector<FarPiece> cut_far(const FarKeys* far, int64_t rows, int64_t length);

} // namespace faiss_saap
