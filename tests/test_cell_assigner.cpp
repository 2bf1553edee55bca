#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/SegmentedAssigner.h>
#include <faiss_saap/dtype.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>

#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss/IndexIDMap.h>

#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 44, ncell = 30, n = 25; // d: whole vectors of any width, and a rest

struct Flat {
    faiss::MetricType metric;
    bool rounded; ///< to bfloat16
};

void PrintTo(const Flat& f, std::ostream* out) {
    *out << (f.metric == faiss::METRIC_L2 ? "L2" : "IP") << (f.rounded ? "rounded" : "");
}

std::shared_ptr<faiss::IndexFlat> flat(tests::Random& random, const Flat& of) {
    std::vector<float> x = random.normal(ncell * d);
    round_to(of.rounded ? DType::bfloat16 : DType::float32, ncell * d, x.data());
    auto index = std::make_shared<faiss::IndexFlat>(d, of.metric);
    index->add(ncell, x.data());
    return index;
}

RoutingInput post(const std::vector<float>& x) {
    RoutingInput input;
    input.n = static_cast<int64_t>(x.size()) / d;
    input.d = d;
    input.post_rope = x.data();
    return input;
}

TEST(QuantizerAssigner, OneVectorAndManyScoreTheSameToTheBit) {
    tests::Random random;
    constexpr int kVectors = 300;
    for (int dim : {1, 4, 6, 20, 44, 100, 128}) {
        for (auto metric : {faiss::METRIC_L2, faiss::METRIC_INNER_PRODUCT}) {
            auto index = std::make_shared<faiss::IndexFlat>(dim, metric);
            index->add(ncell, random.normal(ncell * dim).data());
            const QuantizerAssigner assigner(index, NEEDS_POST_ROPE);
            const auto x = random.normal(kVectors * dim);
            RoutingInput input;
            input.d = dim;
            input.n = kVectors;
            input.post_rope = x.data();
            std::vector<float> together(kVectors * ncell), alone(ncell);
            assigner.scores(input, nullptr, together.data());
            input.n = 1;
            for (int i = 0; i < kVectors; i++) {
                input.post_rope = x.data() + i * dim;
                assigner.scores(input, nullptr, alone.data());
                ASSERT_TRUE(std::equal(
                        alone.begin(), alone.end(), together.begin() + i * ncell))
                        << "d " << dim << ", vector " << i;
            }
        }
    }
}

class FlatAssigner : public ::testing::TestWithParam<Flat> {};

TEST_P(FlatAssigner, ScoresAreInUnitsOfTheInnerProduct) {
    tests::Random random;
    const auto quantizer = flat(random, GetParam());
    const QuantizerAssigner assigner(quantizer, NEEDS_POST_ROPE);
    const auto x = random.normal(n * d);
    std::vector<float> scores(n * ncell);
    assigner.scores(post(x), nullptr, scores.data());
    EXPECT_EQ(assigner.bytes_read(), size_t(ncell) * d * (GetParam().rounded ? 2 : 4));
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < ncell; c++) {
            double dot = 0, distance = 0;
            for (int j = 0; j < d; j++) {
                const double a = x[i * d + j];
                const double b = quantizer->get_xb()[c * d + j];
                dot += a * b;
                distance += (a - b) * (a - b);
            }
            const double expected =
                    GetParam().metric == faiss::METRIC_L2 ? -distance / 2 : dot;
            EXPECT_NEAR(scores[i * ncell + c], expected, 1e-4);
        }
    }
}

