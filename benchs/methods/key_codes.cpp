/// The library's own second level (ProbePolicy::refine): cells choose six
/// candidates for each key that may be read, their 4-bit codes (KeyCodes) the
/// best of them.
#include <algorithm>

#include <faiss_saap/KeyCodes.h>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

struct RankedCells : Method {
    static constexpr int kRefine = 6; ///< candidates for each key
    PartitionMethod cells;
    KeyCodes codes;
    int64_t sink;

    RankedCells(Partition partition, const Setup& s, bool share)
            : cells(std::move(partition), s.sink, share),
              codes(s.data.d, s.sink),
              sink(s.sink) {}

    void build(const HeadData& data, int64_t end) override {
        for (int64_t j = sink + codes.size(); j < end; j++) {
            codes.append(data.keys_post.data() + j * data.d);
        }
        cells.build(data, end);
    }
    bool needs_newest_keys() const override {
        return cells.needs_newest_keys();
    }

    Selection probe(const Step& step, int64_t limit) const override {
        Selection selection =
                cells.probe(step, std::min(kRefine * limit, step.far.size()));
        const int group = step.data.group;
        const bool share = cells.share_group;
        std::vector<int32_t> ranked; // by any head
        for (const auto& slots : selection.slots) {
            std::vector<int32_t> all;
            std::set_union(
                    ranked.begin(), ranked.end(), slots.begin(), slots.end(),
                    std::back_inserter(all));
            ranked = std::move(all);
        }
        selection.index_bytes += static_cast<double>(
                ranked.size() * KeyCodes::code_size(step.data.d));
        if (share) {
            selection.slots.assign(
                    group,
                    codes.best(
                            group, step.data.query_post(step.token, 0),
                            step.data.scale, ranked, limit));
            return selection;
        }
        for (int h = 0; h < group; h++) {
            selection.slots[h] = codes.best(
                    1, step.data.query_post(step.token, h), step.data.scale,
                    selection.slots[h], limit);
        }
        return selection;
    }
};

} // namespace

MethodEntries key_codes_methods() {
    MethodEntry own, trained;
    own.name = "ivf_codes";
    own.make = [](const Setup& s, bool share) {
        return std::make_unique<RankedCells>(
                s.cells(NEEDS_POST_ROPE), s, share);
    };
    trained.name = "saap_codes";
    trained.make = [](const Setup& s, bool share) {
        return std::make_unique<RankedCells>(
                s.trained->find(s.data.layer, s.data.kv_head).partition, s,
                share);
    };
    own.ours = trained.ours = trained.needs_trained = true;
    return {own, trained};
}

} // namespace faiss_saap::benchs
