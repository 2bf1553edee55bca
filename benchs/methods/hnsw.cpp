/// The graph family: a faiss::IndexHNSWFlat over the keys as they are cached, by
/// inner product (Malkov and Yashunin, arXiv 1603.09320). The graph is Faiss's;
/// the search in it is the algorithm of the paper, written here because it must
/// leave out keys that are not far and count what it reads.
#include <algorithm>
#include <queue>
#include <unordered_set>

#include <faiss/IndexHNSW.h>

#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

constexpr int kLinks = 16; ///< M of the paper; twice as many on the ground

struct Hnsw : Method {
    faiss::IndexHNSWFlat index;
    int64_t first;

    explicit Hnsw(const Setup& s)
            : index(s.data.d, kLinks, faiss::METRIC_INNER_PRODUCT),
              first(s.sink) {}

    void build(const HeadData& data, int64_t end) override {
        const int64_t begin = first + index.ntotal;
        if (begin < end) {
            index.add(end - begin, data.keys_post.data() + begin * data.d);
        }
    }

    Selection probe(const Step& step, int64_t limit) const override {
        Selection selection;
        for (int h = 0; h < step.data.group; h++) {
            selection.slots.push_back(search(
                    step,
                    step.data.query_post(step.token, h),
                    limit,
                    selection.index_bytes));
        }
        return selection;
    }

    /// The best `limit` far keys that a beam of as many finds.
    std::vector<int32_t> search(
            const Step& step,
            const float* q,
            int64_t limit,
            double& bytes) const {
        if (limit <= 0 || index.ntotal == 0) {
            return {};
        }
        const faiss::HNSW& graph = index.hnsw;
        const int d = step.data.d;
        int64_t distances = 0, hops = 0;
        const auto product = [&](int32_t node) {
            distances++;
            const float* k = step.data.keys_post.data() + (first + node) * d;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int i = 0; i < d; i++) {
                dot += q[i] * k[i];
            }
            return dot;
        };
        const auto each_link = [&](int32_t node, int level, const auto& body) {
            hops++;
            size_t begin, end;
            graph.neighbor_range(node, level, &begin, &end);
            for (size_t i = begin; i < end && graph.neighbors[i] >= 0; i++) {
                body(graph.neighbors[i]);
            }
        };
        int32_t at = graph.entry_point;
        float best = product(at);
        for (int level = graph.max_level; level > 0; level--) {
            for (bool moved = true; moved;) {
                moved = false;
                each_link(at, level, [&](int32_t next) {
                    const float p = product(next);
                    if (p > best) {
                        best = p;
                        at = next;
                        moved = true;
                    }
                });
            }
        }
        using Node = std::pair<float, int32_t>;
        std::priority_queue<Node> open;
        std::priority_queue<Node, std::vector<Node>, std::greater<Node>> beam;
        std::unordered_set<int32_t> visited = {at};
        const auto visit = [&](float p, int32_t node) {
            if (static_cast<int64_t>(beam.size()) >= limit &&
                p <= beam.top().first) {
                return;
            }
            open.emplace(p, node);
            if (first + node < step.far.end) { // others only lead on
                beam.emplace(p, node);
                if (static_cast<int64_t>(beam.size()) > limit) {
                    beam.pop();
                }
            }
        };
        visit(best, at);
        while (!open.empty()) {
            const auto [p, node] = open.top();
            open.pop();
            if (static_cast<int64_t>(beam.size()) >= limit &&
                p < beam.top().first) {
                break;
            }
            each_link(node, 0, [&](int32_t next) {
                if (visited.insert(next).second) {
                    visit(product(next), next);
                }
            });
        }
        std::vector<int32_t> slots;
        for (; !beam.empty(); beam.pop()) {
            slots.push_back(static_cast<int32_t>(first) + beam.top().second);
        }
        std::sort(slots.begin(), slots.end());
        // Links of 4 bytes and keys; a chosen one is not read twice.
        bytes += 4.0 * 2 * kLinks * static_cast<double>(hops) +
                kNumberBytes * d *
                        static_cast<double>(
                                distances -
                                std::min<int64_t>(
                                        distances,
                                        static_cast<int64_t>(slots.size())));
        return slots;
    }
};

} // namespace

MethodEntries hnsw_methods() {
    MethodEntry e;
    e.name = "hnsw";
    e.make = [](const Setup& s, bool) { return std::make_unique<Hnsw>(s); };
    e.has_group = false;
    return {e};
}

} // namespace faiss_saap::benchs
