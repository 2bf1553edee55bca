/// Ways to choose far keys, behind one interface.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <faiss_saap/CellLists.h>
#include <faiss_saap/Partition.h>

#include "GroundTruth.h"

namespace faiss_saap::benchs {

/// A method sees the keys of one head in order and is asked which of them a
/// query should read.
struct Method {
    std::string name;

    explicit Method(std::string n) : name(std::move(n)) {}
    virtual ~Method() = default;

    /// Lists the keys of slots sink .. end - 1 that are not listed yet.
    virtual void list_until(const HeadData& data, int64_t end) = 0;

    /// Far keys for the queries at `token`, at most `limit` for each query head
    /// of the group, as the index would choose them. Thread-safe.
    /// @param truth  of each query head
    /// @return the chosen keys of each query head, ascending
    virtual std::vector<std::vector<int32_t>> select(
            const HeadData& data,
            const std::vector<GroundTruth>& truth,
            int64_t token,
            FarRange far,
            int64_t limit) const = 0;

    /// Mass of the far keys, for each query head, when the method's cells are
    /// taken by their true mass per key; NaN for methods without cells.
    virtual std::vector<double> ceiling(
            const std::vector<GroundTruth>& truth,
            FarRange far,
            int64_t limit) const;

    /// Whether keys listed after a query's far keys would mislead it.
    virtual bool needs_newest_keys() const {
        return false;
    }

    /// Bytes that choosing reads for one query, all heads of the group
    /// together.
    virtual double index_bytes(const HeadData& data) const = 0;
};

/// Best keys one by one, by their true attention weight.
struct OracleTopK : Method {
    OracleTopK() : Method("oracle_topk") {}
    void list_until(const HeadData&, int64_t) override {}
    std::vector<std::vector<int32_t>> select(
            const HeadData&,
            const std::vector<GroundTruth>& truth,
            int64_t,
            FarRange,
            int64_t limit) const override;
    double index_bytes(const HeadData& data) const override;
};

/// Cells of a partition, by the scores of its query assigner.
struct CellMethod : Method {
    Partition partition;
    CellLists lists;
    /// the query heads of the group read the same cells, by their summed mass
    bool share_group;

    CellMethod(
            std::string name,
            Partition partition,
            int64_t sink,
            bool share_group = false);

    void list_until(const HeadData& data, int64_t end) override;
    std::vector<std::vector<int32_t>> select(
            const HeadData&,
            const std::vector<GroundTruth>& truth,
            int64_t token,
            FarRange,
            int64_t limit) const override;
    std::vector<double> ceiling(
            const std::vector<GroundTruth>&,
            FarRange,
            int64_t limit) const override;
    double index_bytes(const HeadData& data) const override;
    bool needs_newest_keys() const override {
        return lists.with_newest_keys();
    }

   private:
    std::vector<int64_t> far_counts(FarRange far) const;
    std::vector<int32_t> slots_of(
            const std::vector<int32_t>& cells,
            const std::vector<int64_t>& counts) const;
    int64_t listed_ = 0;
};

} // namespace faiss_saap::benchs
