/// What the tests of AttentionAdapter share.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include <faiss_saap/AttentionAdapter.h>

#include "common.h"

namespace faiss_saap::tests {

/// A cache, queries for every token, and partitions of the keys.
struct World {
    int heads_q, heads_kv, d;
    int64_t length;
    RopeParams rope;
    std::vector<float> k, v, q; ///< (length, heads, d), post-RoPE
    std::vector<Partition> partitions;

    World(Random& random,
          int hq,
          int hkv,
          int d_in,
          int64_t n,
          int ncell,
          RoutingNeeds space)
            : heads_q(hq), heads_kv(hkv), d(d_in), length(n) {
        rope.d = d;
        k = random.normal(n * hkv * d);
        v = random.normal(n * hkv * d);
        q = random.normal(n * hq * d, 2);
        const RotaryEmbedding rotary(rope);
        for (int h = 0; h < hkv; h++) {
            std::vector<float> keys;
            std::vector<int64_t> position;
            for (int64_t i = 0; i < n; i++) {
                const float* key = k.data() + (i * hkv + h) * d;
                keys.insert(keys.end(), key, key + d);
                position.push_back(i);
            }
            if (space == NEEDS_PRE_ROPE) {
                rotary.derotate(n, position.data(), keys.data());
            }
            partitions.push_back(kmeans_partition(
                    n, d, keys.data(), ncell, space, {}, rope));
        }
    }

    KvView view(int64_t n) const {
        return KvView::token_major(
                k.data(), v.data(), DType::float32, n, heads_kv, d, d);
    }
    AdapterParams params(int64_t sink, int64_t window) const {
        AdapterParams p;
        p.heads_q = heads_q;
        p.heads_kv = heads_kv;
        p.d = d;
        p.sink = sink;
        p.window = window;
        p.dense_below = 0;
        return p;
    }
    const float* queries(int64_t token) const {
        return q.data() + token * heads_q * d;
    }

    /// Attention in double precision over the slots that `reads` names.
    template <class Reads>
    void reference(
            int64_t token,
            int head,
            const Reads& reads,
            std::vector<double>& out,
            double& lse) const {
        const int kv = head / (heads_q / heads_kv);
        const float* query = queries(token) + head * d;
        std::vector<std::pair<double, int64_t>> s;
        double maximum = -INFINITY;
        for (int64_t j = 0; j <= token; j++) {
            if (reads(j)) {
                double dot = 0;
                for (int i = 0; i < d; i++) {
                    dot += double(query[i]) * k[(j * heads_kv + kv) * d + i];
                }
                s.emplace_back(dot / std::sqrt(double(d)), j);
                maximum = std::max(maximum, s.back().first);
            }
        }
        out.assign(d, 0.0);
        double sum = 0;
        for (const auto& [score, j] : s) {
            const double w = std::exp(score - maximum);
            sum += w;
            for (int i = 0; i < d; i++) {
                out[i] += w * v[(j * heads_kv + kv) * d + i];
            }
        }
        for (double& o : out) {
            o /= sum > 0 ? sum : 1;
        }
        lse = maximum + std::log(sum);
    }
};

inline double relative_error(const float* o, const std::vector<double>& expected) {
    double difference = 0, norm = 0;
    for (size_t j = 0; j < expected.size(); j++) {
        difference += (o[j] - expected[j]) * (o[j] - expected[j]);
        norm += expected[j] * expected[j];
    }
    return std::sqrt(difference / norm);
}

/// Both sequences list the same slots, with the same statistics to the bit.
inline void expect_same_state(
        const AttentionAdapter& adapter,
        int64_t a,
        int64_t b) {
    ASSERT_EQ(adapter.length(a), adapter.length(b));
    for (int h = 0; h < adapter.params().heads_kv; h++) {
        if (adapter.params().key_codes) {
            const KeyCodes &x = adapter.codes(a, h), &y = adapter.codes(b, h);
            ASSERT_EQ(x.size(), y.size());
            ASSERT_EQ(x.size(), adapter.lists(a, h).size());
            const size_t size = KeyCodes::code_size(adapter.params().d);
            for (int64_t i = 0; i < x.size(); i++) {
                const int64_t slot = adapter.params().sink + i;
                ASSERT_TRUE(std::equal(
                        x.code(slot), x.code(slot) + size, y.code(slot)));
            }
        }
        ASSERT_EQ(adapter.npartition(a, h), adapter.npartition(b, h));
        for (int p = 0; p < adapter.npartition(a, h); p++) {
            const CellLists &x = adapter.lists(a, h, p), &y = adapter.lists(b, h, p);
            ASSERT_EQ(x.size(), y.size());
            ASSERT_EQ(x.ncell(), y.ncell());
            const CellStats s = x.stats(), t = y.stats();
            for (int c = 0; c < x.ncell(); c++) {
                EXPECT_EQ(x.slots(c), y.slots(c));
                EXPECT_EQ(s.count[c], t.count[c]);
                EXPECT_EQ(s.newest[c], t.newest[c]);
                for (int j = 0; s.mean_post_rope && j < adapter.params().d; j++) {
                    const int i = c * adapter.params().d + j;
                    EXPECT_EQ(s.mean_post_rope[i], t.mean_post_rope[i]);
                }
                for (int j = 0; s.newest_post_rope && j < adapter.params().d; j++) {
                    const int i = c * adapter.params().d + j;
                    EXPECT_EQ(s.newest_post_rope[i], t.newest_post_rope[i]);
                }
            }
            for (int64_t i = 0; i < x.size(); i++) {
                const int64_t slot = adapter.params().sink + i;
                EXPECT_EQ(x.cell_of(slot), y.cell_of(slot));
            }
        }
    }
}

} // namespace faiss_saap::tests
