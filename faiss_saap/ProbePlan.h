/// What the queries of one KV head probe.
#pragma once

#include <cstdint>
#include <string>

namespace faiss_saap {

/// Who ranks the cells of a trained partition for a query.
enum class TrainedQuery {
    none,       ///< nobody: the trained partition is not probed
    classifier, ///< the QueryClassifier
    mean,       ///< a CellMeanAssigner
    blend,      ///< the BlendAssigner
};

/// As files and tables say it: "none", "classifier", "mean", "blend".
const char* name(TrainedQuery query);
/// @throws faiss::FaissException when there is none of this name
TrainedQuery trained_query(const std::string& name);

/// Which partitions a KV head has and how much its queries read through each:
/// the trained one, cells of the sequence's own rotated keys
/// (`sequence_partitions`), or both. `choose_plan` finds it, a .saap file
/// carries it, and a `LayerPlan` hands it to an AttentionAdapter.
struct ProbePlan {
    int layer = 0, kv_head = 0; ///< the model's numbers

    TrainedQuery trained = TrainedQuery::none;
    /// far keys read through the trained cells at most, as a fraction of those
    /// there are
    double trained_share = 0;
    /// tokens of a segment, where the trained cells are cut by position (a
    /// SegmentedAssigner; with `mean` alone); 0: they are not
    int64_t segment = 0;
    int keys_per_cell = 0; ///< of the sequence's own cells; 0: it has none
    double own_share = 0;  ///< far keys read through these, likewise

    int64_t tokens = 0; ///< length of the texts it is meant for
    /// bytes that a token may read, as a fraction of the head's keys and values
    /// at that length: those of the index and of what is read through it
    double byte_budget = 0;
    /// on the texts that it was chosen by, means over the query heads: mass
    /// recall and |o - o*| / |o*|
    double recall = 0, output_error = 0;

    /// @throws faiss::FaissException naming the field that is out of range, or
    ///         when nothing is probed
    void check() const;
};

} // namespace faiss_saap
