#include <faiss_saap/CellMeanAssigner.h>

#include <cmath>

#include "check.h"
#include "vector_kernels.h"

namespace faiss_saap {

CellMeanAssigner::CellMeanAssigner(int d_in, int ncell_in)
        : CellAssigner(d_in, ncell_in, NEEDS_POST_ROPE | NEEDS_STATS) {}

void CellMeanAssigner::scores(
        const RoutingInput& input,
        const CellStats* stats,
        float* scores) const {
    check(input, stats);
    if (input.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(
            stats->mean_post_rope,
            "stats->mean_post_rope is null but the assigner needs it");
    inner_products(
            static_cast<int>(input.n),
            d,
            input.post_rope,
            ncell,
            stats->mean_post_rope,
            scores);
    for (int64_t i = 0; i < input.n; i++) {
        for (int c = 0; c < ncell; c++) {
            if (stats->count[c] == 0) {
                scores[i * ncell + c] = -INFINITY;
            }
        }
    }
}

size_t CellMeanAssigner::bytes_read() const {
    return static_cast<size_t>(ncell) * (d * sizeof(float) + sizeof(int32_t));
}

} // namespace faiss_saap
