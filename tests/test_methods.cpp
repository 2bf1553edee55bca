/// The selection rules of the benchmark's methods against brute force.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>

#include <omp.h>

#include <faiss/IndexHNSW.h>
#include <faiss/IndexPQ.h>
#include <faiss/utils/distances.h>
#include <faiss/utils/random.h>

#include <faiss_saap/KeyCodes.h>
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

/// Keys and queries of any kind in place of a text's: `group` queries ask at a
/// token.
HeadData
head_of(int d, int group, std::vector<float> keys, std::vector<float> queries) {
    HeadData data = beginning(1);
    data.d = d;
    data.group = group;
    data.tokens = static_cast<int64_t>(keys.size()) / d;
    data.position.resize(data.tokens);
    std::iota(data.position.begin(), data.position.end(), int64_t(0));
    data.values.assign(keys.size(), 0.0f);
    data.keys_post = std::move(keys);
    data.queries_post = std::move(queries);
    return data;
}

/// What depends on the order in which threads come is the same each time.
struct OneThread {
    const int before = omp_get_max_threads();
    OneThread() {
        omp_set_num_threads(1);
    }
    ~OneThread() {
        omp_set_num_threads(before);
    }
};

/// The key with the largest inner product.
int32_t best_key(const float* q, const float* keys, int64_t n, int d) {
    std::vector<float> dots(n);
    for (int64_t i = 0; i < n; i++) {
        dots[i] = faiss::fvec_inner_product(q, keys + i * d, d);
    }
    return static_cast<int32_t>(
            std::max_element(dots.begin(), dots.end()) - dots.begin());
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

TEST(Methods, CodesRankTheCandidatesOfTheCells) {
    const World& w = world();
    const int64_t limit = 40;
    const Selection got = w.built("ivf_codes_group")->probe(w.step, limit);
    const Selection cells = w.built("ivf_rope_ip_group")->probe(w.step, 6 * limit);
    KeyCodes codes(w.data.d, w.far.begin);
    for (int64_t j = w.far.begin; j < w.far.end; j++) {
        codes.append(w.data.keys_post.data() + j * w.data.d);
    }
    const auto best = codes.best(
            w.data.group, w.data.query_post(w.step.token, 0), w.data.scale,
            cells.slots[0], limit);
    ASSERT_EQ(best.size(), 40u);
    for (const auto& slots : got.slots) {
        EXPECT_EQ(slots, best);
    }
    EXPECT_EQ(got.index_bytes,
              cells.index_bytes +
                      double(cells.slots[0].size() * KeyCodes::code_size(w.data.d)));
}

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

/// Pairs of opposite keys, so that their mean is nothing, the first of each at
/// this cosine to a query of length 1.
/// @return size 2 * pairs * d
std::vector<float> opposites(
        const std::vector<float>& q,
        float cosine,
        int pairs,
        std::mt19937& random) {
    const int d = static_cast<int>(q.size());
    std::normal_distribution<float> normal;
    std::vector<float> keys;
    for (int i = 0; i < pairs; i++) {
        std::vector<float> across(d);
        for (float& x : across) {
            x = normal(random);
        }
        const float along =
                faiss::fvec_inner_product(across.data(), q.data(), d);
        for (int j = 0; j < d; j++) {
            across[j] -= along * q[j];
        }
        faiss::fvec_renorm_L2(d, 1, across.data());
        for (float sign : {1.0f, -1.0f}) {
            for (int j = 0; j < d; j++) {
                keys.push_back(
                        sign *
                        (cosine * q[j] +
                         std::sqrt(1 - cosine * cosine) * across[j]));
            }
        }
    }
    return keys;
}

/// K and L of MagicPIG.
struct Tables {
    const char* method;
    int bits, tables;
};

class SamplingByTables : public ::testing::TestWithParam<Tables> {};

TEST_P(SamplingByTables, FollowsTheClosedForm) {
    // Equation 10 of the paper.
    const Tables t = GetParam();
    const int d = 32, pairs = 500, draws = 24;
    const std::vector<float> cosines = {.1f, .3f, .5f, .6f};
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> q(d), keys;
    for (float& x : q) {
        x = normal(random);
    }
    faiss::fvec_renorm_L2(d, 1, q.data());
    for (float cosine : cosines) {
        const auto more = opposites(q, cosine, pairs, random);
        keys.insert(keys.end(), more.begin(), more.end());
    }
    const HeadData data = head_of(d, 1, keys, q);
    const std::vector<GroundTruth> none;
    std::map<float, std::vector<double>> shares; // of each cosine, by draw
    for (int draw = 0; draw < draws; draw++) {
        benchs::Setup setup(data);
        setup.sink = 0;
        setup.seed = draw;
        const auto method = find_method(t.method).make(setup, false);
        method->build(data, data.tokens);
        const Selection s = method->probe(
                {data, 0, {0, data.tokens}, none}, data.tokens);
        for (float cosine : cosines) {
            shares[cosine].push_back(0);
            shares[-cosine].push_back(0);
        }
        for (int32_t j : s.slots[0]) {
            const float cosine = cosines[j / (2 * pairs)];
            shares[j % 2 ? -cosine : cosine].back() += 1.0 / pairs;
        }
    }
    for (const auto& [cosine, by_draw] : shares) {
        const double hit = std::pow(1 - std::acos(cosine) / M_PI, t.bits);
        const double expected = 1 - std::pow(1 - hit, t.tables) -
                t.tables * hit * std::pow(1 - hit, t.tables - 1);
        const double mean =
                std::accumulate(by_draw.begin(), by_draw.end(), 0.0) / draws;
        double variance = 0;
        for (double share : by_draw) {
            variance += (share - mean) * (share - mean) / (draws - 1);
        }
        // All keys of a draw are hashed by the same planes: their number says
        // too little of the spread.
        const double spread = std::sqrt(
                std::max(variance, expected * (1 - expected) / pairs) / draws);
        EXPECT_LT(spread, .02);
        EXPECT_NEAR(mean, expected, 4 * spread) << "at a cosine of " << cosine;
    }
}

INSTANTIATE_TEST_SUITE_P(
        Methods,
        SamplingByTables,
        ::testing::Values(
                Tables{"magicpig_8x75", 8, 75},
                Tables{"magicpig_9x120", 9, 120},
                Tables{"magicpig_10x150", 10, 150}),
        [](const auto& info) { return info.param.method; });

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
    const OneThread same_graph;
    const World& w = world();
    auto method = find_method("hnsw").make(w.setup, false);
    method->build(w.data, w.far.end);
    faiss::IndexHNSWFlat faiss_index(w.data.d, 16, faiss::METRIC_INNER_PRODUCT);
    faiss_index.hnsw.efSearch = 200;
    faiss_index.hnsw.search_bounded_queue = false; // as the paper has it
    faiss_index.add(
            w.far.size(), w.data.keys_post.data() + w.far.begin * w.data.d);
    const Selection s = method->probe(w.step, 200);
    for (int h = 0; h < w.data.group; h++) {
        const auto faiss_keys = found_by_faiss(
                faiss_index,
                w.data.query_post(w.token, h),
                200,
                w.far.begin);
        EXPECT_GE(agreement(faiss_keys, s.slots[h]), .99);
    }
}

