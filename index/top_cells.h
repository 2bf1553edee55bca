/// The best cells of one vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

namespace faiss_saap {

/// The k best of ncell scores, best first; -1 where a score is -infinity.
/// @param order        scratch, size ncell
/// @param cells        output, size k
/// @param best_scores  output, size k, may be null
inline void top_cells(
        int ncell,
        const float* scores,
        int k,
        int32_t* order,
        int32_t* cells,
        float* best_scores) {
    std::iota(order, order + ncell, 0);
    // Ties go to the lower cell, so that results do not depend on the sorting
    // algorithm.
    std::partial_sort(
            order, order + k, order + ncell, [scores](int32_t a, int32_t b) {
                return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
            });
    for (int j = 0; j < k; j++) {
        const float score = scores[order[j]];
        cells[j] = score > -INFINITY ? order[j] : -1;
        if (best_scores) {
            best_scores[j] = score;
        }
    }
}

} // namespace faiss_saap
