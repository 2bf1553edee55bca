/// An inverted-file index with distinct assigners for keys and queries.
#pragma once

#include <memory>

#include <faiss_saap/Partition.h>
#include <faiss_saap/faiss_compat.h>

namespace faiss_saap {

/// What one search did.
struct SearchStats {
    int64_t queries = 0;
    int64_t cells_probed = 0; ///< non-empty cells scanned, over all queries
    int64_t vectors_read = 0; ///< vectors compared, over all queries
};

/// Search parameters of an IndexAsymmetricIVF: those of faiss::IndexIVF
/// (nprobe, max_codes, sel) and a place for the statistics of this search.
/// A plain faiss::SearchParametersIVF is accepted too; quantizer_params are
/// refused, as the assigners take none.
struct SearchParametersAsymmetricIVF : faiss::SearchParametersIVF {
    SearchStats* stats = nullptr; ///< overwritten by the search, may be null
};

/// How `train` makes the cells where none are given.
struct CellTraining {
    KMeansParams kmeans;
    /// queries are compared with the cells' means, by the index's metric; false:
    /// assigned exactly as keys are, which is a plain faiss::IndexIVF
    bool asymmetric = true;
};

/// A faiss::Index whose vectors are put into cells by one assigner and whose
/// queries are sent to cells by another. Storage is any faiss::IndexIVF that
/// encodes vectors, not residuals: IndexIVFFlat, IndexIVFScalarQuantizer and
/// IndexIVFPQ with by_residual = false (a query's cell scores are no distances
/// that a residual codec could use). Its own quantizer is never asked and is
/// replaced by an empty one.
///
/// In Faiss, compare faiss::IndexIVFIndependentQuantizer. Deriving from
/// faiss::Index and not from IndexIVF is deliberate: stock faiss::write_index
/// and faiss::clone_index throw on it instead of silently dropping the query
/// assigner; use faiss_saap::write_index.
///
/// An index knows no positions and no sequences: assigners that need
/// NEEDS_POSITION or NEEDS_STATS are refused, and x is in the one space
/// (pre- or post-RoPE) that both assigners read.
///
/// Searches may run concurrently; whatever changes the index needs exclusive
/// access, as in Faiss. Vectors that hold NaN or infinity are refused. All
/// errors are faiss::FaissException and leave the index as it was (only
/// running out of memory inside Faiss's `add` may not).
struct IndexAsymmetricIVF : faiss::Index {
    std::unique_ptr<faiss::IndexIVF> lists; ///< the storage
    /// empty until trained; the query assigner may be exchanged at any time,
    /// the key assigner while the index is empty
    Partition partition;
    int ncell = 0;
    /// cells to probe; more than ncell is clamped, but a negative number in it refused
    size_t nprobe = 1;
    /// stop after this many vectors; 0, and what was negative: no limit
    size_t max_codes = 0;
    CellTraining training;
    bool cells_given = false; ///< `train` leaves the partition as it is

    /// Cells are learnt by `train`.
    /// @param lists  empty; its nlist is the number of cells
    explicit IndexAsymmetricIVF(std::unique_ptr<faiss::IndexIVF> lists);

    /// Cells are given. Trained at once unless the codec of `lists` needs
    /// training, which `train` then does without touching the cells.
    /// `lists` may hold vectors already, put there by the same key assigner,
    /// with ids that are not negative.
    /// Their quantizer is deleted where they own it: an assigner that uses it
    /// needs a copy (faiss::clone_index).
    IndexAsymmetricIVF(
            std::unique_ptr<faiss::IndexIVF> lists,
            Partition partition);

    /// Learns cells (unless they are given) and codec. May be called again, but
    /// not while the index holds vectors.
    /// @param x  size n * d, n >= ncell
    void train(idx_t n, const float* x) override;

    /// As `train`, then chooses how queries are assigned (compared with the
    /// means, or as keys) by what the training queries prefer: the recall
    /// of their 10 nearest training vectors at 5 % of the vectors read.
    /// Signature as of faiss::Index in 1.14.2.
    /// @param xq_train  size n_train_q * d, n_train_q > 0
    virtual void train_with_queries(
            idx_t n,
            const float* x,
            idx_t n_train_q,
            const float* xq_train);

    /// Adds vectors with ids ntotal .. ntotal + n - 1. Never re-trains. As in
    /// Faiss, ntotal shrinks with remove_ids: use add_with_ids after that.
    /// @param x  size n * d; with SQfp16 no component may exceed 65504
    void add(idx_t n, const float* x) override;
    /// @param xids  size n, not negative. Duplicates are refused where the
    ///              direct map is on; elsewhere kept side by side, as in Faiss.
    ///              Null: as `add`.
    void add_with_ids(idx_t n, const float* x, const idx_t* xids) override;

    /// @param params  null, faiss::SearchParameters (only sel),
    ///                SearchParametersIVF or SearchParametersAsymmetricIVF
    void search(
            idx_t n,
            const float* x,
            idx_t k,
            float* distances,
            idx_t* labels,
            const faiss::SearchParameters* params = nullptr) const override;

    /// All vectors closer than radius (or with a larger inner product) in the
    /// probed cells. As in Faiss, max_codes does not limit it.
    /// @param result  for n queries, and never used before
    void range_search(
            idx_t n,
            const float* x,
            float radius,
            faiss::RangeSearchResult* result,
            const faiss::SearchParameters* params = nullptr) const override;

    /// Cells of each query, best first; what `search` starts with.
    /// @param nprobe  1 to ncell
    /// @param cells   output, size n * nprobe, padded with -1
    void assign_queries(
            idx_t n,
            const float* x,
            size_t nprobe,
            idx_t* cells) const;

    /// Search in given cells.
    /// @param nprobe  cells per query
    /// @param cells   size n * nprobe; -1: none
    void search_preassigned(
            idx_t n,
            const float* x,
            idx_t k,
            size_t nprobe,
            const idx_t* cells,
            float* distances,
            idx_t* labels,
            const faiss::SearchParameters* params = nullptr) const;

    /// Any selector works, with or without direct map; asked by one thread.
    size_t remove_ids(const faiss::IDSelector& sel) override;

    /// Turns the map from ids to vectors on or off. `reconstruct` needs it;
    /// it costs a hash table of ntotal entries.
    /// @throws faiss::FaissException when it is turned on over duplicate ids
    void set_direct_map(bool on);
    /// @param key  an id in the index; needs the direct map
    void reconstruct(idx_t key, float* recons) const override;
    /// Vectors with ids i0 .. i0 + ni - 1, all of which must be there.
    /// Needs no direct map (search_and_reconstruct does).
    void reconstruct_n(idx_t i0, idx_t ni, float* recons) const override;

    /// Removes all vectors; stays trained.
    void reset() override;

    /// Moves all vectors of another index with the same key assigner and codec here.
    /// @param add_id  added to the ids that move
    void merge_from(faiss::Index& other, idx_t add_id = 0) override;
    void check_compatible_for_merge(const faiss::Index& other) const override;

    /// @throws faiss::FaissException unless `lists` and `partition`, public fields, fit the
    ///         index and each other; so does every function that needs them
    void check_partition() const;

   private:
    void check_lists() const;
    void check_call(idx_t n, const float* x, const char* name) const;
    /// The given cells, or new ones with distinct assigners.
    Partition train_cells(idx_t n, const float* x) const;
    void train_codec(idx_t n, const float* x);
};

} // namespace faiss_saap
