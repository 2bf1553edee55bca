/// All methods by name.
#pragma once

#include <functional>
#include <map>

#include <faiss_saap/Partition.h>
#include <faiss_saap/PartitionSet.h>

#include "Method.h"

namespace faiss_saap::benchs {

/// What a method is made from.
struct Setup {
    const HeadData& data;
    int64_t sink = 16, window = 256;
    int64_t clustered = 0; ///< so many first keys may be seen by clustering
    int ncell = 1024;
    int niter = 10, seed = 1234; ///< of k-means and of random choices
    const PartitionSet* trained = nullptr;

    explicit Setup(const HeadData& d) : data(d), clustered(d.tokens) {}

    /// k-means of the clustered keys, queries by inner product with the cells'
    /// means. Methods that ask for the same cells get the same.
    Partition cells(RoutingNeeds space, bool spherical = false) const;

   private:
    mutable std::map<std::pair<RoutingNeeds, bool>, Partition> made_;
};

struct MethodEntry {
    std::string name;
    std::function<std::unique_ptr<Method>(const Setup&, bool share_group)> make;
    bool ours = false;        ///< of this library, not a baseline
    bool needs_trained = false; ///< Setup::trained
    bool needs_newest = false;  ///< keys listed as decoding would
    bool has_group = true; ///< one choice for the query heads of a KV head is
                           ///< possible: the name with "_group" appended
};

/// The entries of one file. A new method is one file with such a function, and
/// one line in MethodList.cpp.
using MethodEntries = std::vector<MethodEntry>;

/// Every method, those for groups included under names of their own.
const MethodEntries& all_methods();

/// @throws faiss::FaissException when there is none of this name
const MethodEntry& find_method(const std::string& name);

} // namespace faiss_saap::benchs