TEST_P(FlatAssigner, AssignIsTheTopOfTheScores) {
    tests::Random random;
    const QuantizerAssigner assigner(flat(random, GetParam()), NEEDS_POST_ROPE);
    const auto x = random.normal(n * d);
    std::vector<float> scores(n * ncell);
    assigner.scores(post(x), nullptr, scores.data());
    for (int k : {1, 7, ncell}) {
        std::vector<int32_t> cells(n * k), generic(n * k);
        std::vector<float> best(n * k);
        assigner.assign(post(x), nullptr, k, cells.data(), best.data());
        assigner.CellAssigner::assign(
                post(x), nullptr, k, generic.data(), nullptr);
        for (int i = 0; i < n; i++) {
            const int* row = cells.data() + i * k;
            EXPECT_EQ(std::set<int>(row, row + k).size(), size_t(k));
            for (int j = i * k; j < (i + 1) * k; j++) {
                EXPECT_NEAR(best[j], scores[i * ncell + cells[j]], 1e-4);
                // Kernels that round otherwise may change two places.
                EXPECT_NEAR(
                        scores[i * ncell + cells[j]], scores[i * ncell + generic[j]],
                        1e-4);
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
        Metrics,
        FlatAssigner,
        ::testing::Values(
                Flat{faiss::METRIC_L2, false},
                Flat{faiss::METRIC_INNER_PRODUCT, false},
                Flat{faiss::METRIC_L2, true},
                Flat{faiss::METRIC_INNER_PRODUCT, true}),
        ::testing::PrintToStringParamName());

TEST(QuantizerAssigner, ApproximateQuantizerServesToo) {
    tests::Random random;
    auto hnsw = std::make_shared<faiss::IndexHNSWFlat>(d, 16);
    hnsw->add(ncell, random.normal(ncell * d).data());
    const QuantizerAssigner assigner(hnsw, NEEDS_PRE_ROPE);
    const auto x = random.normal(n * d);
    RoutingInput input = post(x);
    std::swap(input.pre_rope, input.post_rope);
    std::vector<int32_t> cells(n * 4);
    std::vector<float> scores(n * ncell);
    assigner.assign(input, nullptr, 4, cells.data(), nullptr);
    assigner.scores(input, nullptr, scores.data());
    for (int i = 0; i < n; i++) {
        const float* s = scores.data() + i * ncell;
        EXPECT_EQ(s[cells[i * 4]], *std::max_element(s, s + ncell));
    }
}

TEST(QuantizerAssigner, AQuantizerWithItsOwnIds) {
    tests::Random random;
    auto inner = flat(random, {faiss::METRIC_L2, false});
    auto mapped = std::make_shared<faiss::IndexIDMap>(
            new faiss::IndexFlatL2(d));
    mapped->own_fields = true;
    std::vector<faiss::Index::idx_t> ids(ncell);
    for (int c = 0; c < ncell; c++) {
        ids[c] = 1000000 + c;
    }
    mapped->add_with_ids(ncell, inner->get_xb(), ids.data());
    const QuantizerAssigner assigner(mapped, NEEDS_POST_ROPE);
    const auto x = random.normal(d);
    std::vector<float> scores(ncell);
    EXPECT_SENTENCE(
            assigner.scores(post(x), nullptr, scores.data()),
            "returned vector 10000");
}

TEST(QuantizerAssigner, CentroidsMustBeFinite) {
    // The key nearest to nothing would draw every key, and no query.
    auto quantizer = std::make_shared<faiss::IndexFlatIP>(d);
    std::vector<float> centroids(3 * d, 1.0f);
    centroids[d + 2] = NAN;
    quantizer->add(3, centroids.data());
    EXPECT_SENTENCE(
            QuantizerAssigner(quantizer, NEEDS_POST_ROPE),
            "vector 1, component 2");
}

TEST(QuantizerAssigner, WrongInput) {
    tests::Random random;
    const QuantizerAssigner assigner(
            flat(random, {faiss::METRIC_L2, false}), NEEDS_POST_ROPE);
    std::vector<float> x(d), scores(ncell);
    std::vector<int32_t> cells(ncell);
    RoutingInput input = post(x);
    input.n = -1;
    EXPECT_SENTENCE(
            assigner.scores(input, nullptr, scores.data()), "input.n = -1");
    input = post(x);
    input.d = d + 1;
    EXPECT_SENTENCE(
            assigner.scores(input, nullptr, scores.data()), "input.d = 45");
    input = post(x);
    std::swap(input.pre_rope, input.post_rope);
    EXPECT_SENTENCE(
            assigner.scores(input, nullptr, scores.data()), "post_rope is null");
    for (int k : {0, -3, ncell + 1}) {
        EXPECT_SENTENCE(
                assigner.assign(post(x), nullptr, k, cells.data(), nullptr),
                "k = " + std::to_string(k));
    }
    EXPECT_SENTENCE(QuantizerAssigner(nullptr, NEEDS_POST_ROPE), "is null");
    EXPECT_SENTENCE(
            QuantizerAssigner(
                    std::make_shared<faiss::IndexFlatL2>(d), NEEDS_POST_ROPE),
            "ncell = 0");
    EXPECT_SENTENCE(
            QuantizerAssigner(flat(random, {faiss::METRIC_L2, false}), NEEDS_STATS),
            "space = 8");
    EXPECT_SENTENCE(
            QuantizerAssigner(flat(random, {faiss::METRIC_L1, false}), NEEDS_PRE_ROPE),
            "metric_type = 2");
}

TEST(CellMeanAssigner, ScoresMeansAndSkipsEmptyCells) {
    tests::Random random;
    const CellMeanAssigner assigner(d, ncell);
    const auto means = random.normal(ncell * d);
    std::vector<int32_t> count(ncell, 2);
    count[3] = 0;
    CellStats stats;
    stats.count = count.data();
    stats.mean_post_rope = means.data();
    const auto x = random.normal(d);
    std::vector<float> scores(ncell);
    assigner.scores(post(x), &stats, scores.data());
    EXPECT_EQ(scores[3], -INFINITY);
    float dot = 0;
    for (int j = 0; j < d; j++) {
        dot += x[j] * means[4 * d + j];
    }
    EXPECT_NEAR(scores[4], dot, 1e-4);
    std::vector<int32_t> cells(ncell);
    assigner.assign(post(x), &stats, ncell, cells.data(), nullptr);
    EXPECT_EQ(cells.back(), -1);
    EXPECT_EQ(std::count(cells.begin(), cells.end(), 3), 0);

    EXPECT_SENTENCE(
            assigner.scores(post(x), nullptr, scores.data()), "stats is null");
    RoutingInput negative = post(x);
    negative.n = -1;
    EXPECT_SENTENCE(
            assigner.assign(negative, &stats, 1, cells.data(), nullptr),
            "input.n = -1");
    stats.mean_post_rope = nullptr;
    EXPECT_SENTENCE(
            assigner.scores(post(x), &stats, scores.data()), "mean_post_rope");
}

TEST(SegmentedAssigner, PutsKeysIntoCellsOfTheirSegment) {
    tests::Random random;
    const int n = 5, nsegment = 4;
    auto flat = std::make_shared<faiss::IndexFlatL2>(d);
    flat->add(n, random.normal(n * d).data());
    const auto inner = std::make_shared<QuantizerAssigner>(flat, NEEDS_POST_ROPE);
    const SegmentedAssigner assigner(inner, 100, nsegment);
    EXPECT_EQ(assigner.ncell, n * nsegment);
    EXPECT_EQ(assigner.needs, unsigned(NEEDS_POST_ROPE | NEEDS_POSITION));
    const int64_t count = 9;
    const auto x = random.normal(count * d);
    // The last ones begin anew with the first segment's cells.
    const std::vector<int64_t> position = {
            0, 99, 100, 250, 399, 400, 499, 500, int64_t(1) << 40};
    RoutingInput input = post(x);
    input.n = count;
    input.position = position.data();
    std::vector<int32_t> own(count), best(count), all(count * n * nsegment);
    std::vector<float> of_inner(count * n), scores(all.size()), ranked(all.size());
    inner->assign(input, nullptr, 1, own.data(), nullptr);
    inner->scores(input, nullptr, of_inner.data());
    assigner.assign(input, nullptr, 1, best.data(), nullptr);
    assigner.scores(input, nullptr, scores.data());
    assigner.assign(input, nullptr, n * nsegment, all.data(), ranked.data());
    for (int64_t i = 0; i < count; i++) {
        const auto segment = static_cast<int>(position[i] / 100 % nsegment);
        EXPECT_EQ(best[i], segment * n + own[i]);
        EXPECT_EQ(all[i * n * nsegment], best[i]);
        for (int c = 0; c < n * nsegment; c++) {
            EXPECT_EQ(
                    scores[i * n * nsegment + c],
                    c / n == segment ? of_inner[i * n + c % n] : -INFINITY);
            const int32_t cell = all[i * n * nsegment + c];
            EXPECT_EQ(cell < 0, c >= n);
            EXPECT_EQ(ranked[i * n * nsegment + c] == -INFINITY, c >= n);
        }
    }
    input.position = nullptr;
    EXPECT_SENTENCE(
            assigner.scores(input, nullptr, scores.data()), "position");
    const std::vector<int64_t> negative(count, -1);
    input.position = negative.data();
    EXPECT_SENTENCE(
            assigner.scores(input, nullptr, scores.data()), "input.position has -1");
    EXPECT_SENTENCE(
            assigner.assign(input, nullptr, 1, best.data(), nullptr),
            "input.position has -1");
    EXPECT_SENTENCE(SegmentedAssigner(nullptr, 1, 1), "inner is null");
    EXPECT_SENTENCE(SegmentedAssigner(inner, 0, 1), "length = 0");
    EXPECT_SENTENCE(SegmentedAssigner(inner, 1, 0), "nsegment = 0");
    EXPECT_SENTENCE(SegmentedAssigner(inner, 1, 13108), "nsegment = 13108 of 5");
    EXPECT_SENTENCE(
            SegmentedAssigner(std::make_shared<CellMeanAssigner>(d, 3), 1, 1),
            "statistics");
    EXPECT_SENTENCE(
            SegmentedAssigner(std::make_shared<SegmentedAssigner>(inner, 9, 2), 1, 1),
            "segmented itself");
}

TEST(CellAssigner, NoVectorsNeedNothing) {
    auto flat = std::make_shared<faiss::IndexFlatL2>(d);
    flat->add(3, std::vector<float>(3 * d, 1.0f).data());
    const auto inner = std::make_shared<QuantizerAssigner>(flat, NEEDS_POST_ROPE);
    const CellMeanAssigner means(d, 3);
    const SegmentedAssigner segments(inner, 9, 2);
    for (const CellAssigner* a :
         std::initializer_list<const CellAssigner*>{inner.get(), &means, &segments}) {
        RoutingInput none;
        none.d = d;
        std::vector<float> scores = {7};
        a->scores(none, nullptr, scores.data());
        a->assign(none, nullptr, 1, nullptr, nullptr);
        EXPECT_EQ(scores[0], 7);
    }
}

} // namespace
} // namespace faiss_saap
