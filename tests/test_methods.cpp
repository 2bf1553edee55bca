/// The selection rules of the benchmark's methods against brute force.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include <faiss/IndexHNSW.h>
#include <faiss/IndexPQ.h>

#include <faiss_saap/faiss_compat.h>

#include "common.h"
#include "common/evaluate.h"
#include "example_method.h"
#include "methods/MethodList.h"
#include "planted_trace.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;
using namespace faiss_saap::tests;

namespace {

/// The first tokens of a real text.
HeadData beginning(int64_t tokens) {
    HeadData data(Trace(embedded_trace()), 21, 0);
    data.tokens = tokens;
    data.position.resize(tokens);
    for (auto* x : {&data.keys_pre, &data.keys_post, &data.values}) {
        x->resize(tokens * data.d);
    }
    for (auto* x : {&data.queries_pre, &data.queries_post}) {
        x->resize(tokens * data.group * data.d);
    }
    return data;
}

struct World {
    const HeadData data = beginning(2048);
    Setup setup{data};
    int64_t token = data.tokens - 7;
    FarRange far = far_range(token, 16, 256);
    std::vector<GroundTruth> truth;
    Step step{data, token, far, truth};

    World() {
        setup.ncell = 64;
        setup.niter = 2;
        for (int h = 0; h < data.group; h++) {
            truth.emplace_back(data, token, h);
        }
    }
    std::unique_ptr<Method> built(const std::string& name) const {
        auto m = find_method(name).make(setup, false);
        m->build(data, data.tokens);
        return m;
    }
};

const World& world() {
    static const World w;
    return w;
}

/// Whole groups of far keys by descending score while they fit.
std::vector<int32_t> take(
        const std::vector<int>& group_of, // of each far key
        const std::vector<double>& score, // of each group
        int64_t limit,
        int64_t first) {
    std::vector<int64_t> count(score.size(), 0);
    for (int g : group_of) {
        count[g]++;
    }
    std::vector<int> order(score.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return score[a] > score[b];
    });
    std::vector<char> taken(score.size(), 0);
    for (int g : order) {
        if (count[g] <= limit) {
            taken[g] = 1;
            limit -= count[g];
        }
    }
    std::vector<int32_t> slots;
    for (size_t i = 0; i < group_of.size(); i++) {
        if (taken[group_of[i]]) {
            slots.push_back(static_cast<int32_t>(first + i));
        }
    }
    return slots;
}

/// Share of the keys of a that b has too.
double agreement(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
    std::vector<int32_t> both;
    std::set_intersection(
            a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    return a.empty() ? b.empty() : double(both.size()) / a.size();
}

} // namespace

class EveryMethod : public ::testing::TestWithParam<std::string> {};

TEST_P(EveryMethod, ReadsFarKeysOnceAndWithinTheLimit) {
    const World& w = world();
    const auto method = w.built(GetParam());
    for (int64_t limit : {int64_t(0), int64_t(1), int64_t(100), w.far.size()}) {
        const Selection s = method->probe(w.step, limit);
        ASSERT_EQ(s.slots.size(), size_t(w.data.group));
        EXPECT_GE(s.index_bytes, 0);
        for (const auto& slots : s.slots) {
            EXPECT_LE(static_cast<int64_t>(slots.size()), limit);
            EXPECT_TRUE(std::is_sorted(slots.begin(), slots.end()));
            EXPECT_EQ(std::set<int32_t>(slots.begin(), slots.end()).size(),
                      slots.size());
            for (int32_t j : slots) {
                EXPECT_TRUE(j >= w.far.begin && j < w.far.end) << j;
            }
        }
    }
}

static std::vector<std::string> untrained() {
    std::vector<std::string> names;
    for (const MethodEntry& e : all_methods()) {
        if (!e.needs_trained) {
            names.push_back(e.name);
        }
    }
    return names;
}

INSTANTIATE_TEST_SUITE_P(
        Methods,
        EveryMethod,
        ::testing::ValuesIn(untrained()),
        [](const auto& info) { return info.param; });

