/// Two partitions, half of the budget each: the trained one with its classifier
/// and k-means of the sequence's rotated keys. A key that both reach is read
/// once.
#include <algorithm>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

struct Union : Method {
    PartitionMethod a, b;

    Union(const Setup& s, bool share)
            : a(s.trained->find(s.data.layer, s.data.kv_head).partition,
                s.sink,
                share),
              b(s.cells(NEEDS_POST_ROPE), s.sink, share) {}
    void build(const HeadData& data, int64_t end) override {
        a.build(data, end);
        b.build(data, end);
    }
    Selection probe(const Step& step, int64_t limit) const override {
        const Selection one = a.probe(step, limit / 2);
        const Selection two = b.probe(step, limit - limit / 2);
        Selection both;
        both.index_bytes = one.index_bytes + two.index_bytes;
        for (size_t h = 0; h < one.slots.size(); h++) {
            both.slots.emplace_back();
            std::set_union(
                    one.slots[h].begin(),
                    one.slots[h].end(),
                    two.slots[h].begin(),
                    two.slots[h].end(),
                    std::back_inserter(both.slots[h]));
        }
        return both;
    }
};

} // namespace

MethodEntries union_methods() {
    MethodEntry e;
    e.name = "union";
    e.make = [](const Setup& s, bool share) {
        return std::make_unique<Union>(s, share);
    };
    e.ours = e.needs_trained = true;
    return {e};
}

} // namespace faiss_saap::benchs
