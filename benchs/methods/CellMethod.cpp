#include "CellMethod.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <faiss_saap/ProbePolicy.h>
#include <faiss_saap/SegmentedAssigner.h>
#include <faiss_saap/choose_plan.h>

namespace faiss_saap::benchs {

CellMethod::CellMethod(CellLists l, int64_t sink, bool share)
        : lists(std::move(l)), share_group(share), sink_(sink) {}

void CellMethod::build(const HeadData& data, int64_t end) {
    const int64_t begin = listed(), n = end - begin;
    if (n <= 0) {
        return;
    }
    std::vector<int32_t> cells(n);
    assign(data, begin, end, cells.data());
    for (int64_t i = 0; i < n; i++) {
        const int64_t slot = begin + i;
        lists.append(
                cells[i],
                data.keys_post.data() + slot * data.d,
                data.position[slot]);
    }
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

std::vector<double> CellMethod::cell_masses(const Step& step) const {
    const int ncell = lists.ncell();
    std::vector<double> mass(size_t(step.data.group) * ncell, 0.0);
    for (int h = 0; h < step.data.group; h++) {
        for (int64_t j = step.far.begin; j < step.far.end; j++) {
            mass[h * ncell + lists.cell_of(j)] += step.truth[h].mass[j];
        }
    }
    return mass;
}

Selection CellMethod::probe(const Step& step, int64_t limit) const {
    const int group = step.data.group, ncell = lists.ncell();
    std::vector<float> scores(size_t(group) * ncell);
    score(step, scores.data());
    const auto counts = far_counts(step.far);
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
    Selection selection;
    // Beside the scores, the counts are read.
    selection.index_bytes =
            scoring_bytes(step.data) + ncell * sizeof(int32_t);
    if (share_group) {
        std::vector<float> shared(ncell);
        share_scores(
                group,
                ncell,
                scores.data(),
                counts.data(),
                step.data.scale,
                shared.data());
        selection.slots.assign(group, taken(shared.data()));
    } else {
        for (int h = 0; h < group; h++) {
            selection.slots.push_back(
                    taken(scores.data() + int64_t(h) * ncell));
        }
    }
    return selection;
}

std::vector<double> CellMethod::ceiling(const Step& step, int64_t limit)
        const {
    const int ncell = lists.ncell();
    const int group = step.data.group;
    const auto counts = far_counts(step.far);
    const std::vector<double> mass = cell_masses(step);
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

PartitionMethod::PartitionMethod(Partition p, int64_t sink, bool share)
        : CellMethod(
                  CellLists(
                          p.ncell(),
                          p.d(),
                          sink,
                          p.query->needs & NEEDS_STATS,
                          nullptr,
                          p.query->needs & NEEDS_NEWEST_KEYS),
                  sink,
                  share),
          partition(std::move(p)) {}

void PartitionMethod::assign(
        const HeadData& data,
        int64_t begin,
        int64_t end,
        int32_t* cells) {
    RoutingInput input;
    input.n = end - begin;
    input.d = data.d;
    input.pre_rope = data.keys_pre.data() + begin * data.d;
    input.post_rope = data.keys_post.data() + begin * data.d;
    input.position = data.position.data() + begin;
    partition.key->assign(input, nullptr, 1, cells, nullptr);
}

void PartitionMethod::score(const Step& step, float* scores) const {
    const HeadData& data = step.data;
    std::vector<int32_t> head(data.group);
    std::iota(head.begin(), head.end(), 0);
    const std::vector<int64_t> position(data.group, step.token);
    RoutingInput input;
    input.n = data.group;
    input.d = data.d;
    input.pre_rope = data.query_pre(step.token, 0);
    input.post_rope = data.query_post(step.token, 0);
    input.position = position.data();
    input.head = head.data();
    const CellStats stats = lists.stats();
    partition.query->scores(input, &stats, scores);
}

double PartitionMethod::scoring_bytes(const HeadData&) const {
    const auto filled = [this] {
        const int32_t* count = lists.stats().count;
        return lists.ncell() -
                static_cast<int>(std::count(count, count + lists.ncell(), 0));
    };
    // Of content and segment, a cell may never be seen.
    const bool segmented =
            dynamic_cast<const SegmentedAssigner*>(partition.key.get());
    return faiss_saap::scoring_bytes(
            *partition.query, segmented ? filled() : -1);
}

} // namespace faiss_saap::benchs
