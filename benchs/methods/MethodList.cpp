#include "MethodList.h"

#include <faiss/impl/FaissAssert.h>

// One line for each file of methods.
#define FAISS_SAAP_METHOD_FILES(file) \
    file(oracle)                      \
    file(ivf)                         \
    file(saap)                        \
    file(union)                       \
    file(query_metric)                \
    file(key_codes)                   \
    file(segments)                    \
    file(quest)                       \
    file(magicpig)                    \
    file(pq_scan)                     \
    file(hnsw)                        \
    file(streaming)

namespace faiss_saap::benchs {

#define FAISS_SAAP_DECLARE(file) MethodEntries file##_methods();
FAISS_SAAP_METHOD_FILES(FAISS_SAAP_DECLARE)

Partition Setup::cells(RoutingNeeds space, bool spherical) const {
    auto found = made_.find({space, spherical});
    if (found == made_.end()) {
        KMeansParams params;
        params.niter = niter;
        params.seed = seed;
        params.spherical = spherical;
        const auto& keys =
                space == NEEDS_PRE_ROPE ? data.keys_pre : data.keys_post;
        found = made_.emplace(
                             std::make_pair(space, spherical),
                             kmeans_partition(
                                     clustered,
                                     data.d,
                                     keys.data(),
                                     ncell,
                                     space,
                                     params,
                                     data.rope))
                        .first;
    }
    return found->second;
}

const MethodEntries& all_methods() {
    static const MethodEntries all = [] {
        MethodEntries entries;
        const auto add = [&](const MethodEntries& of_file) {
            for (const MethodEntry& e : of_file) {
                entries.push_back(e);
                if (e.has_group) {
                    entries.push_back(e);
                    MethodEntry& group = entries.back();
                    group.name += "_group";
                    group.make = [make = e.make](const Setup& s, bool) {
                        return make(s, true);
                    };
                }
            }
        };
#define FAISS_SAAP_ADD(file) add(file##_methods());
        FAISS_SAAP_METHOD_FILES(FAISS_SAAP_ADD)
        return entries;
    }();
    return all;
}

const MethodEntry& find_method(const std::string& name) {
    for (const MethodEntry& e : all_methods()) {
        if (e.name == name) {
            return e;
        }
    }
    FAISS_THROW_FMT("there is no method %s", name.c_str());
}

} // namespace faiss_saap::benchs
