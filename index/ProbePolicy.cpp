#include <faiss_saap/ProbePolicy.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "check.h"
#include "vector_kernels.h"

namespace faiss_saap {

void ProbePolicy::check() const {
    FAISS_THROW_IF_NOT_FMT(
            nprobe >= 1, "policy.nprobe = %d must be at least 1", nprobe);
    FAISS_THROW_IF_NOT_FMT(
            max_keys >= 0,
            "policy.max_keys = %" PRId64 " must not be negative",
            max_keys);
    FAISS_THROW_IF_NOT_FMT(
            max_selectivity >= 0 && max_selectivity <= 1,
            "policy.max_selectivity = %g must be between 0 and 1",
            max_selectivity);
    double sum = 0;
    for (double s : split) {
        FAISS_THROW_IF_NOT_FMT(
                s >= 0 && s <= 1,
                "policy.split has a share of %g: shares must be between 0 and "
                "1",
                s);
        sum += s;
    }
    FAISS_THROW_IF_NOT_FMT(
            sum <= 1 + 1e-9,
            "policy.split sums up to %g, more than 1",
            sum);
}

double ProbePolicy::share(int partition, int npartition) const {
    if (npartition == 1) {
        return 1;
    }
    FAISS_THROW_IF_NOT_FMT(
            split.empty() || split.size() == static_cast<size_t>(npartition),
            "policy.split has %zd shares, a KV head has %d partitions",
            split.size(),
            npartition);
    return split.empty() ? 1.0 / npartition : split[partition];
}

int64_t ProbePolicy::key_limit(int64_t far_keys) const {
    return std::min(
            max_keys, static_cast<int64_t>(max_selectivity * far_keys));
}

std::vector<int32_t> take_cells(
        int ncell,
        const float* scores,
        const int64_t* counts,
        int nprobe,
        int64_t key_limit,
        bool at_least_one) {
    // Worse than: ties go to the lower cell.
    const auto worse = [scores](int32_t a, int32_t b) {
        return scores[a] != scores[b] ? scores[a] < scores[b] : a > b;
    };
    // A heap, as most cells are never looked at.
    std::vector<int32_t> heap;
    for (int32_t c = 0; c < ncell; c++) {
        if (counts[c] > 0 && scores[c] > -INFINITY) {
            heap.push_back(c);
        }
    }
    std::make_heap(heap.begin(), heap.end(), worse);
    std::vector<int32_t> taken;
    int64_t keys = 0;
    while (!heap.empty() && static_cast<int>(taken.size()) < nprobe) {
        std::pop_heap(heap.begin(), heap.end(), worse);
        const int32_t c = heap.back();
        heap.pop_back();
        const bool must = at_least_one && taken.empty();
        if (must || keys + counts[c] <= key_limit) {
            taken.push_back(c);
            keys += counts[c];
        } else {
            // Nor will others of its size: what is left only shrinks.
            heap.erase(
                    std::remove_if(
                            heap.begin(),
                            heap.end(),
                            [&](int32_t other) {
                                return keys + counts[other] > key_limit;
                            }),
                    heap.end());
            std::make_heap(heap.begin(), heap.end(), worse);
        }
        if (keys >= key_limit) {
            break;
        }
    }
    return taken;
}

void share_scores(
        int nhead,
        int ncell,
        const float* scores,
        const int64_t* counts,
        float scale,
        float* group_scores) {
    const std::vector<float> weights(counts, counts + ncell);
    share_scores_kernel(
            nhead, ncell, scores, weights.data(), scale, group_scores);
}

} // namespace faiss_saap
