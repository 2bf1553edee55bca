/// An inverted-file index with distinct assigners for keys and queries, on one
/// CUDA device.
#pragma once

#include <memory>
#include <vector>

#include <faiss_saap/IndexAsymmetricIVF.h>
#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Where an index lives and how it stores vectors. Fixed at construction.
struct GpuIndexParams {
    int device = 0;
    cudaStream_t stream = nullptr; ///< of all work; null: the default stream.
                                   ///< Belongs to the caller, outlives the index
    bool float16 = false;          ///< vectors are kept as float16
    size_t slab_bytes = size_t(32) << 20; ///< memory grows by this much, at least
                                          ///< one page of 32 vectors
    size_t temporary_bytes = size_t(256) << 20; ///< searches and additions work
                                                ///< in parts of about this size
};

/// How a search is cut up.
struct SearchPlan {
    int64_t queries; ///< at a time
    int splits;      ///< blocks that share the cells of one query
};

/// Few queries share their cells among blocks so that the device is busy; many
/// are taken in parts so that temporary memory is bounded.
/// @param n       queries, at least 1
/// @param nprobe  1 to ncell
/// @param multiprocessors  of the device
SearchPlan plan_search(
        int64_t n,
        int d,
        int ncell,
        int nprobe,
        int k,
        int multiprocessors,
        size_t temporary_bytes);

/// The GPU counterpart of IndexAsymmetricIVF, with the interface of
/// faiss::Index. Compare faiss::gpu::GpuIndexIVFFlat.
///
/// Vectors are added on the device: they are assigned, sorted by cell and
/// written into pages of 32, and a cell is a chain of pages. Pages come from
/// slabs, so that growing moves no vector; there are no lists and no map of ids
/// on the host. Storage is float32 or float16, metrics are L2 and inner product.
///
/// Assigners are lowered to plain arrays: a key assigner must be a
/// QuantizerAssigner over a faiss::IndexFlat, a query assigner that or a
/// QueryClassifier of one query head. Others are refused.
///
/// Every pointer to vectors, ids or results may be host memory or memory of the
/// index's device, which is read and written in the order of the index's stream.
/// Calls return when their work is done. Results equal those of the CPU index,
/// except that neighbours whose distances differ by rounding may change places.
///
/// Not on the device: range_search and merge_from, which throw, and files: copyTo
/// an index on the CPU and write that.
///
/// Searches may run concurrently (they take turns on the stream); whatever
/// changes the index needs exclusive access. Vectors that hold NaN or infinity
/// are refused. All errors are faiss::FaissException and leave the index as it
/// was, running out of device memory included.
struct GpuIndexAsymmetricIVF : faiss::Index {
    int ncell = 0;
    size_t nprobe = 1; ///< cells to probe; more than ncell is clamped. At most
                       ///< 2,048, or all
    CellTraining training;

    /// Cells are learnt by `train`.
    /// @param ncell  1 to 65,536
    /// @throws faiss::FaissException for a device that is not there or too old
    GpuIndexAsymmetricIVF(
            int d,
            int ncell,
            faiss::MetricType metric,
            const GpuIndexParams& params = {});

    /// Cells are given.
    GpuIndexAsymmetricIVF(
            const Partition& partition,
            faiss::MetricType metric,
            const GpuIndexParams& params = {});

    /// A copy of a trained index on the CPU. Its storage decides on float16.
    explicit GpuIndexAsymmetricIVF(
            const IndexAsymmetricIVF& index,
            const GpuIndexParams& params = {});

    ~GpuIndexAsymmetricIVF() override;

    /// Becomes a copy of a trained index on the CPU, whose storage must be
    /// faiss::IndexIVFFlat or an IndexIVFScalarQuantizer of QT_fp16.
    void copyFrom(const IndexAsymmetricIVF& index);
    /// Makes `index` a copy of this one, vectors of a cell in the order in which
    /// they were added.
    void copyTo(IndexAsymmetricIVF* index) const;

    /// Learns cells with k-means on the device, unless they are given; then it
    /// does nothing. Not while the index holds vectors.
    /// @param x  size n * d, n >= ncell
    void train(idx_t n, const float* x) override;

    /// The assigners; replace the query assigner at any time.
    const Partition& partition() const;
    void set_query_assigner(std::shared_ptr<const CellAssigner> query);

    /// Adds vectors with ids ntotal .. ntotal + n - 1. As in Faiss, ntotal
    /// shrinks with remove_ids: use add_with_ids after that.
    /// @param n  ntotal + n is below 2^31
    /// @param x  size n * d; stored as float16 no component may exceed 65504
    void add(idx_t n, const float* x) override;
    /// @param xids  size n, not negative; duplicates are kept side by side.
    ///              Null: as `add`
    void add_with_ids(idx_t n, const float* x, const idx_t* xids) override;

    /// @param k       1 to 2,048
    /// @param params  null, or parameters as IndexAsymmetricIVF takes them, of
    ///                which sel and max_codes are refused
    void search(
            idx_t n,
            const float* x,
            idx_t k,
            float* distances,
            idx_t* labels,
            const faiss::SearchParameters* params = nullptr) const override;

    /// Throws.
    void range_search(
            idx_t n,
            const float* x,
            float radius,
            faiss::RangeSearchResult* result,
            const faiss::SearchParameters* params = nullptr) const override;

    /// Vectors as they are stored, float16 rounding included. Looks through the
    /// ids of all vectors: ask for many at once.
    /// @param recons  output, size ni * d
    /// @throws faiss::FaissException when an id i0 .. i0 + ni - 1 is not in the
    ///         index
    void reconstruct_n(idx_t i0, idx_t ni, float* recons) const override;
    void reconstruct(idx_t key, float* recons) const override;

    /// Any selector works: ids visit the host to be asked about. The order of
    /// the vectors that stay is kept, and empty pages are used again.
    size_t remove_ids(const faiss::IDSelector& sel) override;

    /// Removes all vectors; stays trained and keeps its memory.
    void reset() override;

    /// Takes memory for so many more vectors, however they fall into cells.
    void reserveMemory(size_t n);
    /// Gives back memory that holds nothing.
    /// @return  bytes
    size_t reclaimMemory();

    /// Vectors of each cell, size ncell.
    std::vector<int32_t> list_sizes() const;
    /// ncell * sum of squared sizes / squared sum: 1 when all cells are equal
    /// (0 when there is no vector), as faiss::InvertedLists has it.
    double imbalance_factor() const;
    /// Bytes of device memory that the lists hold, used or not.
    size_t memory() const;

   private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace faiss_saap::gpu
