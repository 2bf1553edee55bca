/// How many cells a query probes, and who chooses them.
#pragma once

#include <cstdint>
#include <vector>

namespace faiss_saap {

/// Limits of one probe; all of them hold at once. Two exceptions: the best
/// non-empty cell is read (with `refine`, ranked) even where it exceeds them, and
/// an adapter reads few far keys (AdapterParams::dense_below) without asking.
struct ProbePolicy {
    int nprobe = 32; ///< cells at most, of each partition; clamped to ncell
    /// far keys at most, per KV head with share_group, else per query head
    int64_t max_keys = INT64_MAX;
    /// far keys at most, as a fraction of the far keys there are
    double max_selectivity = 1.0;
    /// the query heads of a KV head probe the same cells: each head's scores
    /// become attention mass per key and are summed. Reads fewer bytes at equal
    /// quality than a choice per head.
    bool share_group = true;
    /// above 1: cells with up to this many times the far keys that may be read
    /// are probed (nprobe at most), the keys in them are ranked one by one by
    /// their 4-bit codes (`KeyCodes`), and the best ones are read: the limit
    /// holds exactly, but for one key at least. Without max_keys or
    /// max_selectivity there is nothing to rank. Needs an adapter that keeps
    /// codes (AdapterParams::key_codes); GPU adapters refuse it.
    double refine = 1;
    /// share of the key limit for each partition of a KV head that has several,
    /// in sum at most 1; empty: equal shares. A key that two partitions reach
    /// counts for both while cells are chosen, and is read once. Of a partition
    /// whose share is 0 no cell is read, and of a head all of whose are, no far
    /// key, unless there are so few that an adapter reads them all.
    std::vector<double> split;
    /// shares of each KV head where heads differ, as a `LayerPlan` says:
    /// head_split[h] in place of `split`, one share for each partition, a single
    /// one too. They are limits by themselves: without max_keys and max_selectivity
    /// shares of all far keys, where `split` has nothing to share out. GPU adapters
    /// refuse it.
    std::vector<std::vector<double>> head_split;

    /// @throws faiss::FaissException naming the field that is out of range
    void check() const;
    /// The number of keys that max_keys and max_selectivity allow.
    int64_t key_limit(int64_t far_keys) const;
    /// The share of one of a head's partitions, the same for all heads.
    /// @throws faiss::FaissException with head_split, when `split` has
    ///         another number of shares, or there is no such partition
    double share(int partition, int npartition) const;
    /// The same for KV head `kv_head`, which may have shares of its own.
    /// @throws faiss::FaissException when there is no such head or partition
    double share(int kv_head, int partition, int npartition) const;
    /// Far keys that one of a head's partitions may propose, `refine` included.
    int64_t candidate_limit(
            int kv_head,
            int partition,
            int npartition,
            int64_t far_keys) const;
    /// Far keys that all of a head's partitions may propose together, each counted
    /// by every partition that reaches it; no limit where all far keys may be read.
    int64_t candidate_limit(int64_t far_keys) const;
    /// Far keys that a KV head (without share_group: a query head) may read, all
    /// its partitions together.
    int64_t head_limit(int kv_head, int npartition, int64_t far_keys) const;
};

/// Takes cells by descending score while they fit: a cell that would exceed
/// the limit is passed over for later ones that fit. Empty cells and cells
/// with a score of -infinity cost nothing and are never taken.
///
/// @param scores       size ncell
/// @param counts       far keys in each cell, size ncell
/// @param nprobe       cells at most
/// @param key_limit    keys at most
/// @param at_least_one take the best non-empty cell even where it exceeds
///                     key_limit: without it an aged partition, whose best
///                     cell has grown beyond the limit, would read nearly
///                     nothing that matters
/// @return the cells, best first
std::vector<int32_t> take_cells(
        int ncell,
        const float* scores,
        const int64_t* counts,
        int nprobe,
        int64_t key_limit,
        bool at_least_one);

/// Scores for a whole GQA group: the logarithm of the estimated attention mass
/// per key, exp(scale * score) / sum over cells of count * exp(scale * score),
/// summed over the heads.
///
/// @param scores        size nhead * ncell
/// @param counts        size ncell
/// @param scale         attention scale
/// @param group_scores  output, size ncell; -infinity for empty cells
void share_scores(
        int nhead,
        int ncell,
        const float* scores,
        const int64_t* counts,
        float scale,
        float* group_scores);

} // namespace faiss_saap
