/// The cells of another assigner, cut by position.
#pragma once

#include <memory>

#include <faiss_saap/CellAssigner.h>

namespace faiss_saap {

/// Puts keys into cells of content and of place: segments of `length` tokens
/// take turns with `nsegment` copies of the inner cells. Cell c of the copy for
/// segment s is s * inner->ncell + c.
///
/// A partition learnt offline has no notion of place, and the means of its cells
/// blur the rotations of keys from everywhere. Within a segment they are sharp,
/// and a cell is closed once its segment is over, so that it does not age.
///
/// For keys: with a CellMeanAssigner for the queries. A query is not in any
/// segment that it looks for; scored as if it were a key, it asks its own.
struct SegmentedAssigner : CellAssigner {
    std::shared_ptr<const CellAssigner> inner;
    int64_t length; ///< tokens of a segment
    int nsegment;   ///< after so many, cells are used again
    /// Of the segment of a position.
    /// @throws faiss::FaissException for a negative one, as all functions here do
    int64_t first_cell(int64_t position) const;

    /// @throws faiss::FaissException when inner is null or needs statistics,
    ///         length or nsegment is not positive, or there are more than 65,536
    ///         cells
    SegmentedAssigner(
            std::shared_ptr<const CellAssigner> inner,
            int64_t length,
            int nsegment);

    void scores(const RoutingInput&, const CellStats*, float*) const override;
    void assign(const RoutingInput&, const CellStats*, int k, int32_t*, float*)
            const override;
    size_t bytes_read() const override;
};

} // namespace faiss_saap
