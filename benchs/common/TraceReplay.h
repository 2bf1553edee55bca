/// Texts as long as wanted, out of recorded ones.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include <faiss_saap/Trace.h>

namespace faiss_saap::benchs {

/// The tokens of a new text, each of which blends two recorded ones:
///
///     x = m + sqrt(1 - b) (x_i - m) + sqrt(b) (x_j - m)
///
/// for queries, keys and values before RoPE, m being their means over the
/// records. i and j walk through the records independently: on to the next
/// token or, once in `run` tokens on average, to any place in any text. Means,
/// covariances (of queries and keys with each other too) and what tokens have in
/// common with those before them stay as recorded; the second part keeps a place
/// that is visited again from being repeated. Its share b is measured for each
/// head (`novelty`).
struct ReplayPath {
    static constexpr int64_t kSink = 16; ///< first tokens, taken as they are

    /// i and j of each token: rows of the texts after one another
    std::vector<std::array<int64_t, 2>> rows;

    /// @param lengths  tokens of each text, more than kSink
    /// @param run      at least 1
    ReplayPath(
            const std::vector<int64_t>& lengths,
            int64_t tokens,
            double run,
            uint64_t seed);

    /// The vectors of the new text.
    /// @param x      recorded vectors, all texts after one another, rows * d
    /// @param share  b, 0 <= b <= 1
    /// @return size tokens * d
    std::vector<float> replay(int d, const std::vector<float>& x, double share)
            const;
};

/// What is new in a token: the mean squared distance of keys, in the second half
/// of each text, to the nearest key in the first half of any, over that of two
/// keys at random; at most 1/2.
/// @param x        recorded keys, all texts after one another, rows * d
/// @param lengths  tokens of each text
double novelty(
        int d,
        const std::vector<float>& x,
        const std::vector<int64_t>& lengths);

} // namespace faiss_saap::benchs
