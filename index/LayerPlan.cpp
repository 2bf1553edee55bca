#include <faiss_saap/LayerPlan.h>

#include <algorithm>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/SegmentedAssigner.h>

#include "check.h"

namespace faiss_saap {

Partition planned_partition(const TrainedPartition& p, const ProbePlan& plan) {
    p.partition.check();
    switch (plan.trained) {
        case TrainedQuery::classifier:
            return p.partition;
        case TrainedQuery::mean: {
            Partition by_means = p.partition;
            if (plan.segment) {
                const int64_t most = 65536 / by_means.ncell();
                const int64_t wanted =
                        (std::max(plan.tokens, plan.segment) - 1) /
                                plan.segment +
                        1;
                by_means.key = std::make_shared<SegmentedAssigner>(
                        by_means.key,
                        plan.segment,
                        static_cast<int>(std::min(most, wanted)));
            }
            by_means.query = std::make_shared<CellMeanAssigner>(
                    by_means.d(), by_means.ncell());
            return by_means;
        }
        case TrainedQuery::blend:
            return p.blended();
        case TrainedQuery::none:
            break;
    }
    FAISS_THROW_FMT(
            "layer %d, KV head %d: a plan without a query assigner probes no "
            "trained partition",
            p.layer,
            p.kv_head);
}

LayerPlan::LayerPlan(const PartitionSet& set, int layer, int heads_kv) {
    FAISS_THROW_IF_NOT_FMT(
            heads_kv >= 1, "heads_kv = %d must be at least 1", heads_kv);
    for (int h = 0; h < heads_kv; h++) {
        const ProbePlan& plan = set.find_plan(layer, h);
        plan.check();
        trained.emplace_back();
        policy.head_split.emplace_back();
        if (plan.trained != TrainedQuery::none) {
            trained.back().push_back(
                    planned_partition(set.find(layer, h), plan));
            policy.head_split.back().push_back(plan.trained_share);
        }
        keys_per_cell.push_back(plan.keys_per_cell);
        if (plan.keys_per_cell > 0) {
            policy.head_split.back().push_back(plan.own_share);
        }
    }
    policy.nprobe = 65536; // the shares are the limit
}

HeadPartitions LayerPlan::own(
        const KvView& prefill,
        int64_t begin,
        int64_t end,
        const KMeansParams& params) const {
    FAISS_THROW_IF_NOT_FMT(
            prefill.heads == static_cast<int>(keys_per_cell.size()),
            "the view has %d KV heads, the plan %zd",
            prefill.heads,
            keys_per_cell.size());
    std::vector<int> ncell;
    for (int keys : keys_per_cell) {
        const int64_t most = std::clamp<int64_t>(end - begin, 1, 65536);
        ncell.push_back(
                keys ? static_cast<int>(std::clamp<int64_t>(
                               (end - begin) / keys, 1, most))
                     : 0);
    }
    return sequence_partitions(prefill, begin, end, ncell, params);
}

} // namespace faiss_saap
