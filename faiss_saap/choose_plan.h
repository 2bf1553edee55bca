/// Choosing what a KV head probes, on recorded attention.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/ProbePlan.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/train_partition.h>

namespace faiss_saap {

struct PlanParams {
    /// bytes that a token may read, as a fraction of a head's keys and values:
    /// those that choosing reads and those of the keys and values chosen
    double byte_budget = .1;
    int64_t sink = 16;    ///< first tokens, always attended
    int64_t window = 256; ///< most recent tokens, likewise
    float scale = 0;      ///< attention scale; 0: 1 / sqrt(d)

    /// what is there of a text before its queries ask; the sequence's own cells
    /// are made from it
    double prefill = .5;
    int queries = 64; ///< tokens of each text that ask, evenly spaced
    /// last tokens of a text that looks something up: all of them ask, and
    /// everything before them is there already
    int64_t asked = 100;

    std::vector<int> keys_per_cell = {16, 32, 64}; ///< of own cells, to try
    /// segments of a text that trained cells are cut into, to try
    std::vector<int> segments = {4, 8, 16};
    /// shares of the keys read through the trained cells where both partitions
    /// are probed, to try
    std::vector<double> splits = {.25, .5, .75};
    KMeansParams kmeans; ///< of own cells

    /// @throws faiss::FaissException naming the field that is out of range
    void check() const;
};

/// How far a plan may exceed its budget, as a fraction of it.
constexpr double kBudgetTolerance = .02;

/// How a plan does on a text. Means over the query heads of the group.
struct PlanFigures {
    double recall = 1;       ///< mass of far keys read over that of all
    double output_error = 0; ///< |o - o*| / |o*|, mean over the queries
    double selectivity = 0;  ///< far keys read, as a fraction of all
    double bytes = 0; ///< that and the index, as a fraction of keys and values
    double far_mass = 0;     ///< mean attention mass of the far keys

    /// What choosing makes small: mass and meaning at once.
    double loss() const {
        return 1 - recall + output_error;
    }
};

/// Means over texts of the figures of one plan; [text][plan].
/// @throws faiss::FaissException when a text has none of it
PlanFigures mean_figures(
        const std::vector<std::vector<PlanFigures>>& texts,
        size_t plan);

/// Bytes that an assigner reads to score one token's queries, all heads of the
/// group together: a classifier's weights as they are stored, statistics and
/// representatives at two bytes a number, as caches have them.
/// @param filled  cells that have keys, where the assigner needs statistics: of
///                others none are read; negative: all
double scoring_bytes(const CellAssigner& query, int filled = -1);

/// Every plan that is tried: the trained cells by classifier, means, means of
/// segments and, where trained, blend; own cells of each size; both (but for
/// segments) with each split. Each may spend on keys what its index leaves of
/// the budget; those whose index leaves nothing are not among them.
/// @param tokens  length of the texts that the plan is for
/// @throws faiss::FaissException when none is left
std::vector<ProbePlan> candidate_plans(
        const TrainedPartition& trained,
        int64_t tokens,
        const PlanParams& params = {});

/// How plans of one KV head do on a text, by an AttentionAdapter that decodes
/// it. The result is in the order of `plans`. Single-threaded inside where it
/// is called from a parallel region.
/// @param lookup  the last `asked` tokens ask, see PlanParams
/// @throws faiss::FaissException when the text is too short to ask anything, or
///         is not of the model that was trained on
std::vector<PlanFigures> measure_plans(
        const Trace& text,
        const TrainedPartition& trained,
        const std::vector<ProbePlan>& plans,
        const PlanParams& params = {},
        bool lookup = false);

/// The plans with shares that spend the budget as measured: what two partitions
/// both reach is read once, and cells seldom fill a share.
/// @param texts  figures of each text, in the order of `plans`, at least one
std::vector<ProbePlan> spend_budget(
        std::vector<ProbePlan> plans,
        const std::vector<std::vector<PlanFigures>>& texts);

/// The plan with the least mean loss over the texts, of those that are no worse
/// than the trained classifier alone on what is looked up: mass that ordinary
/// text moves is not what finds a needle. Plans that are worse, or that exceed the
/// budget by more than kBudgetTolerance, as coarse cells do, come last.
/// @param texts    figures of each text, in the order of `plans`, at least one
/// @param lookups  of each text that looks something up; may be empty
ProbePlan choose_plan(
        const std::vector<ProbePlan>& plans,
        const std::vector<std::vector<PlanFigures>>& texts,
        const std::vector<std::vector<PlanFigures>>& lookups = {});

} // namespace faiss_saap
