#include <faiss_saap/SegmentedAssigner.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <vector>

#include "check.h"

namespace faiss_saap {

namespace {

const CellAssigner& checked(const std::shared_ptr<const CellAssigner>& inner) {
    FAISS_THROW_IF_NOT_MSG(inner, "inner is null");
    FAISS_THROW_IF_NOT_MSG(
            !(inner->needs & (NEEDS_STATS | NEEDS_NEWEST_KEYS)),
            "inner needs cell statistics, which are of other cells");
    FAISS_THROW_IF_NOT_MSG(
            !dynamic_cast<const SegmentedAssigner*>(inner.get()),
            "inner is segmented itself");
    return *inner;
}

int cells_of(const CellAssigner& inner, int64_t length, int nsegment) {
    FAISS_THROW_IF_NOT_FMT(
            length >= 1, "length = %" PRId64 " must be at least 1", length);
    FAISS_THROW_IF_NOT_FMT(
            nsegment >= 1 && int64_t(nsegment) * inner.ncell <= 65536,
            "nsegment = %d of %d cells each: must be at least 1, and at most "
            "65536 cells in all",
            nsegment,
            inner.ncell);
    return nsegment * inner.ncell;
}

} // namespace

int64_t SegmentedAssigner::first_cell(int64_t position) const {
    FAISS_THROW_IF_NOT_FMT(
            position >= 0,
            "input.position has %" PRId64 ": segments begin at 0",
            position);
    return position / length % nsegment * inner->ncell;
}

SegmentedAssigner::SegmentedAssigner(
        std::shared_ptr<const CellAssigner> i,
        int64_t l,
        int n)
        : CellAssigner(
                  checked(i).d,
                  cells_of(checked(i), l, n),
                  checked(i).needs | NEEDS_POSITION),
          inner(std::move(i)),
          length(l),
          nsegment(n) {
    group = inner->group;
}

void SegmentedAssigner::scores(
        const RoutingInput& input,
        const CellStats* stats,
        float* scores) const {
    check(input, stats);
    std::vector<float> of_inner(input.n * inner->ncell);
    inner->scores(input, nullptr, of_inner.data());
    std::fill(scores, scores + input.n * ncell, -INFINITY);
    for (int64_t i = 0; i < input.n; i++) {
        std::copy_n(
                of_inner.data() + i * inner->ncell,
                inner->ncell,
                scores + i * ncell + first_cell(input.position[i]));
    }
}

void SegmentedAssigner::assign(
        const RoutingInput& input,
        const CellStats* stats,
        int k,
        int32_t* cells,
        float* best_scores) const {
    check(input, stats);
    check_k(k);
    // A vector has scores in the cells of its segment alone.
    const int some = std::min(k, inner->ncell);
    std::vector<int32_t> found(input.n * some);
    std::vector<float> scores(found.size());
    inner->assign(input, nullptr, some, found.data(), scores.data());
    for (int64_t i = 0; i < input.n; i++) {
        const auto first = static_cast<int32_t>(first_cell(input.position[i]));
        for (int j = 0; j < k; j++) {
            const bool there = j < some && found[i * some + j] >= 0;
            cells[i * k + j] = there ? first + found[i * some + j] : -1;
            if (best_scores) {
                best_scores[i * k + j] =
                        there ? scores[i * some + j] : -INFINITY;
            }
        }
    }
}

size_t SegmentedAssigner::bytes_read() const {
    return inner->bytes_read();
}

} // namespace faiss_saap
