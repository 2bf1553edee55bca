#include <faiss_saap/CellAssigner.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "top_cells.h"

namespace faiss_saap {

CellAssigner::CellAssigner(int d_in, int ncell_in, unsigned needs_in)
        : d(d_in), ncell(ncell_in), needs(needs_in) {
    FAISS_THROW_IF_NOT_FMT(d > 0, "d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            ncell);
}

void CellAssigner::check(const RoutingInput& input, const CellStats* stats)
        const {
    FAISS_THROW_IF_NOT_FMT(
            input.n >= 0,
            "input.n = %lld must not be negative",
            static_cast<long long>(input.n));
    FAISS_THROW_IF_NOT_FMT(
            input.d == d, "input.d = %d, the assigner has d = %d", input.d, d);
    if (input.n == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_PRE_ROPE) || input.pre_rope,
            "input.pre_rope is null but the assigner needs it");
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_POST_ROPE) || input.post_rope,
            "input.post_rope is null but the assigner needs it");
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_POSITION) || input.position,
            "input.position is null but the assigner needs it");
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_HEAD) || input.head,
            "input.head is null but the assigner needs it");
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_STATS) || (stats && stats->count),
            "stats is null but the assigner needs it");
    FAISS_THROW_IF_NOT_MSG(
            !(needs & NEEDS_NEWEST_KEYS) ||
                    (stats && stats->newest && stats->newest_post_rope),
            "stats->newest_post_rope is null but the assigner needs it");
}

const float* CellAssigner::vectors(const RoutingInput& input) const {
    return needs & NEEDS_PRE_ROPE ? input.pre_rope : input.post_rope;
}

namespace {

RoutingInput slice(const RoutingInput& input, int64_t begin, int64_t n) {
    RoutingInput part = input;
    part.n = n;
    part.pre_rope += input.pre_rope ? begin * input.d : 0;
    part.post_rope += input.post_rope ? begin * input.d : 0;
    part.position += input.position ? begin : 0;
    part.head += input.head ? begin : 0;
    return part;
}

} // namespace

void CellAssigner::check_k(int k) const {
    FAISS_THROW_IF_NOT_FMT(
            k >= 1 && k <= ncell,
            "k = %d must be between 1 and ncell = %d",
            k,
            ncell);
}

void CellAssigner::assign(
        const RoutingInput& input,
        const CellStats* stats,
        int k,
        int32_t* cells,
        float* best_scores) const {
    check_k(k);
    check(input, stats);
    // In blocks, so that memory does not grow with n * ncell.
    constexpr int64_t kBlock = 64;
    std::vector<float> block_scores(
            static_cast<size_t>(std::min(kBlock, input.n)) * ncell);
    std::vector<int32_t> order(ncell);
    for (int64_t i = 0; i < input.n; i++) {
        if (i % kBlock == 0) {
            scores(slice(input, i, std::min(kBlock, input.n - i)),
                   stats,
                   block_scores.data());
        }
        const float* s = block_scores.data() + i % kBlock * ncell;
        top_cells(
                ncell,
                s,
                k,
                order.data(),
                cells + i * k,
                best_scores ? best_scores + i * k : nullptr);
    }
}

} // namespace faiss_saap