/// Numbers as numpy.random.RandomState draws them.
struct RandomState {
    std::mt19937 random;
    double kept = NAN;

    explicit RandomState(uint32_t seed) : random(seed) {}
    double rand() {
        const double a = random() >> 5, b = random() >> 6;
        return (a * 67108864 + b) / 9007199254740992;
    }
    double normal() {
        if (!std::isnan(kept)) {
            return std::exchange(kept, NAN);
        }
        double a, b, r;
        do {
            a = 2 * rand() - 1;
            b = 2 * rand() - 1;
            r = a * a + b * b;
        } while (r >= 1 || r == 0);
        const double f = std::sqrt(-2 * std::log(r) / r);
        kept = f * a;
        return f * b;
    }
};

TEST(Methods, HnswFindsAsManyAsFaissAsksOfItsOwn) {
    const OneThread same_graph;
    // tests/test_graph_based.py of Faiss, test_hnsw_IP: of 500 best keys among
    // 1,500 a beam of 16 is to find 470. Its data: a bent ellipsoid of 10
    // dimensions in 32.
    const int d = 32, inner = 10, n = 2000, nb = 1500;
    RandomState rs(1338);
    std::vector<double> x(n * inner), map(inner * d), frequency(d);
    std::generate(x.begin(), x.end(), [&] { return rs.normal(); });
    std::generate(map.begin(), map.end(), [&] { return rs.rand(); });
    std::generate(frequency.begin(), frequency.end(), [&] {
        return rs.rand() * 4 + .1;
    });
    std::vector<float> vectors;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < d; j++) {
            double sum = 0;
            for (int k = 0; k < inner; k++) {
                sum += x[i * inner + k] * map[k * d + j];
            }
            vectors.push_back(static_cast<float>(std::sin(sum * frequency[j])));
        }
    }
    // What numpy makes of the seed.
    EXPECT_NEAR(vectors.front(), .9999165, 1e-6);
    EXPECT_NEAR(vectors.back(), .09856559, 1e-6);

    const auto middle = vectors.begin() + nb * d;
    const int queries = n - nb;
    const HeadData data = head_of(
            d, queries, {vectors.begin(), middle}, {middle, vectors.end()});
    benchs::Setup setup(data);
    setup.sink = 0;
    const auto method = find_method("hnsw").make(setup, false);
    method->build(data, nb);
    const std::vector<GroundTruth> none;
    const Selection s = method->probe({data, 0, {0, nb}, none}, 16);
    int found = 0;
    for (int h = 0; h < queries; h++) {
        found += std::binary_search(
                s.slots[h].begin(),
                s.slots[h].end(),
                best_key(data.query_post(0, h), vectors.data(), nb, d));
    }
    std::printf("best keys found: %d of 500, Faiss asks for 470\n", found);
    EXPECT_GE(found, 470);
}

