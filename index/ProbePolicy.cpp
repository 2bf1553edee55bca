#include <faiss_saap/ProbePolicy.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <string>

#include <hwy/contrib/sort/vqsort.h>

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

/// A product of fractions may be a last bit less than the number of keys it stands for:
/// .29 of 100 are 29.
int64_t whole_keys(double keys) {
    return static_cast<int64_t>(keys + 1e-9 + 1e-14 * keys);
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
    return std::min(max_keys, whole_keys(max_selectivity * static_cast<double>(far_keys)));
}

int64_t ProbePolicy::candidate_limit(
        int kv_head,
        int partition,
        int npartition,
        int64_t far_keys) const {
    const double keys = refine *
            keys_of_share(*this, kv_head, partition, npartition, far_keys);
    return whole_keys(std::min(keys, static_cast<double>(far_keys)));
}

int64_t ProbePolicy::candidate_limit(int64_t far_keys) const {
    const int64_t all = key_limit(far_keys);
    const double keys = refine * static_cast<double>(all);
    const bool limited = all < far_keys && keys < 0x1p62;
    return limited ? whole_keys(keys) : INT64_MAX;
}

int64_t ProbePolicy::head_limit(
        int kv_head,
        int npartition,
        int64_t far_keys) const {
    double keys = 0;
    for (int p = 0; p < npartition; p++) {
        keys += keys_of_share(*this, kv_head, p, npartition, far_keys);
    }
    return whole_keys(std::min(keys, static_cast<double>(far_keys)));
}

std::vector<int32_t> take_cells(
        int ncell,
        const float* scores,
        const int64_t* counts,
        int nprobe,
        int64_t key_limit,
        bool at_least_one) {
    std::vector<uint64_t> best_first(ncell); // of those that may be taken
    size_t n = 0;
    for (int c = 0; c < ncell; c++) {
        best_first[n] = SelectionKey::make(
                scores[c], static_cast<uint32_t>(c), /*largest=*/true);
        n += counts[c] > 0 && scores[c] > -INFINITY;
    }
    const hwy::Sorter sort;
    sort(best_first.data(), n, hwy::SortAscending());

    std::vector<int32_t> taken;
    int64_t keys = 0;
    for (size_t i = 0; i < n && static_cast<int>(taken.size()) < nprobe &&
         (taken.empty() || keys < key_limit);
         i++) {
        const auto c = static_cast<int32_t>(SelectionKey::id(best_first[i]));
        if ((at_least_one && taken.empty()) || keys + counts[c] <= key_limit) {
            taken.push_back(c);
            keys += counts[c];
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
