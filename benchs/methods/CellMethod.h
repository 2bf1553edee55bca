/// Methods that put keys into cells and read whole cells.
#pragma once

#include <faiss_saap/CellLists.h>
#include <faiss_saap/Partition.h>

#include "Method.h"

namespace faiss_saap::benchs {

/// What pages, segments and partitions have in common: a cell for each key, a
/// score for each cell, and cells taken by descending score while they fit.
struct CellMethod : Method {
    CellLists lists;
    /// the query heads of the group read the same cells, by their summed mass
    bool share_group;

    /// @param sink  the first far key
    CellMethod(CellLists lists, int64_t sink, bool share_group);

    /// Cell of each key of slots begin .. end - 1.
    virtual void assign(
            const HeadData& data,
            int64_t begin,
            int64_t end,
            int32_t* cells) = 0;
    /// Scores of the cells for each query head, as a CellAssigner's: estimates
    /// of q.k for the keys of a cell, -infinity for what must not be read.
    /// @param scores  output, size group * ncell
    virtual void score(const Step& step, float* scores) const = 0;
    /// Bytes that `score` reads, all query heads of the group together.
    virtual double scoring_bytes(const HeadData& data) const = 0;

    void build(const HeadData& data, int64_t end) override;
    Selection probe(const Step& step, int64_t limit) const override;
    std::vector<double> ceiling(const Step& step, int64_t limit) const override;

   protected:
    /// Far keys of each cell, size ncell.
    std::vector<int64_t> far_counts(FarRange far) const;
    /// The first counts[c] keys of each of these cells, ascending.
    std::vector<int32_t> slots_of(
            const std::vector<int32_t>& cells,
            const std::vector<int64_t>& counts) const;
    /// Attention mass of each cell, size group * ncell.
    std::vector<double> cell_masses(const Step& step) const;
    /// Where the next key goes.
    int64_t listed() const {
        return sink_ + lists.size();
    }

   private:
    int64_t sink_;
};

/// Cells of a partition, by the scores of its query assigner.
struct PartitionMethod : CellMethod {
    Partition partition;

    PartitionMethod(Partition partition, int64_t sink, bool share_group);

    void assign(const HeadData&, int64_t, int64_t, int32_t*) override;
    void score(const Step& step, float* scores) const override;
    double scoring_bytes(const HeadData& data) const override;
    bool needs_newest_keys() const override {
        return lists.with_newest_keys();
    }
};

} // namespace faiss_saap::benchs