/// Sub-quantizers and bits of a scan of codes, and its bytes for a key.
struct Codes {
    const char* method;
    int m, bits;
    double bytes;
};

/// Faiss's own index, trained on the keys that the method learns from.
/// @param keys  to be found, size n * d
std::unique_ptr<faiss::IndexPQ> index_of_codes(
        const Codes& c,
        const benchs::Setup& setup,
        const float* keys,
        int64_t n) {
    auto index = std::make_unique<faiss::IndexPQ>(
            setup.data.d, c.m, c.bits, faiss::METRIC_INNER_PRODUCT);
    index->pq.cp.niter = setup.niter;
    index->pq.cp.seed = setup.seed;
    index->pq.cp.min_points_per_centroid = 1;
    index->train(setup.clustered, setup.data.keys_post.data());
    index->add(n, keys);
    return index;
}

class ScanOfCodes : public ::testing::TestWithParam<Codes> {};

TEST_P(ScanOfCodes, ReadsWhatFaissFinds) {
    const World& w = world();
    const Codes c = GetParam();
    const int d = w.data.d;
    const auto index = index_of_codes(
            c,
            w.setup,
            w.data.keys_post.data() + w.far.begin * d,
            w.far.size());

    const int64_t limit = 300;
    const Selection s = w.built(c.method)->probe(w.step, limit);
    for (int h = 0; h < w.data.group; h++) {
        const float* q = w.data.query_post(w.token, h);
        // Keys of one code have one score: the last ones may be others.
        const auto faiss_keys = found_by_faiss(*index, q, limit, w.far.begin);
        EXPECT_GE(agreement(faiss_keys, s.slots[h]), .97);
        EXPECT_NEAR(
                w.truth[h].mass_of(s.slots[h]),
                w.truth[h].mass_of(faiss_keys),
                .01 * w.truth[h].mass_of(w.far.begin, w.far.end));

        // Brute force over the decoded keys: no key left out scores higher.
        std::vector<float> key(d);
        float worst_read = INFINITY, best_left = -INFINITY;
        for (int64_t j = w.far.begin; j < w.far.end; j++) {
            index->reconstruct(j - w.far.begin, key.data());
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
            index->reconstruct(j, key.data());
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

/// A source of keys of 64 components, and what others found its codes to cost:
/// the squared error of a key. The codes are those for texts of so many tokens.
struct Published {
    Codes codes;
    std::vector<float> (*source)(int64_t keys);
    int64_t tokens, keys;
    int niter;
    double error, tolerance;
};

class PublishedDistortion : public ::testing::TestWithParam<Published> {};

TEST_P(PublishedDistortion, IsThatOfTheCodes) {
    const OneThread same_sums;
    const Published p = GetParam();
    const int d = 64;
    std::vector<float> q(d);
    faiss::float_randn(q.data(), d, 1);
    const HeadData data = head_of(d, 1, p.source(p.tokens), q);
    benchs::Setup setup(data);
    setup.sink = 0;
    setup.clustered = p.keys;
    setup.niter = p.niter;
    // An index that can be looked into, and reads what the method reads.
    const auto index =
            index_of_codes(p.codes, setup, data.keys_post.data(), p.keys);
    const auto method = find_method(p.codes.method).make(setup, false);
    method->build(data, p.keys);
    const std::vector<GroundTruth> none;
    const Selection s = method->probe({data, 0, {0, p.keys}, none}, 500);
    EXPECT_GE(
            agreement(found_by_faiss(*index, q.data(), 500, 0), s.slots[0]),
            .97);
    double error = 0;
    std::vector<float> decoded(d);
    for (int64_t i = 0; i < p.keys; i++) {
        index->reconstruct(i, decoded.data());
        error += faiss::fvec_L2sqr(
                         decoded.data(), data.keys_post.data() + i * d, d) /
                p.keys;
    }
    std::printf(
            "squared error of a key: %.6g, published %.6g, ratio %.4f\n",
            error,
            p.error,
            error / p.error);
    EXPECT_NEAR(error, p.error, p.tolerance * p.error);
}

/// A normal component for every eight: each code is a quantizer of a scalar.
std::vector<float> one_normal_for_each_code(int64_t n) {
    std::vector<float> normal(n * 8), keys(n * 64, 0.0f);
    faiss::float_randn(normal.data(), normal.size(), 1);
    for (size_t i = 0; i < normal.size(); i++) {
        keys[8 * i] = normal[i];
    }
    return keys;
}

std::vector<float> uniform(int64_t n) {
    RandomState rs(123);
    std::vector<float> keys(n * 64);
    std::generate(keys.begin(), keys.end(), [&] {
        return static_cast<float>(rs.rand());
    });
    return keys;
}

INSTANTIATE_TEST_SUITE_P(
        Methods,
        PublishedDistortion,
        ::testing::Values(
                // Max, Quantizing for Minimum Distortion, 1960, table I: 16
                // levels.
                Published{
                        {"pq_scan_4bit", 8, 4, 4},
                        one_normal_for_each_code,
                        4096,
                        4096,
                        300,
                        8 * .009497,
                        .03},
                // tests/test_product_quantizer.py of Faiss, test_pq.
                Published{
                        {"pqcache", 4, 8, 4},
                        uniform,
                        16385,
                        2000,
                        25,
                        4418.0562 / 2000,
                        .01}),
        [](const auto& info) { return info.param.codes.method; });

TEST(Methods, PqCacheHasMoreCodesBeyond16KTokens) {
    const int d = 64;
    for (const auto& [tokens, codes] :
         {std::pair(16384, Codes{"pqcache", 2, 6, 1.5}),
          std::pair(16385, Codes{"pqcache", 4, 8, 4})}) {
        const HeadData data =
                head_of(d, 1, uniform(tokens), std::vector<float>(d, 1.0f));
        benchs::Setup setup(data);
        setup.clustered = 256;
        const std::vector<GroundTruth> none;
        const auto method = find_method(codes.method).make(setup, false);
        EXPECT_DOUBLE_EQ(
                method->probe({data, 0, {0, 0}, none}, 0).index_bytes,
                codes.bytes * tokens + 2.0 * (1 << codes.bits) * d);
    }
}

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
