/// A query assigner without training: the means of a sequence's own cells.
#pragma once

#include <faiss_saap/CellAssigner.h>

namespace faiss_saap {

/// Scores a cell by the inner product of the rotated query with the mean of
/// the cell's rotated keys in this sequence. By Jensen's inequality this is a
/// lower bound of the logarithm of the mean attention weight in the cell. Needs
/// NEEDS_POST_ROPE | NEEDS_STATS; empty cells score -infinity.
struct CellMeanAssigner : CellAssigner {
    CellMeanAssigner(int d, int ncell);

    void scores(const RoutingInput&, const CellStats*, float*) const override;
    size_t bytes_read() const override;
};

} // namespace faiss_saap
