/// A trained query assigner that also looks at the cells of the sequence.
#pragma once

#include <memory>
#include <vector>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/QueryClassifier.h>

namespace faiss_saap {

/// What a BlendAssigner adds up for a query q and a cell with n keys, all in
/// the unit of q.k:
/// - classifier: the classifier's score;
/// - mean:       q.mean of the cell's keys;
/// - newest:     log(mean of exp(scale * q.k)) / scale over the cell, its
///               newest key taken as it is and the others at their mean;
/// - age:        -log(1 + tokens since the cell's newest key);
/// - count:      log(n).
constexpr int kBlendFeatures = 5;

/// Weights of these for one query head.
struct BlendWeights {
    float classifier = 1, mean = 0, newest = 0, age = 0, count = 0;

    bool operator==(const BlendWeights& other) const;
};

/// Scores the cells of a partition of de-rotated keys by a classifier, which
/// knows what queries ask for, and by statistics of the sequence's own rotated
/// keys, which know where these stand: a weighted sum with few weights per
/// query head. Needs NEEDS_PRE_ROPE | NEEDS_POST_ROPE | NEEDS_POSITION |
/// NEEDS_STATS | NEEDS_NEWEST_KEYS, and NEEDS_HEAD where the group has several
/// heads; empty cells score -infinity.
struct BlendAssigner : CellAssigner {
    std::shared_ptr<const QueryClassifier> classifier;
    std::vector<BlendWeights> weights; ///< one for each query head
    float scale;                       ///< attention scale

    /// @param scale  positive
    /// @throws faiss::FaissException when the classifier is null, the weights
    ///         are not one for each query head, or a number is not finite
    BlendAssigner(
            std::shared_ptr<const QueryClassifier> classifier,
            std::vector<BlendWeights> weights,
            float scale);

    /// @throws faiss::FaissException also for a head outside 0 .. group - 1
    void scores(const RoutingInput&, const CellStats*, float*) const override;
    /// All query heads of the group together, two vectors per cell of the
    /// sequence included.
    size_t bytes_read() const override;

    /// What the weights are for.
    /// @param out  size n * kBlendFeatures * ncell; 0 for an empty cell
    void features(const RoutingInput&, const CellStats*, float* out) const;

   private:
    template <class Body>
    void for_each_query(
            const RoutingInput&,
            const CellStats*,
            const Body& body) const;
};

/// A query at a moment of decoding, for learning weights.
struct BlendExample {
    std::vector<float> features; ///< of the cells with far keys, size
                                 ///< kBlendFeatures * cells
    std::vector<float> mass;     ///< attention mass of their far keys, size cells
    std::vector<float> count;    ///< their far keys, size cells
    float weight = 1;            ///< of the query's loss
};

/// Weights for one query head: those with the least cross-entropy between the
/// mass per cell (normalised) and the softmax of scale * score + log(count),
/// what train_partition teaches classifiers. Convex, solved by Newton's method:
/// there is one answer, whatever the order or the machine.
///
/// Examples without mass or weight are skipped; where no other is left, the
/// weights are those of the classifier alone.
/// @throws faiss::FaissException when an example's sizes disagree or a value is
///         not finite
BlendWeights fit_blend(const std::vector<BlendExample>& examples, float scale);

} // namespace faiss_saap
