#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/Partition.h>
#include <faiss_saap/QuantizerAssigner.h>

#include <algorithm>

#include <faiss/IndexFlat.h>

#include "common.h"

namespace faiss_saap {
namespace {

/// Vectors around well separated centres: vector i belongs to centre i % k.
std::vector<float> blobs(tests::Random& random, int n, int d, int k) {
    std::vector<float> x = random.normal(size_t(n) * d, 0.01f);
    for (int i = 0; i < n; i++) {
        x[i * d + i % k % d] += i % k < d ? 1.0f : -1.0f;
    }
    return x;
}

std::vector<int32_t> cells_of(
        const Partition& p,
        RoutingNeeds space,
        const std::vector<float>& x) {
    RoutingInput input;
    input.d = p.d();
    input.n = static_cast<int64_t>(x.size()) / p.d();
    (space == NEEDS_PRE_ROPE ? input.pre_rope : input.post_rope) = x.data();
    std::vector<int32_t> cells(input.n);
    p.key->assign(input, nullptr, 1, cells.data(), nullptr);
    return cells;
}

TEST(KMeansPartition, CellsDoNotMixPlantedBlobs) {
    tests::Random random;
    const int n = 600, d = 8, blob_count = 6, ncell = 30;
    const auto x = blobs(random, n, d, blob_count);
    for (bool spherical : {false, true}) {
        KMeansParams params;
        params.spherical = spherical;
        const Partition p =
                kmeans_partition(n, d, x.data(), ncell, NEEDS_PRE_ROPE, params);
        EXPECT_EQ(p.ncell(), ncell);
        EXPECT_EQ(p.d(), d);
        p.check();
        const auto cells = cells_of(p, NEEDS_PRE_ROPE, x);
        std::vector<int> blob_of_cell(ncell, -1);
        for (int i = 0; i < n; i++) {
            int& blob = blob_of_cell[cells[i]];
            EXPECT_TRUE(blob == -1 || blob == i % blob_count);
            blob = i % blob_count;
        }
    }
}

TEST(KMeansPartition, QueriesAreScoredByTheMeansOfTheCells) {
    tests::Random random;
    const int n = 300, d = 5, k = 9;
    const auto x = random.normal(n * d);
    const Partition p = kmeans_partition(n, d, x.data(), k, NEEDS_POST_ROPE);
    const auto cells = cells_of(p, NEEDS_POST_ROPE, x);
    std::vector<double> sum(k * d);
    std::vector<int> count(k);
    for (int i = 0; i < n; i++) {
        count[cells[i]]++;
        for (int j = 0; j < d; j++) {
            sum[cells[i] * d + j] += x[i * d + j];
        }
    }
    const auto& query = dynamic_cast<const QuantizerAssigner&>(*p.query);
    EXPECT_EQ(query.quantizer->metric_type, faiss::METRIC_INNER_PRODUCT);
    std::vector<float> mean(d);
    for (int c = 0; c < k; c++) {
        query.quantizer->reconstruct(c, mean.data());
        for (int j = 0; count[c] && j < d; j++) {
            EXPECT_NEAR(mean[j], sum[c * d + j] / count[c], 1e-5);
        }
    }
}

TEST(KMeansPartition, SameSeedSameCells) {
    tests::Random random;
    const auto x = random.normal(400 * 4);
    const Partition a = kmeans_partition(400, 4, x.data(), 16, NEEDS_POST_ROPE);
    const Partition b = kmeans_partition(400, 4, x.data(), 16, NEEDS_POST_ROPE);
    EXPECT_EQ(
            cells_of(a, NEEDS_POST_ROPE, x), cells_of(b, NEEDS_POST_ROPE, x));
}

TEST(KMeansPartition, AllVectorsEqual) {
    const std::vector<float> x(50 * 4, 0.5f);
    const Partition p = kmeans_partition(50, 4, x.data(), 8, NEEDS_POST_ROPE);
    for (int32_t c : cells_of(p, NEEDS_POST_ROPE, x)) {
        EXPECT_GE(c, 0);
        EXPECT_LT(c, 8);
    }
}

TEST(KMeansPartition, SphericalWithAsManyCellsAsKeys) {
    tests::Random random;
    const int n = 32;
    std::vector<float> x = random.normal(n * 16);
    for (int i = 0; i < n; i++) { // lengths from 1 to 100
        for (int j = 0; j < 16; j++) {
            x[i * 16 + j] *= 1 + 3 * i;
        }
    }
    KMeansParams params;
    params.spherical = true;
    const Partition p =
            kmeans_partition(n, 16, x.data(), n, NEEDS_POST_ROPE, params);
    std::vector<int32_t> cells = cells_of(p, NEEDS_POST_ROPE, x);
    std::sort(cells.begin(), cells.end());
    for (int i = 0; i < n; i++) {
        EXPECT_EQ(cells[i], i); // each key alone
    }
}

TEST(KMeansPartition, WrongInput) {
    std::vector<float> x(20 * 4, 1.0f);
    const auto cluster = [&](int n, int d, const float* data, int ncell) {
        kmeans_partition(n, d, data, ncell, NEEDS_POST_ROPE);
    };
    EXPECT_SENTENCE(cluster(20, 4, x.data(), 21), "n = 20");
    EXPECT_SENTENCE(cluster(20, 0, x.data(), 4), "d = 0");
    EXPECT_SENTENCE(cluster(20, 4, x.data(), 0), "ncell = 0");
    EXPECT_SENTENCE(cluster(-1, 4, x.data(), 4), "n = -1");
    EXPECT_SENTENCE(cluster(20, 4, nullptr, 4), "x is null");
    x[33] = NAN;
    EXPECT_SENTENCE(cluster(20, 4, x.data(), 4), "x[33] (vector 8, component 1)");
    x[33] = 3e38f;
    EXPECT_SENTENCE(cluster(20, 4, x.data(), 4), "norm of vector 8");
    x[33] = 1;
    KMeansParams params;
    params.niter = 0;
    EXPECT_SENTENCE(
            kmeans_partition(20, 4, x.data(), 4, NEEDS_POST_ROPE, params),
            "niter = 0");
}

TEST(CellMeans, EmptyCellsKeepTheirValue) {
    const std::vector<float> x = {1, 3, 5};
    const std::vector<int32_t> cells = {0, 0, -1};
    std::vector<float> means = {9, 9};
    cell_means(3, 1, x.data(), cells.data(), 2, means.data());
    EXPECT_EQ(means, (std::vector<float>{2, 9}));
    const std::vector<int32_t> wrong = {0, 2, 0};
    EXPECT_SENTENCE(
            cell_means(3, 1, x.data(), wrong.data(), 2, means.data()),
            "cells[1] = 2");
    EXPECT_SENTENCE(cell_means(3, 1, x.data(), cells.data(), -1, means.data()), "ncell = -1");
    EXPECT_SENTENCE(cell_means(3, 0, x.data(), cells.data(), 2, means.data()), "d = 0");
}

TEST(Partition, ChecksThatItsAssignersFit) {
    tests::Random random;
    const auto x = random.normal(64 * 4);
    const Partition p = kmeans_partition(64, 4, x.data(), 8, NEEDS_POST_ROPE);
    EXPECT_SENTENCE(Partition().check(), "no key assigner");
    Partition q = p;
    q.query = nullptr;
    EXPECT_SENTENCE(q.check(), "no query assigner");
    q.query = std::make_shared<CellMeanAssigner>(4, 9);
    EXPECT_SENTENCE(q.check(), "query->ncell = 9");
    q.query = std::make_shared<CellMeanAssigner>(5, 8);
    EXPECT_SENTENCE(q.check(), "query->d = 5");
    q.query = std::make_shared<CellMeanAssigner>(4, 8);
    q.check();
    q.key = q.query;
    EXPECT_SENTENCE(q.check(), "statistics");
    struct ByNewestKeys : CellAssigner {
        ByNewestKeys() : CellAssigner(4, 8, RoutingNeeds(NEEDS_POST_ROPE | NEEDS_NEWEST_KEYS)) {}
        void scores(const RoutingInput&, const CellStats*, float*) const override {}
        size_t bytes_read() const override {
            return 0;
        }
    };
    q.key = std::make_shared<ByNewestKeys>();
    EXPECT_SENTENCE(q.check(), "statistics");
    EXPECT_EQ(symmetric(p).query, p.key);
}

} // namespace
} // namespace faiss_saap
