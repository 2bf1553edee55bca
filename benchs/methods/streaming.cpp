/// StreamingLLM (arXiv 2309.17453): sink and window only. A budget makes the
/// window longer.
#include <algorithm>
#include <numeric>

#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

struct StreamingLlm : Method {
    void build(const HeadData&, int64_t) override {}
    Selection probe(const Step& step, int64_t limit) const override {
        std::vector<int32_t> slots(
                std::min<int64_t>(limit, step.far.size()));
        std::iota(
                slots.begin(),
                slots.end(),
                static_cast<int32_t>(step.far.end - slots.size()));
        Selection selection;
        selection.slots.assign(step.data.group, slots);
        return selection;
    }
};

} // namespace

MethodEntries streaming_methods() {
    MethodEntry e;
    e.name = "streaming_llm";
    e.make = [](const Setup&, bool) {
        return std::make_unique<StreamingLlm>();
    };
    e.has_group = false;
    return {e};
}

} // namespace faiss_saap::benchs
