#include <faiss_saap/ProbePolicy.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cmath>
#include <numeric>
#include <string>

#include <faiss_saap/ordered_float.h>

#include "check.h"
#include "vector_kernels.h"

namespace faiss_saap {

namespace {

void check_shares(const std::vector<double>& shares, const char* name) {
    double sum = 0;
    for (double s : shares) {
        FAISS_THROW_IF_NOT_FMT(
                s >= 0 && s <= 1,
                "%s has a share of %g: shares must be between 0 and 1",
                name,
                s);
        sum += s;
    }
    FAISS_THROW_IF_NOT_FMT(
            sum <= 1 + 1e-9, "%s sums up to %g, more than 1", name, sum);
}

/// Far keys that the share of one of a head's partitions amounts to.
double keys_of_share(
        const ProbePolicy& policy,
        int kv_head,
        int partition,
        int npartition,
        int64_t far_keys) {
    const int64_t all = policy.key_limit(far_keys);
    // Without a limit there is nothing to split; shares of a head's own are
    // limits by themselves.
    if (all >= far_keys && policy.head_split.empty()) {
        return static_cast<double>(far_keys);
    }
    return policy.share(kv_head, partition, npartition) *
            static_cast<double>(all);
}

} // namespace

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
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(refine) && refine >= 1,
            "policy.refine = %g must be at least 1",
            refine);
    check_shares(split, "policy.split");
    for (size_t h = 0; h < head_split.size(); h++) {
        const std::string name =
                "policy.head_split[" + std::to_string(h) + "]";
        check_shares(head_split[h], name.c_str());
    }
}

namespace {

void check_number(int partition, int npartition) {
    FAISS_THROW_IF_NOT_FMT(
            partition >= 0 && partition < npartition,
            "partition = %d, there are %d",
            partition,
            npartition);
}

} // namespace

double ProbePolicy::share(int partition, int npartition) const {
    check_number(partition, npartition);
    FAISS_THROW_IF_NOT_MSG(
            head_split.empty(),
            "policy.head_split gives each KV head shares of its own, which is "
            "not supported here");
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

double ProbePolicy::share(int kv_head, int partition, int npartition) const {
    if (head_split.empty()) {
        return share(partition, npartition);
    }
    FAISS_THROW_IF_NOT_FMT(
            kv_head >= 0 && static_cast<size_t>(kv_head) < head_split.size(),
            "policy.head_split is for %zd KV heads, there is a KV head %d",
            head_split.size(),
            kv_head);
    check_number(partition, npartition);
    const std::vector<double>& shares = head_split[kv_head];
    FAISS_THROW_IF_NOT_FMT(
            shares.size() == static_cast<size_t>(npartition),
            "policy.head_split[%d] has %zd shares, the KV head has %d "
            "partitions",
            kv_head,
            shares.size(),
            npartition);
    return shares[partition];
}

int64_t ProbePolicy::key_limit(int64_t far_keys) const {
    return std::min(
            max_keys, static_cast<int64_t>(max_selectivity * far_keys));
}

int64_t ProbePolicy::candidate_limit(
        int kv_head,
        int partition,
        int npartition,
        int64_t far_keys) const {
    const double keys = refine *
            keys_of_share(*this, kv_head, partition, npartition, far_keys);
    return static_cast<int64_t>(
            std::min(keys + 1e-9, static_cast<double>(far_keys)));
}

int64_t ProbePolicy::head_limit(
        int kv_head,
        int npartition,
        int64_t far_keys) const {
    double keys = 0;
    for (int p = 0; p < npartition; p++) {
        keys += keys_of_share(*this, kv_head, p, npartition, far_keys);
    }
    return static_cast<int64_t>(
            std::min(keys + 1e-9, static_cast<double>(far_keys)));
}

std::vector<int32_t> take_cells(
        int ncell,
        const float* scores,
        const int64_t* counts,
        int nprobe,
        int64_t key_limit,
        bool at_least_one) {
    // Into bins by falling score; of a bin, what still fits is sorted when the
    // bin is reached, which is nothing for most of them.
    constexpr int kBins = 128;
    std::vector<int32_t> cells(ncell); // those that may be taken
    int n = 0;
    float highest = -INFINITY, lowest = INFINITY;
    for (int32_t c = 0; c < ncell; c++) {
        const bool there = counts[c] > 0 && scores[c] > -INFINITY;
        cells[n] = c;
        n += there;
        highest = std::max(highest, there ? scores[c] : -INFINITY);
        lowest = std::min(lowest, there ? scores[c] : INFINITY);
    }
    // Equal, or farther apart than a float can say: the first and the last bin hold
    // all, as 0 * infinity is no number below the last.
    const float per_score = (kBins - 1) / (highest - lowest);
    const float factor = per_score < INFINITY ? per_score : 0.0f;
    std::vector<uint8_t> bin_of(n);
    std::array<int32_t, kBins + 1> end{};
    for (int i = 0; i < n; i++) {
        const float bin = (highest - scores[cells[i]]) * factor;
        bin_of[i] = static_cast<uint8_t>(bin < kBins - 1 ? bin : kBins - 1);
        end[bin_of[i] + 1]++;
    }
    std::partial_sum(end.begin(), end.end(), end.begin());
    std::vector<int32_t> by_bin(n);
    for (int i = 0; i < n; i++) {
        by_bin[end[bin_of[i]]++] = cells[i];
    }

    std::vector<int32_t> taken;
    int64_t keys = 0;
    const auto may_take = [&](int32_t c) {
        return (at_least_one && taken.empty()) || keys + counts[c] <= key_limit;
    };
    std::vector<uint64_t> best_first; // of a bin
    for (int bin = 0, i = 0; i < n && (taken.empty() || keys < key_limit);
         bin++) {
        best_first.clear();
        for (; i < end[bin]; i++) {
            const int32_t c = by_bin[i];
            if (may_take(c)) { // what does not fit now will not fit later
                best_first.push_back(SelectionKey::make(
                        scores[c], static_cast<uint32_t>(c), /*largest=*/true));
            }
        }
        std::sort(best_first.begin(), best_first.end());
        for (uint64_t key : best_first) {
            if (static_cast<int>(taken.size()) >= nprobe) {
                return taken;
            }
            const auto c = static_cast<int32_t>(SelectionKey::id(key));
            if (may_take(c)) {
                taken.push_back(c);
                keys += counts[c];
            }
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
