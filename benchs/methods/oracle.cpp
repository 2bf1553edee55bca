/// What no method can know: the true attention weights, key by key or cell by
/// cell. The curves that the others are measured against.
#include <cmath>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

/// Best keys one by one, by their true attention weight.
struct OracleTopK : Method {
    bool share_group;

    explicit OracleTopK(bool share) : share_group(share) {}
    void build(const HeadData&, int64_t) override {}
    Selection probe(const Step& step, int64_t limit) const override {
        const int64_t n = step.far.size();
        std::vector<float> logits;
        for (const GroundTruth& t : step.truth) {
            for (int64_t j = step.far.begin; j < step.far.end; j++) {
                logits.push_back(static_cast<float>(
                        std::log(t.mass[j]) / step.data.scale));
            }
        }
        Selection selection;
        if (n > 0) {
            selection.slots =
                    best_keys_of_group(step, logits, share_group, limit);
        } else {
            selection.slots.resize(step.data.group);
        }
        // It knows the weights: reading all keys tells them.
        selection.index_bytes = kNumberBytes * step.data.tokens * step.data.d;
        return selection;
    }
};

/// The cells of `ivf_rope_ip` by their true mass per key.
struct OracleCells : PartitionMethod {
    using PartitionMethod::PartitionMethod;

    void score(const Step& step, float* scores) const override {
        const auto mass = cell_masses(step);
        const auto counts = far_counts(step.far);
        for (size_t i = 0; i < mass.size(); i++) {
            const int64_t n = counts[i % counts.size()];
            scores[i] = n > 0 && mass[i] > 0
                    ? static_cast<float>(
                              std::log(mass[i] / n) / step.data.scale)
                    : -INFINITY;
        }
    }
};

} // namespace

MethodEntries oracle_methods() {
    return {{"oracle_topk",
             [](const Setup&, bool share) {
                 return std::make_unique<OracleTopK>(share);
             }},
            {"oracle_cells", [](const Setup& s, bool share) {
                 return std::make_unique<OracleCells>(
                         s.cells(NEEDS_POST_ROPE), s.sink, share);
             }}};
}

} // namespace faiss_saap::benchs
