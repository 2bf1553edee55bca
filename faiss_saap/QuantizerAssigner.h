/// Any faiss::Index over cell representatives, as a CellAssigner.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/faiss_compat.h>

namespace faiss_saap {

/// Scores a cell by its representative in a coarse quantizer: vector number c
/// of the quantizer stands for cell c. With METRIC_INNER_PRODUCT the score is
/// q.c; with METRIC_L2 it is -|q-c|^2 / 2, which differs from q.c by the norms
/// and so stays in the same unit. Other metrics are refused.
///
/// Exact for faiss::IndexFlat. An approximate quantizer (HNSW, IVF) serves too;
/// cells it does not return score -infinity.
struct QuantizerAssigner : CellAssigner {
    std::shared_ptr<const faiss::Index> quantizer; ///< ncell vectors
    /// Those of a flat quantizer, size ncell * d, where bfloat16 holds all of them
    /// exactly, else empty: half the bytes to read for each query.
    std::vector<uint16_t> bfloat16_vectors;

    /// @param quantizer  trained, with at least one vector, all finite
    /// @param space      NEEDS_PRE_ROPE or NEEDS_POST_ROPE
    QuantizerAssigner(
            std::shared_ptr<const faiss::Index> quantizer,
            RoutingNeeds space);

    void scores(const RoutingInput&, const CellStats*, float*) const override;
    void assign(const RoutingInput&, const CellStats*, int k, int32_t*, float*)
            const override;
    size_t bytes_read() const override;

   private:
    void assign_to_best(
            const RoutingInput&,
            const CellStats*,
            int32_t*,
            float*) const;

    std::vector<float> half_norm; ///< |c|^2 / 2, for a flat L2 quantizer
};

} // namespace faiss_saap
