/// The cases that AttentionAdapter must pass on the CPU and on the device: one
/// table, one oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <faiss/IndexFlat.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/dtype.h>

#include "common.h"

namespace faiss_saap::tests {

/// strided: rows of a token lie apart, and values otherwise than keys.
enum class CacheLayout { token_major, head_major, paged, strided };
enum class QueryKind { quantizer, l2, means, classifier, perceptron, blend };

struct AdapterCase {
    const char* name;
    int heads_q = 8, heads_kv = 2, d = 64;
    DType dtype = DType::bfloat16;
    CacheLayout layout = CacheLayout::token_major;
    std::vector<int64_t> lengths = {1500};
    int q_len = 1;
    int ncell = 24;
    int64_t sink = 5, window = 40;
    bool pre_rope = true;
    QueryKind query = QueryKind::quantizer;
    int width = 44; ///< of networks; no multiple of 8
    bool bf16_centroids = false; ///< bfloat16 holds them
    float query_deviation = 2; ///< of components; 0: all cells are alike
    bool share_trunk = true;
    bool union_of_two = false; ///< a second, post-RoPE partition
    bool second_alike = false; ///< whose queries are assigned as the first one's are
    bool share_group = true;
    bool attend_dense = true;
    double selectivity = 0.2;
    int nprobe = 1000;
    int64_t dense_below = 0;
    int64_t chunk = 1500; ///< tokens appended at a time
};

inline std::ostream& operator<<(std::ostream& out, const AdapterCase& c) {
    constexpr const char* kLayouts[] = {"token-major", "head-major", "paged", "strided"};
    constexpr const char* kQueries[] = {
            "quantizer", "l2", "means", "classifier", "perceptron", "blend"};
    out << c.name << ": " << c.heads_q << " / " << c.heads_kv << " heads, d " << c.d
        << ", " << name(c.dtype) << ", " << kLayouts[static_cast<int>(c.layout)]
        << ", lengths";
    for (int64_t n : c.lengths) {
        out << " " << n;
    }
    return out << ", chunk " << c.chunk << ", q_len " << c.q_len << ", sink " << c.sink
               << ", window " << c.window << ", " << c.ncell << " cells"
               << (c.pre_rope ? " pre-RoPE" : " post-RoPE")
               << (c.union_of_two ? " and others" : "")
               << (c.second_alike ? ", both alike" : "") << ", queries by "
               << kQueries[static_cast<int>(c.query)] << " of width " << c.width
               << (c.query_deviation > 0 ? "" : " of 0")
               << (c.bf16_centroids ? ", bfloat16 centroids" : "") << ", selectivity "
               << c.selectivity << ", nprobe " << c.nprobe << ", dense_below "
               << c.dense_below << (c.share_group ? "" : ", a choice per head")
               << (c.attend_dense ? "" : ", far keys alone");
}

inline std::vector<AdapterCase> adapter_cases() {
    std::vector<AdapterCase> cases;
    const auto add = [&](const char* name, auto change) {
        AdapterCase c;
        c.name = name;
        change(c);
        cases.push_back(c);
    };
    using C = AdapterCase&;
    add("default", [](C) {});
    add("d 96 float16 head-major", [](C c) {
        c.d = 96;
        c.dtype = DType::float16;
        c.layout = CacheLayout::head_major;
    });
    add("d 128 paged, llama group", [](C c) {
        c.d = 128;
        c.heads_q = 8;
        c.heads_kv = 2;
        c.layout = CacheLayout::paged;
    });
    add("d 256 float16, one head a group", [](C c) {
        c.d = 256;
        c.heads_q = c.heads_kv = 2;
        c.dtype = DType::float16;
    });
    add("d 256 bfloat16", [](C c) { c.d = 256; });
    add("group of 16", [](C c) {
        c.heads_q = 16;
        c.heads_kv = 1;
    });
    add("group of 3, a choice per head", [](C c) {
        c.heads_q = 9;
        c.heads_kv = 3;
        c.share_group = false;
    });
    add("all cells probed", [](C c) {
        c.selectivity = 1;
    });
    add("all cells probed, float16, a choice per head", [](C c) {
        c.selectivity = 1;
        c.dtype = DType::float16;
        c.share_group = false;
    });
    add("post-RoPE cells", [](C c) { c.pre_rope = false; });
    add("L2 queries", [](C c) { c.query = QueryKind::l2; });
    add("cell means", [](C c) { c.query = QueryKind::means; });
    add("classifier", [](C c) { c.query = QueryKind::classifier; });
    add("classifier, d 128, float16", [](C c) {
        c.query = QueryKind::classifier;
        c.d = 128;
        c.dtype = DType::float16;
    });
    add("perceptron", [](C c) { c.query = QueryKind::perceptron; });
    add("perceptron, d 128, a choice per head", [](C c) {
        c.query = QueryKind::perceptron;
        c.d = 128;
        c.share_group = false;
    });
    add("perceptron as wide as d 128, llama group", [](C c) {
        c.query = QueryKind::perceptron;
        c.d = c.width = 128;
        c.heads_q = 8;
        c.heads_kv = 2;
    });
    add("blend", [](C c) { c.query = QueryKind::blend; });
    add("blend, token by token at the end", [](C c) {
        c.query = QueryKind::blend;
        c.chunk = 1480;
        c.layout = CacheLayout::paged;
    });
    add("two partitions", [](C c) { c.union_of_two = true; });
    add("two partitions, all probed", [](C c) {
        c.union_of_two = true;
        c.selectivity = 1;
    });
    add("ragged batch", [](C c) {
        c.lengths = {1200, 1, 45, 46, 300, 3};
    });
    add("ragged batch of two partitions, five tokens ask", [](C c) {
        c.lengths = {1200, 45, 300, 47};
        c.q_len = 5;
        c.union_of_two = true;
    });
    add("d 96 bfloat16, strided", [](C c) {
        c.d = 96;
        c.layout = CacheLayout::strided;
    });
    add("no sink, no window", [](C c) { c.sink = c.window = 0; });
    add("the dense part is the caller's", [](C c) { c.attend_dense = false; });
    add("few far keys are all read", [](C c) {
        c.dense_below = 5000;
        c.selectivity = 0.01;
    });
    add("nprobe 3", [](C c) { c.nprobe = 3; });
    add("one cell", [](C c) { c.ncell = 1; });
    add("more cells than a block has threads", [](C c) {
        c.ncell = 700;
        c.lengths = {2500};
        c.selectivity = 0.05;
    });
    add("more cells that are alike than are ranked at once", [](C c) {
        c.ncell = 300;
        c.lengths = {4000};
        c.query_deviation = 0;
    });
    add("nprobe 20 of cells that are alike", [](C c) {
        c.ncell = 300;
        c.lengths = {4000};
        c.query_deviation = 0;
        c.nprobe = 20;
    });
    const auto many = [](C c) {
        c.lengths.clear();
        for (int64_t i = 0; i < 80; i++) {
            c.lengths.push_back(20 + 7 * i % 160);
        }
    };
    add("more rows than a device has processors", many);
    add("as many, perceptron, d 128", [&](C c) {
        many(c);
        c.query = QueryKind::perceptron;
        c.d = 128;
    });
    add("as many, classifier, paged", [&](C c) {
        many(c);
        c.query = QueryKind::classifier;
        c.layout = CacheLayout::paged;
    });
    add("a window for all warps", [](C c) {
        c.window = 8500;
        c.lengths = {10'000};
        c.chunk = 9'995;
    });
    // Hidden layers that no block has whole.
    add("a wide classifier", [](C c) {
        c.query = QueryKind::classifier;
        c.width = 196;
    });
    add("a wide perceptron, llama group", [](C c) {
        c.query = QueryKind::perceptron;
        c.width = 600;
        c.heads_q = 8;
        c.heads_kv = 2;
    });
    add("classifiers with trunks of their own", [](C c) {
        c.query = QueryKind::classifier;
        c.share_trunk = false;
    });
    add("two classifiers for each head, group of 3", [](C c) {
        c.query = QueryKind::classifier;
        c.heads_q = 9;
        c.heads_kv = 3;
        c.union_of_two = c.second_alike = true;
    });
    add("two perceptrons for each head, group of 3", [](C c) {
        c.query = QueryKind::perceptron;
        c.heads_q = 9;
        c.heads_kv = 3;
        c.union_of_two = c.second_alike = true;
    });
    add("bfloat16 centroids", [](C c) { c.bf16_centroids = true; });
    add("bfloat16 centroids, d 96, L2 queries, a few tokens at a time", [](C c) {
        c.bf16_centroids = true;
        c.query = QueryKind::l2;
        c.d = 96;
        c.chunk = 20;
        c.lengths = {300};
    });
    add("bfloat16 centroids, d 128, llama group, token by token", [](C c) {
        c.bf16_centroids = true;
        c.d = 128;
        c.heads_q = 8;
        c.heads_kv = 2;
        c.ncell = 100;
        c.chunk = 1470;
    });
    add("bfloat16 centroids, perceptron as wide as d 128", [](C c) {
        c.bf16_centroids = true;
        c.query = QueryKind::perceptron;
        c.d = c.width = 128;
        c.chunk = 1470;
    });
    add("bfloat16 centroids, more rows than processors", [&](C c) {
        many(c);
        c.bf16_centroids = true;
    });
    // Nothing is far.
    add("a window for all", [](C c) { c.window = 2000; });
    add("a window for all, ragged batch, d 128, llama group", [](C c) {
        c.window = 2000;
        c.lengths = {1200, 1, 45, 600, 3};
        c.d = 128;
        c.heads_q = 8;
        c.heads_kv = 2;
    });
    add("a window for all, float16, d 96, paged, token by token", [](C c) {
        c.window = 1500;
        c.sink = 0;
        c.dtype = DType::float16;
        c.d = 96;
        c.layout = CacheLayout::paged;
        c.chunk = 1490;
    });
    add("a window for all, which is the caller's", [](C c) {
        c.window = 2000;
        c.attend_dense = false;
    });
    add("a window for all, more rows than a device has processors", [&](C c) {
        many(c);
        c.window = 200;
    });
    // Of each KV head one row is in no pair, and the last one of all has a cluster alone.
    const auto odd = [&](C c) {
        many(c);
        c.lengths.resize(45);
        c.heads_q = 9;
        c.heads_kv = 3;
    };
    add("an odd number of rows, classifier, d 96", [&](C c) {
        odd(c);
        c.query = QueryKind::classifier;
        c.d = 96;
    });
    add("an odd number of rows, one cell", [&](C c) {
        odd(c);
        c.ncell = 1;
    });
    add("more rows than processors, group of 8, d 128", [&](C c) {
        many(c);
        c.heads_q = 16;
        c.d = 128;
    });
    add("as many, a wide classifier", [&](C c) {
        many(c);
        c.query = QueryKind::classifier;
        c.width = 196;
    });
    add("as many, classifiers with trunks of their own", [&](C c) {
        many(c);
        c.query = QueryKind::classifier;
        c.share_trunk = false;
    });
    add("as many, cells that are kept, d 128, llama group", [&](C c) {
        many(c);
        c.bf16_centroids = true;
        c.d = 128;
        c.ncell = 200;
    });
    add("rows of a few blocks that share processors", [&](C c) {
        many(c);
        c.lengths.resize(45);
        c.d = 128;
    });
    add("as many, perceptron", [&](C c) {
        many(c);
        c.lengths.resize(40);
        c.query = QueryKind::perceptron;
    });
    add("more cells than one launch has room for", [](C c) {
        c.heads_q = 8;
        c.heads_kv = 1;
        c.d = 128;
        c.ncell = 8000;
        c.lengths = {3000};
    });
    add("two partitions, cells larger than a share", [](C c) {
        c.union_of_two = true;
        c.selectivity = 0.06;
    });
    add("two partitions, each head for itself, larger than a share", [](C c) {
        c.union_of_two = true;
        c.share_group = false;
        c.selectivity = 0.06;
    });
    return cases;
}

/// A case drawn at random.
inline AdapterCase random_case(Random& random) {
    const auto coin = [&] { return random.below(2) == 1; };
    const auto pick = [&](auto... x) {
        const std::vector<std::common_type_t<decltype(x)...>> all = {x...};
        return all[random.below(static_cast<int64_t>(all.size()))];
    };
    AdapterCase c;
    c.name = "random";
    c.heads_kv = static_cast<int>(1 + random.below(4));
    c.heads_q = c.heads_kv * static_cast<int>(1 + random.below(16));
    c.d = pick(64, 96, 128, 256);
    c.dtype = pick(DType::float16, DType::bfloat16);
    c.layout = pick(
            CacheLayout::token_major,
            CacheLayout::head_major,
            CacheLayout::paged,
            CacheLayout::strided);
    c.lengths.clear();
    for (int64_t i = random.below(4); i >= 0; i--) {
        c.lengths.push_back(1 + random.below(pick(20, 100, 600)));
    }
    c.q_len = static_cast<int>(1 + random.below(4));
    c.ncell = static_cast<int>(1 + random.below(pick(10, 100)));
    c.sink = random.below(20);
    c.window = random.below(100);
    c.pre_rope = coin();
    c.query = pick(
            QueryKind::quantizer,
            QueryKind::l2,
            QueryKind::means,
            QueryKind::classifier,
            QueryKind::perceptron,
            QueryKind::blend);
    c.bf16_centroids = coin();
    c.union_of_two = coin();
    c.share_group = coin();
    c.attend_dense = coin();
    c.selectivity = pick(0.02, 0.2, 1.0);
    c.nprobe = c.selectivity == 1 ? 1000 : static_cast<int>(pick(1, 8, 1000));
    c.dense_below = pick(0, 150);
    c.chunk = 1 + random.below(600);
    return c;
}

/// The data of a case.
struct CaseWorld {
    AdapterCase c;
    AdapterParams params;
    HeadPartitions partitions;
    RopeParams rope;
    /// keys and values as the cache holds them (rounded), size length * heads_kv
    /// * d for each sequence, and queries of its last q_len tokens
    std::vector<std::vector<float>> k, v, q;
    static constexpr int kPage = 16;

    CaseWorld(const AdapterCase& of, Random& random) : c(of) {
        params.heads_q = c.heads_q;
        params.heads_kv = c.heads_kv;
        params.d = c.d;
        params.sink = c.sink;
        params.window = c.window;
        params.attend_dense = c.attend_dense;
        params.dense_below = c.dense_below;
        params.policy.max_selectivity = c.selectivity;
        params.policy.nprobe = c.nprobe;
        params.policy.share_group = c.share_group;
        rope.d = c.d;
        for (int64_t n : c.lengths) {
            k.push_back(rounded(random.normal(n * c.heads_kv * c.d)));
            v.push_back(rounded(random.normal(n * c.heads_kv * c.d)));
            const int64_t asks = std::min<int64_t>(c.q_len, n);
            q.push_back(rounded(random.normal(asks * c.heads_q * c.d, c.query_deviation)));
        }
        for (int h = 0; h < c.heads_kv; h++) {
            const std::vector<float> train =
                    random.normal(size_t(std::max(300, 2 * c.ncell)) * c.d);
            std::vector<Partition> head;
            head.reserve(2);
            head.push_back(partition(
                    random, train, c.pre_rope ? NEEDS_PRE_ROPE : NEEDS_POST_ROPE));
            if (c.second_alike) {
                head.push_back(partition(random, train, NEEDS_POST_ROPE));
            } else if (c.union_of_two) {
                head.push_back(kmeans_partition(
                        static_cast<int64_t>(train.size()) / c.d,
                        c.d,
                        train.data(),
                        c.ncell,
                        NEEDS_POST_ROPE));
            }
            partitions.push_back(head);
        }
    }

    std::vector<float> rounded(std::vector<float> x) const {
        round_to(c.dtype, static_cast<int64_t>(x.size()), x.data());
        return x;
    }

    /// The same with representatives of cells that bfloat16 holds.
    std::shared_ptr<const CellAssigner> in_bfloat16(const CellAssigner& from) const {
        const auto& quantizer =
                dynamic_cast<const QuantizerAssigner&>(from).quantizer;
        const auto& flat = dynamic_cast<const faiss::IndexFlat&>(*quantizer);
        std::vector<float> x(flat.get_xb(), flat.get_xb() + flat.ntotal * c.d);
        round_to(DType::bfloat16, static_cast<int64_t>(x.size()), x.data());
        auto to = std::make_shared<faiss::IndexFlat>(c.d, flat.metric_type);
        to->add(flat.ntotal, x.data());
        return std::make_shared<QuantizerAssigner>(
                to, static_cast<RoutingNeeds>(from.needs));
    }

    Partition partition(
            Random& random,
            const std::vector<float>& train,
            RoutingNeeds space) const {
        Partition p = kmeans_partition(
                static_cast<int64_t>(train.size()) / c.d,
                c.d,
                train.data(),
                c.ncell,
                space,
                {},
                rope);
        if (c.bf16_centroids) {
            p.key = in_bfloat16(*p.key);
            p.query = in_bfloat16(*p.query);
        }
        const int group = c.heads_q / c.heads_kv;
        const auto classifier = [&](int depth, bool share_input) {
            ClassifierShape shape;
            shape.d = c.d;
            shape.group = group;
            shape.ncell = c.ncell;
            shape.width = c.width;
            shape.depth = depth;
            shape.share_input = share_input;
            shape.share_trunk = c.share_trunk;
            // Masses that float32 tells apart, however wide the layers.
            const float deviation = 1.3f / std::sqrt(static_cast<float>(c.width));
            return std::make_shared<QueryClassifier>(
                    shape, random.normal(parameter_count(shape), deviation).data());
        };
        switch (c.query) {
            case QueryKind::quantizer:
                break;
            case QueryKind::l2:
                p = symmetric(p);
                break;
            case QueryKind::means:
                p.query = std::make_shared<CellMeanAssigner>(c.d, c.ncell);
                break;
            case QueryKind::classifier:
                p.query = classifier(2, false);
                break;
            case QueryKind::perceptron:
                p.query = classifier(0, true);
                break;
            case QueryKind::blend: {
                std::vector<BlendWeights> weights(group);
                for (BlendWeights& w : weights) {
                    const std::vector<float> x = random.normal(5);
                    w = {x[0], x[1], x[2], x[3], x[4]};
                }
                p.query = std::make_shared<BlendAssigner>(
                        classifier(2, false), weights, 0.125f);
            }
        }
        return p;
    }

    /// The caches of a sequence in the case's type and layout, rows of the page
    /// table shuffled, and the view of their first `length` slots.
    struct Cache {
        std::vector<char> k, v;
        std::vector<int32_t> page_table;
        int64_t npages = 0;
        AdapterCase c;
        int64_t capacity = 0;

        /// @param k_data, v_data, pages  where these lie, in whatever memory
        KvView view(
                const void* k_data,
                const void* v_data,
                const int32_t* pages,
                int64_t length) const {
            switch (c.layout) {
                case CacheLayout::head_major:
                    return KvView::head_major(
                            k_data,
                            v_data,
                            c.dtype,
                            length,
                            capacity,
                            c.heads_kv,
                            c.d,
                            c.d);
                case CacheLayout::paged:
                    return KvView::paged(
                            k_data,
                            v_data,
                            c.dtype,
                            length,
                            npages,
                            kPage,
                            pages,
                            c.heads_kv,
                            c.d,
                            c.d);
                case CacheLayout::strided: {
                    KvView view = KvView::token_major(
                            k_data, v_data, c.dtype, length, c.heads_kv, c.d, c.d);
                    view.k_head_stride += 8;
                    view.k_token_stride = c.heads_kv * view.k_head_stride + 24;
                    view.v_token_stride += 16;
                    return view;
                }
                default:
                    return KvView::token_major(
                            k_data, v_data, c.dtype, length, c.heads_kv, c.d, c.d);
            }
        }
        KvView view(int64_t length) const {
            return view(k.data(), v.data(), page_table.data(), length);
        }
    };

    Cache cache(size_t sequence, Random& random) const {
        Cache cache;
        cache.c = c;
        const int64_t n = c.lengths[sequence];
        cache.capacity = n;
        cache.npages = (n + kPage - 1) / kPage + 3;
        for (int64_t i = 0; i < cache.npages; i++) {
            cache.page_table.push_back(static_cast<int32_t>(i));
        }
        std::shuffle(
                cache.page_table.begin(), cache.page_table.end(), random.engine);
        const int64_t slots =
                c.layout == CacheLayout::paged ? cache.npages * kPage : n;
        const int64_t row = c.heads_kv * (c.d + 8) + 24; // the widest layout's
        cache.k.resize(slots * row * 2);
        cache.v.resize(cache.k.size());
        const KvView view = cache.view(n);
        for (int64_t i = 0; i < n; i++) {
            for (int h = 0; h < c.heads_kv; h++) {
                const int64_t at = (i * c.heads_kv + h) * c.d;
                from_float(
                        c.dtype,
                        k[sequence].data() + at,
                        c.d,
                        const_cast<void*>(view.key(h, i)));
                from_float(
                        c.dtype,
                        v[sequence].data() + at,
                        c.d,
                        const_cast<void*>(view.value(h, i)));
            }
        }
        return cache;
    }

    std::vector<float> queries() const {
        std::vector<float> all;
        for (const auto& x : q) {
            all.insert(all.end(), x.begin(), x.end());
        }
        return all;
    }
};

/// What a row chooses its cells by: scores of all cells of its KV head, and by how
/// much two that differ may change places where sums are taken in another order.
struct RowScores {
    std::vector<float> score;
    float rounding = 0;
};

/// What an adapter made of a case.
struct CaseResult {
    ProbedCells probed;
    std::vector<float> output, lse;
    std::vector<AttendStats> stats;
    /// slots of the cells: by sequence, KV head and partition
    std::vector<std::vector<std::vector<std::vector<std::vector<int32_t>>>>> slots;
    std::vector<RowScores> scores; ///< of each row of probed; on the CPU alone
};

/// Holds for every adapter: each far key lies in one cell of each partition, the
/// probed cells keep to their limits, and output, LSE and statistics are those of
/// exactly the keys that the probed cells hold, in double precision.
inline void check_case(
        const CaseWorld& world,
        const CaseResult& got,
        double tolerance,
        double lse_tolerance) {
    const AdapterCase& c = world.c;
    const int group = c.heads_q / c.heads_kv;
    const int choices = c.share_group ? 1 : group;
    size_t token = 0;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        const int64_t n = c.lengths[s];
        const int64_t listed_end = std::max(c.sink, n - c.window);
        for (int h = 0; h < c.heads_kv; h++) {
            for (const auto& partition : got.slots[s][h]) {
                std::vector<int32_t> all;
                for (const auto& cell : partition) {
                    EXPECT_TRUE(std::is_sorted(cell.begin(), cell.end()));
                    all.insert(all.end(), cell.begin(), cell.end());
                }
                std::sort(all.begin(), all.end());
                ASSERT_EQ(static_cast<int64_t>(all.size()), listed_end - c.sink);
                for (size_t i = 0; i < all.size(); i++) {
                    ASSERT_EQ(all[i], c.sink + static_cast<int64_t>(i));
                }
            }
        }
        const auto asks = static_cast<int64_t>(world.q[s].size()) / c.heads_q / c.d;
        for (int64_t t = 0; t < asks; t++, token++) {
            const int64_t slot = n - asks + t;
            const int64_t sink_end = std::min(c.sink, slot + 1);
            const int64_t window_begin = std::max(sink_end, slot + 1 - c.window);
            for (int head = 0; head < c.heads_q; head++) {
                SCOPED_TRACE(::testing::Message()
                             << "sequence " << s << " token " << t << " head "
                             << head);
                const int h = head / group;
                const int64_t r = (static_cast<int64_t>(token) * c.heads_kv + h) *
                                choices +
                        (c.share_group ? 0 : head % group);
                std::set<int64_t> far;
                std::set<int32_t> cells;
                for (int64_t i = got.probed.begin[r]; i < got.probed.begin[r + 1];
                     i++) {
                    int cell = got.probed.cells[i];
                    cells.insert(cell);
                    size_t p = 0;
                    while (cell >= c.ncell) {
                        cell -= c.ncell;
                        p++;
                    }
                    for (int32_t j : got.slots[s][h][p][cell]) {
                        if (j < window_begin) {
                            far.insert(j);
                        }
                    }
                }
                const int64_t far_keys = window_begin - sink_end;
                if (c.selectivity == 1 || far_keys <= c.dense_below) {
                    EXPECT_EQ(static_cast<int64_t>(far.size()), far_keys);
                } else if (cells.size() > 1) { // one may exceed the limit
                    EXPECT_LE(static_cast<double>(far.size()), c.selectivity * far_keys);
                }
                std::vector<int64_t> reads;
                for (int64_t j = 0; j <= slot && c.attend_dense; j++) {
                    if (j < sink_end || j >= window_begin) {
                        reads.push_back(j);
                    }
                }
                const size_t dense = reads.size();
                reads.insert(reads.end(), far.begin(), far.end());
                const float* query =
                        world.q[s].data() + (t * c.heads_q + head) * c.d;
                std::vector<double> score;
                double most = -INFINITY;
                for (int64_t j : reads) {
                    const float* key =
                            world.k[s].data() + (j * c.heads_kv + h) * c.d;
                    double dot = 0;
                    for (int i = 0; i < c.d; i++) {
                        dot += double(query[i]) * key[i];
                    }
                    score.push_back(dot / std::sqrt(double(c.d)));
                    most = std::max(most, score.back());
                }
                double sum = 0, dense_sum = 0;
                std::vector<double> o(c.d, 0.0);
                for (size_t i = 0; i < reads.size(); i++) {
                    const double w = std::exp(score[i] - most);
                    sum += w;
                    dense_sum += i < dense ? w : 0;
                    const float* value =
                            world.v[s].data() + (reads[i] * c.heads_kv + h) * c.d;
                    for (int j = 0; j < c.d; j++) {
                        o[j] += w * value[j];
                    }
                }
                const int64_t row = static_cast<int64_t>(token) * c.heads_q + head;
                const AttendStats& stats = got.stats[row];
                EXPECT_EQ(stats.cells, static_cast<int64_t>(cells.size()));
                EXPECT_EQ(stats.keys_read, static_cast<int64_t>(far.size()));
                EXPECT_EQ(stats.far_keys, far_keys);
                if (reads.empty()) {
                    EXPECT_EQ(got.lse[row], -INFINITY);
                    EXPECT_EQ(stats.dense_mass, 0);
                    for (int j = 0; j < c.d; j++) {
                        EXPECT_EQ(got.output[row * c.d + j], 0);
                    }
                    continue;
                }
                EXPECT_NEAR(got.lse[row], most + std::log(sum), lse_tolerance);
                EXPECT_NEAR(stats.dense_mass, dense_sum / sum, lse_tolerance);
                EXPECT_LE(stats.dense_mass, 1);
                double difference = 0, norm = 0;
                for (int j = 0; j < c.d; j++) {
                    o[j] /= sum;
                    const double e = got.output[row * c.d + j] - o[j];
                    difference += e * e;
                    norm += o[j] * o[j];
                }
                EXPECT_LE(std::sqrt(difference / norm), tolerance);
            }
        }
    }
}

/// The scores that each row of a batch, which is the whole case, chooses by.
inline std::vector<RowScores> row_scores(
        const CaseWorld& world,
        const AttentionAdapter& adapter,
        const std::vector<SequenceInput>& batch) {
    const AdapterCase& c = world.c;
    const int group = c.heads_q / c.heads_kv;
    const float scale = adapter.params().scale;
    std::vector<RowScores> rows;
    for (size_t s = 0; s < batch.size(); s++) {
        for (int64_t t = 0; t < batch[s].q_len; t++) {
            const int64_t slot = c.lengths[s] - batch[s].q_len + t;
            for (int h = 0; h < c.heads_kv; h++) {
                std::vector<RowScores> mine(c.share_group ? 1 : group);
                for (int p = 0; p < adapter.npartition(batch[s].sequence, h); p++) {
                    const Partition& partition =
                            adapter.partition(batch[s].sequence, h, p);
                    const CellLists& lists = adapter.lists(batch[s].sequence, h, p);
                    const auto first = world.q[s].begin() +
                            (t * c.heads_q + int64_t(h) * group) * c.d;
                    const std::vector<float> post(first, first + int64_t(group) * c.d);
                    std::vector<float> pre = post;
                    const std::vector<int64_t> position(group, slot);
                    if (partition.query->needs & NEEDS_PRE_ROPE) {
                        RotaryEmbedding(partition.rope)
                                .derotate(group, position.data(), pre.data());
                    }
                    std::vector<int32_t> head(group);
                    std::iota(head.begin(), head.end(), 0);
                    RoutingInput in;
                    in.n = group;
                    in.d = c.d;
                    in.pre_rope = pre.data();
                    in.post_rope = post.data();
                    in.position = position.data();
                    in.head = head.data();
                    const CellStats stats = lists.stats();
                    std::vector<float> scores(size_t(group) * c.ncell);
                    partition.query->scores(in, &stats, scores.data());
                    float largest = 0;
                    for (float x : scores) {
                        largest = std::isfinite(x) ? std::max(largest, std::abs(x))
                                                   : largest;
                    }
                    float rounding = 1e-5f * largest;
                    if (c.share_group) {
                        std::vector<int64_t> counts;
                        for (int cell = 0; cell < c.ncell; cell++) {
                            counts.push_back(
                                    lists.count_before(cell, slot + 1 - c.window));
                        }
                        std::vector<float> shared(c.ncell);
                        share_scores(
                                group,
                                c.ncell,
                                scores.data(),
                                counts.data(),
                                scale,
                                shared.data());
                        scores = std::move(shared);
                        rounding = 1e-5f + scale * rounding; // logarithms
                    }
                    for (size_t i = 0; i < mine.size(); i++) {
                        RowScores& row = mine[i];
                        const auto of_row =
                                scores.begin() + static_cast<int64_t>(i) * c.ncell;
                        row.score.insert(row.score.end(), of_row, of_row + c.ncell);
                        row.rounding = std::max(row.rounding, rounding);
                    }
                }
                rows.insert(rows.end(), mine.begin(), mine.end());
            }
        }
    }
    return rows;
}

/// The same choice as the CPU's: at the first place where a row differs, the two
/// cells' scores differ by rounding. (Cells are taken best first, while they fit:
/// from there on the room is another.)
/// @return  rows that are the same
inline size_t check_choice(
        const ProbedCells& got,
        const CaseResult& cpu) {
    EXPECT_EQ(got.begin.size(), cpu.probed.begin.size());
    size_t same = 0;
    for (size_t r = 0; r < cpu.scores.size() && r + 1 < got.begin.size(); r++) {
        const auto row = [&](const ProbedCells& p) {
            return std::vector<int32_t>(
                    p.cells.begin() + p.begin[r], p.cells.begin() + p.begin[r + 1]);
        };
        const std::vector<int32_t> a = row(cpu.probed), b = row(got);
        const auto [x, y] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
        if (x == a.end() && y == b.end()) {
            same++;
        } else if (x == a.end() || y == b.end()) {
            ADD_FAILURE() << "row " << r << " probes " << b.size() << " cells, "
                          << a.size() << " on the CPU";
        } else {
            const RowScores& scores = cpu.scores[r];
            EXPECT_NEAR(
                    scores.score.at(*x), scores.score.at(*y), scores.rounding)
                    << "row " << r << " takes cell " << *y << " and the CPU " << *x;
        }
    }
    return same;
}

/// The case on the CPU.
inline CaseResult run_on_cpu(const CaseWorld& world, Random& random) {
    const AdapterCase& c = world.c;
    AttentionAdapter adapter(world.params, world.partitions);
    std::vector<CaseWorld::Cache> caches;
    std::vector<SequenceInput> batch;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        caches.push_back(world.cache(s, random));
    }
    CaseResult result;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        SequenceInput in;
        in.sequence = adapter.create();
        in.kv = caches[s].view(c.lengths[s]);
        in.q_len = std::min<int64_t>(c.q_len, c.lengths[s]);
        batch.push_back(in);
        adapter.append(in.sequence, in.kv);
        result.slots.emplace_back();
        for (int h = 0; h < c.heads_kv; h++) {
            result.slots.back().emplace_back();
            for (int p = 0; p < adapter.npartition(in.sequence, h); p++) {
                const CellLists& lists = adapter.lists(in.sequence, h, p);
                result.slots.back().back().emplace_back();
                for (int cell = 0; cell < lists.ncell(); cell++) {
                    result.slots.back().back().back().push_back(lists.slots(cell));
                }
            }
        }
    }
    const std::vector<float> queries = world.queries();
    const size_t rows = queries.size() / c.d;
    result.output.resize(rows * c.d);
    result.lse.resize(rows);
    result.stats.resize(rows);
    result.probed = adapter.route(batch, queries.data());
    result.scores = row_scores(world, adapter, batch);
    AttendOutput out;
    out.output = result.output.data();
    out.lse = result.lse.data();
    out.stats = result.stats.data();
    adapter.attend_preassigned(batch, queries.data(), result.probed, out);
    return result;
}

} // namespace faiss_saap::tests