TEST(Methods, OracleReadsTheLargestWeights) {
    const World& w = world();
    const Selection s = w.built("oracle_topk")->probe(w.step, 50);
    for (int h = 0; h < w.data.group; h++) {
        std::vector<double> far(
                w.truth[h].mass.begin() + w.far.begin,
                w.truth[h].mass.begin() + w.far.end);
        std::sort(far.begin(), far.end(), std::greater<double>());
        EXPECT_NEAR(
                w.truth[h].mass_of(s.slots[h]),
                std::accumulate(far.begin(), far.begin() + 50, 0.0),
                1e-6);
    }
}

TEST(Methods, QuestTakesPagesByTheirBound) {
    const World& w = world();
    const int d = w.data.d;
    const Selection s = w.built("quest")->probe(w.step, 320);
    for (int h = 0; h < w.data.group; h++) {
        const float* q = w.data.query_post(w.token, h);
        std::vector<int> page;
        for (int64_t j = w.far.begin; j < w.far.end; j++) {
            page.push_back(static_cast<int>((j - w.far.begin) / 16));
        }
        std::vector<double> bound;
        for (int p = 0; p <= page.back(); p++) {
            double sum = 0;
            for (int i = 0; i < d; i++) {
                double best = -INFINITY;
                for (int64_t j = 16 + 16 * p; j < 32 + 16 * p; j++) {
                    best = std::max(
                            best, double(q[i]) * w.data.keys_post[j * d + i]);
                }
                sum += best;
            }
            bound.push_back(sum);
        }
        EXPECT_GE(agreement(take(page, bound, 320, w.far.begin), s.slots[h]), .95);
    }
    // Two bounds of two-byte numbers for every 16 keys, and the counts.
    const double pages = std::ceil((w.data.tokens - 16) / 16.0);
    EXPECT_DOUBLE_EQ(s.index_bytes, pages * (4 * d + 4));
}

TEST(Methods, StreamingReadsWhatIsNext) {
    const World& w = world();
    for (const auto& slots : w.built("streaming_llm")->probe(w.step, 33).slots) {
        ASSERT_EQ(slots.size(), 33u);
        EXPECT_EQ(slots.front(), w.far.end - 33);
        EXPECT_EQ(slots.back(), w.far.end - 1);
    }
}

TEST(Methods, MagicPigSamplesWithTheProbabilityItDividesBy) {
    // With every key sampled by chance alone, weights divided by probabilities
    // add up to what attention over all far keys has: mean over many draws.
    const World& w = world();
    double ratio = 0;
    const int draws = 6;
    for (int draw = 0; draw < draws; draw++) {
        benchs::Setup setup(w.data);
        setup.seed = 100 + draw;
        const auto method = find_method("magicpig").make(setup, false);
        method->build(w.data, w.data.tokens);
        const Selection s = method->probe(w.step, w.far.size());
        for (int h = 0; h < w.data.group; h++) {
            const double far = w.truth[h].mass_of(w.far.begin, w.far.end);
            ratio += std::exp(s.attended[h].lse - w.truth[h].lse) / far /
                    (draws * w.data.group);
        }
    }
    EXPECT_NEAR(ratio, 1, .15);
}

/// Far keys that a search of Faiss's own returns, ascending.
std::vector<int32_t> found_by_faiss(
        const faiss::Index& index,
        const float* query,
        int64_t k,
        int64_t first) {
    std::vector<float> distances(k);
    std::vector<idx_t> labels(k);
    index.search(1, query, k, distances.data(), labels.data());
    std::vector<int32_t> slots;
    for (idx_t label : labels) {
        slots.push_back(static_cast<int32_t>(first + label));
    }
    std::sort(slots.begin(), slots.end());
    return slots;
}

TEST(Methods, HnswFindsWhatFaissFinds) {
    const World& w = world();
    auto method = find_method("hnsw").make(w.setup, false);
    method->build(w.data, w.far.end);
    faiss::IndexHNSWFlat faiss_index(w.data.d, 16, faiss::METRIC_INNER_PRODUCT);
    faiss_index.hnsw.efSearch = 200;
    faiss_index.add(
            w.far.size(), w.data.keys_post.data() + w.far.begin * w.data.d);
    const Selection s = method->probe(w.step, 200);
    for (int h = 0; h < w.data.group; h++) {
        std::vector<float> logits;
        for (int64_t j = w.far.begin; j < w.far.end; j++) {
            logits.push_back(static_cast<float>(std::log(w.truth[h].mass[j])));
        }
        const auto best = best_keys(logits.data(), w.far, 200);
        const auto faiss_keys = found_by_faiss(
                faiss_index,
                w.data.query_post(w.token, h),
                200,
                w.far.begin);
        // Graphs differ by the order in which threads insert.
        EXPECT_NEAR(
                agreement(best, s.slots[h]), agreement(best, faiss_keys), .05);
        EXPECT_GT(agreement(best, s.slots[h]), .5);
    }
}

