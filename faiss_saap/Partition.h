/// A partition of the key space into cells, with its two assigners.
#pragma once

#include <memory>

#include <faiss/MetricType.h>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/rope.h>

namespace faiss_saap {

/// Cells with distinct assigners for keys and queries. Immutable and cheap to
/// copy; partitions learnt offline and per sequence differ only in who made
/// them and how long they live.
struct Partition {
    std::shared_ptr<const CellAssigner> key;   ///< puts a key into one cell
    std::shared_ptr<const CellAssigner> query; ///< ranks cells for a query
    /// needed where an assigner has NEEDS_PRE_ROPE and vectors come rotated
    RopeParams rope;

    int d() const;
    int ncell() const;

    /// @throws faiss::FaissException when an assigner is missing, the two
    ///         disagree on d or ncell, the key assigner needs statistics or query
    ///         heads, or `rope` is out of range
    void check() const;
};

/// Parameters of k-means, `faiss::Clustering` underneath.
struct KMeansParams {
    int niter = 10;
    /// unit-length centroids, keys assigned by inner product
    bool spherical = false;
    int seed = 1234;
    bool verbose = false;
};

/// Learns a partition from keys: k-means for the keys; queries are compared with
/// the cells' means, by `metric`.
///
/// Keys with L2 and queries with the inner product is the asymmetric choice
/// that needs no training queries: a k-means cell is compact, and q.mean is
/// what attention in it looks like from afar. All n keys are used.
///
/// @param x      size n * d, n >= ncell, finite
/// @param space  NEEDS_PRE_ROPE or NEEDS_POST_ROPE: what x is
/// @param rope   stored in the partition
/// @param metric  what queries look for: METRIC_INNER_PRODUCT, as attention does, or
///                METRIC_L2
/// @throws faiss::FaissException on wrong input
Partition kmeans_partition(
        int64_t n,
        int d,
        const float* x,
        int ncell,
        RoutingNeeds space,
        const KMeansParams& params = {},
        const RopeParams& rope = {},
        faiss::MetricType metric = faiss::METRIC_INNER_PRODUCT);

/// A partition whose queries are assigned exactly as its keys, as in a plain
/// faiss::IndexIVF.
Partition symmetric(const Partition& partition);

/// Means of the vectors of each cell.
/// @param cells  cell of each vector, size n; negative ones are skipped
/// @param means  output, size ncell * d; an empty cell keeps what is there
void cell_means(
        int64_t n,
        int d,
        const float* x,
        const int32_t* cells,
        int ncell,
        float* means);

} // namespace faiss_saap
