/// What training a query classifier minimises, with its gradient.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/QueryClassifier.h>

namespace faiss_saap {

/// Queries of n tokens, asked by every query head of a group, and where their
/// attention mass lies. The arrays belong to the caller.
struct ClassifierBatch {
    int64_t n = 0;
    const float* x = nullptr;    ///< pre-RoPE queries, size group * n * d
    /// attention mass of the far keys of each cell, size group * n * ncell
    const float* mass = nullptr;
    const float* total = nullptr; ///< sums of `mass`, size group * n
    /// logarithm of the far keys in each cell, -infinity for none; size
    /// n * ncell
    const float* log_count = nullptr;
    /// factor of each query's loss, size group * n; queries with 0 are skipped
    const float* weight = nullptr;
};

/// Matrices between the layers, kept between calls to save allocations.
struct ClassifierWorkspace {
    std::vector<std::vector<float>> hidden, up;
    std::vector<float> logits, gradient_h, gradient_u;
};

/// Sum over the queries of weight * cross-entropy between their mass per cell
/// (normalised) and the softmax over cells of logit + log_count. The logit of a
/// cell thus becomes the logarithm of the mass per key, up to a constant.
///
/// @param parameters  size parameter_count(shape); its scores are the logits
/// @param gradient    size parameter_count(shape); added to
/// @return the loss
double classifier_loss(
        const ClassifierShape& shape,
        const float* parameters,
        const ClassifierBatch& batch,
        float* gradient,
        ClassifierWorkspace& workspace);

} // namespace faiss_saap