/// Sub-quantizers and bits of a scan of codes, and its bytes for a key.
struct Codes {
    const char* method;
    int m, bits;
    double bytes;
};

class ScanOfCodes : public ::testing::TestWithParam<Codes> {};

TEST_P(ScanOfCodes, ReadsWhatFaissFinds) {
    // An index of Faiss's own, trained on the same keys and asked by search.
    const World& w = world();
    const Codes c = GetParam();
    const int d = w.data.d;
    faiss::IndexPQ index(d, c.m, c.bits, faiss::METRIC_INNER_PRODUCT);
    index.pq.cp.niter = w.setup.niter;
    index.pq.cp.seed = w.setup.seed;
    index.pq.cp.min_points_per_centroid = 1;
    index.train(w.data.tokens, w.data.keys_post.data());
    index.add(w.far.size(), w.data.keys_post.data() + w.far.begin * d);

    const int64_t limit = 300;
    const Selection s = w.built(c.method)->probe(w.step, limit);
    for (int h = 0; h < w.data.group; h++) {
        const float* q = w.data.query_post(w.token, h);
        // Keys of one code have one score: the last ones may be others.
        const auto faiss_keys = found_by_faiss(index, q, limit, w.far.begin);
        EXPECT_GE(agreement(faiss_keys, s.slots[h]), .97);
        EXPECT_NEAR(
                w.truth[h].mass_of(s.slots[h]),
                w.truth[h].mass_of(faiss_keys),
                .01 * w.truth[h].mass_of(w.far.begin, w.far.end));

        // Brute force over the decoded keys: no key left out scores higher.
        std::vector<float> key(d);
        float worst_read = INFINITY, best_left = -INFINITY;
        for (int64_t j = w.far.begin; j < w.far.end; j++) {
            index.reconstruct(j - w.far.begin, key.data());
            const float dot = std::inner_product(q, q + d, key.begin(), 0.0f);
            const bool read = std::binary_search(
                    s.slots[h].begin(), s.slots[h].end(), j);
            (read ? worst_read : best_left) = read
                    ? std::min(worst_read, dot)
                    : std::max(best_left, dot);
        }
        EXPECT_GE(worst_read, best_left - 1e-4f * std::abs(best_left));
    }
    EXPECT_DOUBLE_EQ(
            s.index_bytes, c.bytes * w.data.tokens + 2.0 * (1 << c.bits) * d);

    // One choice for the heads, as PQCache makes it: their softmaxes over the
    // scores of the codes are added up.
    const int64_t n = w.far.size();
    std::vector<double> shared(n, 0.0);
    for (int h = 0; h < w.data.group; h++) {
        const float* q = w.data.query_post(w.token, h);
        std::vector<double> mass(n);
        std::vector<float> key(d);
        for (int64_t j = 0; j < n; j++) {
            index.reconstruct(j, key.data());
            mass[j] = std::exp(
                    w.data.scale * std::inner_product(q, q + d, key.begin(), 0.0));
        }
        const double sum = std::accumulate(mass.begin(), mass.end(), 0.0);
        for (int64_t j = 0; j < n; j++) {
            shared[j] += mass[j] / sum;
        }
    }
    std::vector<int> one_by_one(n);
    std::iota(one_by_one.begin(), one_by_one.end(), 0);
    const auto expected = take(one_by_one, shared, limit, w.far.begin);
    const auto group = w.built(std::string(c.method) + "_group")->probe(w.step, limit);
    for (const auto& slots : group.slots) {
        EXPECT_EQ(slots, group.slots[0]);
        EXPECT_GE(agreement(expected, slots), .97);
    }
}

INSTANTIATE_TEST_SUITE_P(
        Methods,
        ScanOfCodes,
        ::testing::Values(
                Codes{"pq_scan", 8, 8, 8},
                Codes{"pq_scan_4bit", 8, 4, 4},
                Codes{"pqcache", 2, 6, 1.5}),
        [](const auto& info) { return info.param.method; });

