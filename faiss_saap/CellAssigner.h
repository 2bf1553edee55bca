/// The interface that keys and queries meet at: something that scores the
/// cells of a partition.
#pragma once

#include <cstddef>
#include <cstdint>

namespace faiss_saap {

/// What a CellAssigner reads of its input: flags, combined with `|`.
enum RoutingNeeds : unsigned {
    NEEDS_PRE_ROPE = 1,  ///< vectors before (or after undoing) the rotation
    NEEDS_POST_ROPE = 2, ///< vectors as attention sees them
    NEEDS_POSITION = 4,  ///< the position of each vector
    NEEDS_STATS = 8,     ///< statistics of the cells of one sequence
    NEEDS_HEAD = 16,     ///< the query head of each vector within its GQA group
    NEEDS_NEWEST_KEYS = 32, ///< statistics with the newest key of each cell
};

/// Keys or queries to be routed. Pointers that the assigner does not need may
/// be null. The arrays belong to the caller.
struct RoutingInput {
    int64_t n = 0;                    ///< number of vectors
    int d = 0;                        ///< dimension of each
    const float* pre_rope = nullptr;  ///< size n * d
    const float* post_rope = nullptr; ///< size n * d
    const int64_t* position = nullptr; ///< size n, in tokens
    /// size n: 0 .. group - 1, the query head among those of its KV head
    const int32_t* head = nullptr;
};

/// Statistics of the cells of one sequence: of the keys that are listed now.
struct CellStats {
    const int32_t* count = nullptr;         ///< keys per cell, size ncell
    const float* mean_post_rope = nullptr;  ///< mean key, size ncell * d; zero
                                            ///< for an empty cell
    const int64_t* newest = nullptr; ///< position of the newest key, size
                                     ///< ncell; -1 for an empty cell
    const float* newest_post_rope = nullptr; ///< the newest key, size
                                             ///< ncell * d; zero for an empty
                                             ///< cell
};

/// Scores the cells of a partition for keys or for queries. A partition holds
/// two of these over the same cells, because keys and queries follow different
/// distributions (arXiv 2502.08246).
///
/// A score is an estimate of q.k for the keys of the cell, up to a constant
/// per vector: larger is better, and multiplied by the attention scale it is
/// the logarithm of the attention mass per key. That makes scores of several
/// query heads comparable, which choosing cells for a GQA group relies on.
///
/// Immutable after construction: every const method may be called from several
/// threads at once.
struct CellAssigner {
    int d = 0;          ///< dimension of the vectors
    int ncell = 0;      ///< number of cells, 1 to 65,536
    unsigned needs = 0; ///< which fields of the input are read (RoutingNeeds)
    int group = 0; ///< with NEEDS_HEAD: query heads that it tells apart; 0: any

    /// @throws faiss::FaissException when d or ncell is out of range
    CellAssigner(int d, int ncell, unsigned needs);
    virtual ~CellAssigner() = default;

    /// Scores of all cells.
    /// @param stats   may be null unless `needs` has NEEDS_STATS; keys newer
    ///                than the queries' far keys are not left out of it
    /// @param scores  output, size n * ncell; a cell that must not be probed
    ///                (an empty one, where the statistics tell) gets -infinity
    /// @throws faiss::FaissException when a needed field is null, the
    ///         dimension differs or n is negative
    virtual void scores(
            const RoutingInput& input,
            const CellStats* stats,
            float* scores) const = 0;

    /// The k best cells of each vector, best first.
    /// @param k       1 to ncell
    /// @param cells   output, size n * k; -1 where fewer than k cells have a
    ///                score above -infinity
    /// @param scores  output, size n * k, may be null
    virtual void assign(
            const RoutingInput& input,
            const CellStats* stats,
            int k,
            int32_t* cells,
            float* scores) const;

    /// Bytes of this assigner (and of the statistics it needs) that scoring
    /// one token's vectors reads, all query heads of the group together: the
    /// index's share of a decode step's memory traffic.
    virtual size_t bytes_read() const = 0;

   protected:
    /// Throws what `scores` and `assign` promise to throw.
    void check(const RoutingInput& input, const CellStats* stats) const;
    /// Throws unless there are k cells to find, at least one.
    void check_k(int k) const;
    /// The vectors of the space named in `needs`.
    const float* vectors(const RoutingInput& input) const;
};

} // namespace faiss_saap
