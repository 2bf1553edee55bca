#include "Method.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <faiss_saap/ProbePolicy.h>

namespace faiss_saap::benchs {

double Method::ceiling(const GroundTruth&, FarRange, int64_t) const {
    return NAN;
}

std::vector<int32_t> OracleTopK::select(
        const HeadData&,
        const GroundTruth& truth,
        int64_t,
        int,
        FarRange far,
        int64_t limit) const {
    std::vector<int32_t> slots(far.size());
    std::iota(slots.begin(), slots.end(), static_cast<int32_t>(far.begin));
    const int64_t k = std::min<int64_t>(limit, far.size());
    std::nth_element(
            slots.begin(),
            slots.begin() + k,
            slots.end(),
            [&](int32_t a, int32_t b) { return truth.mass[a] > truth.mass[b]; });
    slots.resize(k);
    std::sort(slots.begin(), slots.end());
    return slots;
}

double OracleTopK::index_bytes(const HeadData& data) const {
    return static_cast<double>(data.tokens) * data.d * sizeof(float);
}

CellMethod::CellMethod(std::string n, Partition p, int64_t sink)
        : Method(std::move(n)),
          partition(std::move(p)),
          lists(partition.ncell(),
                partition.d(),
                sink,
                partition.query->needs & NEEDS_STATS),
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

std::vector<int32_t> CellMethod::select(
        const HeadData& data,
        const GroundTruth&,
        int64_t token,
        int head,
        FarRange far,
        int64_t limit) const {
    RoutingInput input;
    input.n = 1;
    input.d = data.d;
    input.pre_rope = data.query_pre(token, head);
    input.post_rope = data.query_post(token, head);
    input.position = data.position.data() + token;
    const int32_t head_of_group = head;
    input.head = &head_of_group;
    std::vector<float> scores(lists.ncell());
    const CellStats stats = lists.stats();
    partition.query->scores(input, &stats, scores.data());
    const auto counts = far_counts(far);
    return slots_of(
            take_cells(
                    lists.ncell(),
                    scores.data(),
                    counts.data(),
                    lists.ncell(),
                    limit,
                    /*at_least_one=*/false),
            counts);
}

double CellMethod::ceiling(
        const GroundTruth& truth,
        FarRange far,
        int64_t limit) const {
    const auto counts = far_counts(far);
    std::vector<double> mass(lists.ncell(), 0.0);
    for (int64_t j = far.begin; j < far.end; j++) {
        mass[lists.cell_of(j)] += truth.mass[j];
    }
    std::vector<float> per_key(lists.ncell(), -INFINITY);
    for (int c = 0; c < lists.ncell(); c++) {
        if (counts[c] > 0) {
            per_key[c] = static_cast<float>(mass[c] / counts[c]);
        }
    }
    double taken = 0;
    for (int32_t c :
         take_cells(
                 lists.ncell(),
                 per_key.data(),
                 counts.data(),
                 lists.ncell(),
                 limit,
                 /*at_least_one=*/false)) {
        taken += mass[c];
    }
    return taken;
}

double CellMethod::index_bytes(const HeadData&) const {
    // Query heads of a group share centroids, and the counts are read too.
    return static_cast<double>(partition.query->bytes_read()) +
            lists.ncell() * sizeof(int32_t);
}

} // namespace faiss_saap::benchs