TEST(Methods, SegmentsAreClusteredOnTheirOwn) {
    // Clustering half of the text and the rest in short segments: every far key
    // is in a cell, and reading all of them is dense attention.
    World w;
    w.setup.clustered = w.data.tokens / 2;
    const auto method = find_method("retroinfer").make(w.setup, false);
    method->build(w.data, w.far.end);
    const Selection s = method->probe(w.step, w.far.size());
    for (const auto& slots : s.slots) {
        EXPECT_EQ(static_cast<int64_t>(slots.size()), w.far.size());
    }
}

TEST(Methods, SegmentsTakeCellsByTheMeansOfTheirKeys) {
    // The text is one segment: spherical k-means of the keys less their mean,
    // 16 keys a cell, and the inner product with the mean of a cell's keys.
    const World& w = world();
    const int d = w.data.d;
    const int64_t n = w.data.tokens - w.far.begin;
    const int ncell = static_cast<int>(n / 16);
    const float* keys = w.data.keys_post.data() + w.far.begin * d;
    std::vector<float> centred(keys, keys + n * d);
    for (int i = 0; i < d; i++) {
        double mean = 0;
        for (int64_t j = 0; j < n; j++) {
            mean += double(keys[j * d + i]) / n;
        }
        for (int64_t j = 0; j < n; j++) {
            centred[j * d + i] -= static_cast<float>(mean);
        }
    }
    KMeansParams params;
    params.niter = w.setup.niter;
    params.seed = w.setup.seed;
    params.spherical = true;
    const Partition partition = kmeans_partition(
            n, d, centred.data(), ncell, NEEDS_POST_ROPE, params);
    RoutingInput input;
    input.n = n;
    input.d = d;
    input.post_rope = centred.data();
    std::vector<int32_t> cells(n);
    partition.key->assign(input, nullptr, 1, cells.data(), nullptr);

    std::vector<double> sum(ncell * d, 0.0), count(ncell, 0.0);
    for (int64_t j = 0; j < n; j++) {
        count[cells[j]]++;
        for (int i = 0; i < d; i++) {
            sum[cells[j] * d + i] += keys[j * d + i];
        }
    }
    const Selection s = w.built("retroinfer")->probe(w.step, 200);
    const std::vector<int> far_cells(cells.begin(), cells.begin() + w.far.size());
    for (int h = 0; h < w.data.group; h++) {
        const float* q = w.data.query_post(w.token, h);
        std::vector<double> score(ncell);
        for (int c = 0; c < ncell; c++) {
            const double* of_cell = sum.data() + c * d;
            score[c] = std::inner_product(of_cell, of_cell + d, q, 0.0) /
                    std::max(count[c], 1.0);
        }
        const auto expected = take(far_cells, score, 200, w.far.begin);
        EXPECT_GE(agreement(expected, s.slots[h]), .95);
        EXPECT_NEAR(expected.size(), s.slots[h].size(), 10);
    }
    EXPECT_DOUBLE_EQ(s.index_bytes, ncell * (2.0 * d + 4));
}

TEST(Methods, CodesInTheQueriesMetricFindMoreThanCodesOfKeys) {
    const World& w = world();
    const auto ours = w.built("metric_codes_group")->probe(w.step, 300);
    const auto theirs = w.built("pqcache_group")->probe(w.step, 300);
    double a = 0, b = 0;
    for (int h = 0; h < w.data.group; h++) {
        a += w.truth[h].mass_of(ours.slots[h]);
        b += w.truth[h].mass_of(theirs.slots[h]);
    }
    EXPECT_GT(a, b);
}

TEST(Methods, UnknownNameIsRefused) {
    EXPECT_SENTENCE(find_method("no_such"), "no_such");
}

TEST(Methods, TheExampleInTheDocsWorks) {
    const World& w = world();
    const MethodEntry entry = strided_methods().front();
    const auto method = entry.make(w.setup, false);
    method->build(w.data, w.data.tokens);
    const Selection s = method->probe(w.step, 100);
    for (const auto& slots : s.slots) {
        EXPECT_LE(slots.size(), 100u);
        EXPECT_GE(slots.size(), 90u);
        EXPECT_EQ(slots[1] - slots[0], slots[2] - slots[1]);
    }
}
