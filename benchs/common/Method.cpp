#include "Method.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <faiss_saap/ProbePolicy.h>

namespace faiss_saap::benchs {

std::vector<double> Method::ceiling(
        const std::vector<GroundTruth>& truth,
        FarRange,
        int64_t) const {
    return std::vector<double>(truth.size(), NAN);
}

std::vector<std::vector<int32_t>> OracleTopK::select(
        const HeadData&,
        const std::vector<GroundTruth>& truth,
        int64_t,
        FarRange far,
        int64_t limit) const {
    std::vector<std::vector<int32_t>> chosen;
    for (const GroundTruth& t : truth) {
        std::vector<int32_t> slots(far.size());
        std::iota(
                slots.begin(), slots.end(), static_cast<int32_t>(far.begin));
        const int64_t k = std::min<int64_t>(limit, far.size());
        std::nth_element(
                slots.begin(),
                slots.begin() + k,
                slots.end(),
                [&](int32_t a, int32_t b) { return t.mass[a] > t.mass[b]; });
        slots.resize(k);
        std::sort(slots.begin(), slots.end());
        chosen.push_back(std::move(slots));
    }
    return chosen;
}

double OracleTopK::index_bytes(const HeadData& data) const {
    return static_cast<double>(data.tokens) * data.d * sizeof(float);
}

CellMethod::CellMethod(
        std::string n,
        Partition p,
        int64_t sink,
        bool share)
        : Method(std::move(n)),
          partition(std::move(p)),
          lists(partition.ncell(),
                partition.d(),
                sink,
                partition.query->needs & NEEDS_STATS,
                nullptr,
                partition.query->needs & NEEDS_NEWEST_KEYS),
          share_group(share),
          listed_(sink) {}

void CellMethod::list_until(const HeadData& data, int64_t end) {
    const int64_t n = end - listed_;
    if (n <= 0) {
        return;
    }
    RoutingInput input;
    input.n = n;
    input.d = data.d;
    input.pre_rope = data.keys_pre.data() + listed_ * data.d;
    input.post_rope = data.keys_post.data() + listed_ * data.d;
    input.position = data.position.data() + listed_;
    std::vector<int32_t> cells(n);
    partition.key->assign(input, nullptr, 1, cells.data(), nullptr);
    for (int64_t i = 0; i < n; i++) {
        lists.append(
                cells[i], input.post_rope + i * data.d, input.position[i]);
    }
    listed_ = end;
}

std::vector<int64_t> CellMethod::far_counts(FarRange far) const {
    std::vector<int64_t> counts(lists.ncell());
    for (int c = 0; c < lists.ncell(); c++) {
        counts[c] = lists.count_before(c, far.end);
    }
    return counts;
}

std::vector<int32_t> CellMethod::slots_of(
        const std::vector<int32_t>& cells,
        const std::vector<int64_t>& counts) const {
    std::vector<int32_t> slots;
    for (int32_t c : cells) {
        const size_t first = slots.size();
        slots.resize(first + counts[c]);
        lists.copy_slots(c, counts[c], slots.data() + first);
    }
    std::sort(slots.begin(), slots.end());
    return slots;
}

std::vector<std::vector<int32_t>> CellMethod::select(
        const HeadData& data,
        const std::vector<GroundTruth>&,
        int64_t token,
        FarRange far,
        int64_t limit) const {
    const int group = data.group, ncell = lists.ncell();
    std::vector<int32_t> head(group);
    std::iota(head.begin(), head.end(), 0);
    const std::vector<int64_t> position(group, token);
    RoutingInput input;
    input.n = group;
    input.d = data.d;
    input.pre_rope = data.query_pre(token, 0);
    input.post_rope = data.query_post(token, 0);
    input.position = position.data();
    input.head = head.data();
    std::vector<float> scores(size_t(group) * ncell);
    const CellStats stats = lists.stats();
    partition.query->scores(input, &stats, scores.data());
    const auto counts = far_counts(far);
    const auto taken = [&](const float* s) {
        return slots_of(
                take_cells(
                        ncell,
                        s,
                        counts.data(),
                        ncell,
                        limit,
                        /*at_least_one=*/false),
                counts);
    };
    if (share_group) {
        std::vector<float> shared(ncell);
        share_scores(
                group,
                ncell,
                scores.data(),
                counts.data(),
                data.scale,
                shared.data());
        return std::vector<std::vector<int32_t>>(group, taken(shared.data()));
    }
    std::vector<std::vector<int32_t>> chosen;
    for (int h = 0; h < group; h++) {
        chosen.push_back(taken(scores.data() + int64_t(h) * ncell));
    }
    return chosen;
}

std::vector<double> CellMethod::ceiling(
        const std::vector<GroundTruth>& truth,
        FarRange far,
        int64_t limit) const {
    const int ncell = lists.ncell();
    const auto group = static_cast<int>(truth.size());
    const auto counts = far_counts(far);
    std::vector<double> mass(size_t(group) * ncell, 0.0);
    for (int h = 0; h < group; h++) {
        for (int64_t j = far.begin; j < far.end; j++) {
            mass[h * ncell + lists.cell_of(j)] += truth[h].mass[j];
        }
    }
    std::vector<double> result(group, 0.0);
    for (int h = 0; h < group; h++) {
        // One head's mass, or that of all of them.
        const int first = share_group ? 0 : h;
        const int last = share_group ? group : h + 1;
        std::vector<float> per_key(ncell, -INFINITY);
        for (int c = 0; c < ncell; c++) {
            double sum = 0;
            for (int g = first; g < last; g++) {
                sum += mass[g * ncell + c];
            }
            if (counts[c] > 0) {
                per_key[c] = static_cast<float>(sum / counts[c]);
            }
        }
        for (int32_t c :
             take_cells(
                     ncell,
                     per_key.data(),
                     counts.data(),
                     ncell,
                     limit,
                     /*at_least_one=*/false)) {
            result[h] += mass[h * ncell + c];
        }
    }
    return result;
}

double CellMethod::index_bytes(const HeadData&) const {
    // Query heads of a group share centroids, and the counts are read too.
    return static_cast<double>(partition.query->bytes_read()) +
            lists.ncell() * sizeof(int32_t);
}

} // namespace faiss_saap::benchs
