/// Quest (arXiv 2406.10774): pages of consecutive keys, as they are cached, each
/// with the minimum and the maximum of every component. A page's score is the
/// largest q.k that a key within these bounds could have; the best pages are
/// read whole. The paper's pages have 16 keys, and then the bounds alone are
/// 1/16 of the cache; longer pages are measured beside it.
#include <algorithm>
#include <cmath>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

struct Quest : CellMethod {
    int64_t page, first;
    std::vector<float> low, high; ///< size pages * d

    Quest(const Setup& s, int keys_per_page, bool share)
            : CellMethod(
                      CellLists(
                              static_cast<int>(std::max<int64_t>(
                                      1,
                                      (s.data.tokens - s.sink +
                                       keys_per_page - 1) /
                                              keys_per_page)),
                              s.data.d,
                              s.sink,
                              false),
                      s.sink,
                      share),
              page(keys_per_page),
              first(s.sink),
              low(int64_t(lists.ncell()) * s.data.d, INFINITY),
              high(low.size(), -INFINITY) {}

    void assign(const HeadData& data, int64_t begin, int64_t end, int32_t* cells)
            override {
        for (int64_t j = begin; j < end; j++) {
            const auto c = static_cast<int32_t>((j - first) / page);
            cells[j - begin] = c;
            for (int i = 0; i < data.d; i++) {
                const float x = data.keys_post[j * data.d + i];
                float& l = low[int64_t(c) * data.d + i];
                float& u = high[int64_t(c) * data.d + i];
                l = std::min(l, x);
                u = std::max(u, x);
            }
        }
    }

    void score(const Step& step, float* scores) const override {
        const int d = step.data.d;
        const CellStats stats = lists.stats();
        for (int h = 0; h < step.data.group; h++) {
            const float* q = step.data.query_post(step.token, h);
            for (int c = 0; c < lists.ncell(); c++, scores++) {
                *scores = -INFINITY;
                if (stats.count[c] == 0) {
                    continue;
                }
                float bound = 0;
                for (int i = 0; i < d; i++) {
                    bound += std::max(
                            q[i] * low[int64_t(c) * d + i],
                            q[i] * high[int64_t(c) * d + i]);
                }
                *scores = bound;
            }
        }
    }

    double scoring_bytes(const HeadData& data) const override {
        return 2 * kNumberBytes * lists.ncell() * data.d;
    }
};

MethodEntry entry(const std::string& name, int keys_per_page) {
    return {name, [=](const Setup& s, bool share) {
                return std::make_unique<Quest>(s, keys_per_page, share);
            }};
}

} // namespace

MethodEntries quest_methods() {
    return {entry("quest", 16), entry("quest_32", 32), entry("quest_64", 64)};
}

} // namespace faiss_saap::benchs
