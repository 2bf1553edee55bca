#pragma once
#include <memory>
#include "methods/MethodList.h"

namespace faiss_saap::benchs {

/// Every n-th far key, whatever the query asks for.
struct Strided : Method {
    // There is nothing to learn from the keys.
    void build(const HeadData&, int64_t) override {}

    Selection probe(const Step& step, int64_t limit) const override {
        std::vector<int32_t> slots;
        const int64_t stride = limit > 0 ? (step.far.size() + limit - 1) / limit : 0;
        for (int64_t j = step.far.begin; limit > 0 && j < step.far.end; j += stride)
            slots.push_back(static_cast<int32_t>(j));
        Selection selection;
        selection.slots.assign(step.data.group, slots); // the same for each query head
        selection.index_bytes = 0;                      // nothing was read in order to choose
        return selection;
    }
};

inline MethodEntries strided_methods() {
    MethodEntry entry;
    entry.name = "strided";
    entry.make = [](const Setup&, bool /*share_group*/) { return std::make_unique<Strided>(); };
    entry.has_group = false; // all heads read the same keys anyway
    return {entry};
}

} // namespace faiss_saap::benchs
