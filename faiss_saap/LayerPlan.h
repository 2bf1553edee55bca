/// From plans in a file to the arguments of an AttentionAdapter.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/PartitionSet.h>

namespace faiss_saap {

/// What an adapter of one layer needs to do as the plans of a PartitionSet say:
///
///     LayerPlan plan(set, layer, heads_kv);
///     AdapterParams params;
///     params.policy = plan.policy;
///     AttentionAdapter adapter(params, plan.trained);
///     int64_t sequence = adapter.create(plan.own(prefill, sink, n));
///
/// On a GPU, adapters refuse the policy: KV heads have shares of their own.
struct LayerPlan {
    HeadPartitions trained; ///< of every sequence; a KV head may have none
    std::vector<int> keys_per_cell; ///< of each KV head's own cells; 0: none
    ProbePolicy policy;     ///< with head_split, and no other limit

    /// @throws faiss::FaissException when a KV head of 0 .. heads_kv - 1 has no
    ///         plan, or its plan asks for what was not trained
    LayerPlan(const PartitionSet& set, int layer, int heads_kv);

    /// A sequence's own partitions, for `create`.
    /// @param prefill  its keys; slots begin .. end - 1 are read
    HeadPartitions own(
            const KvView& prefill,
            int64_t begin,
            int64_t end,
            const KMeansParams& params = {}) const;
};

/// The trained partition as a plan wants it: with its query assigner, and cut
/// into segments.
/// @throws faiss::FaissException where the plan probes none, or a blend that was
///         not trained
Partition planned_partition(
        const TrainedPartition& trained,
        const ProbePlan& plan);

} // namespace faiss_saap
