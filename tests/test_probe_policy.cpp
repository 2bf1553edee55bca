#include <faiss_saap/ProbePolicy.h>

#include <algorithm>
#include <numeric>

#include "common.h"

namespace faiss_saap {
namespace {

using Cells = std::vector<int32_t>;

TEST(TakeCells, DescendingScoreWhileTheyFit) {
    const std::vector<float> scores = {1, 5, 3, 4, 2};
    const std::vector<int64_t> counts = {10, 10, 10, 10, 10};
    const auto take = [&](int nprobe, int64_t limit, bool one) {
        return take_cells(5, scores.data(), counts.data(), nprobe, limit, one);
    };
    EXPECT_EQ(take(5, 1000, true), (Cells{1, 3, 2, 4, 0}));
    EXPECT_EQ(take(2, 1000, true), (Cells{1, 3}));
    EXPECT_EQ(take(5, 30, true), (Cells{1, 3, 2}));
    EXPECT_EQ(take(5, 29, true), (Cells{1, 3}));
    EXPECT_EQ(take(5, 0, true), (Cells{1}));
    EXPECT_EQ(take(5, 0, false), (Cells{}));
}

TEST(TakeCells, ALaterCellFillsTheBudget) {
    const std::vector<float> scores = {3, 2, 1};
    const std::vector<int64_t> counts = {10, 50, 5};
    EXPECT_EQ(
            take_cells(3, scores.data(), counts.data(), 3, 15, true),
            (Cells{0, 2}));
}

TEST(TakeCells, EmptyAndForbiddenCellsAreNeverTaken) {
    const std::vector<float> scores = {9, -INFINITY, NAN, 1};
    const std::vector<int64_t> counts = {0, 5, 5, 5};
    EXPECT_EQ(
            take_cells(4, scores.data(), counts.data(), 4, 100, true),
            (Cells{3}));
}

TEST(TakeCells, AsOneCellAfterTheOther) {
    tests::Random random;
    for (int round = 0; round < 100; round++) {
        const int ncell = 1 + int(random.below(500));
        std::vector<float> scores(ncell);
        std::vector<int64_t> counts(ncell);
        Cells order(ncell);
        for (int c = 0; c < ncell; c++) {
            // Ties, on both sides of zero; -0 and 0 are one.
            scores[c] = (float(random.below(21)) - 10) * (c % 2 ? -0.1f : 0.1f);
            counts[c] = 1 + random.below(30);
            order[c] = c;
        }
        if (round % 4) { // farther apart than a float can say
            const float far = round % 4 == 1 ? 3e38f : INFINITY;
            scores[random.below(ncell)] = far;
            scores[random.below(ncell)] = round % 4 == 3 ? far : -3e38f;
        }
        std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
            return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
        });
        const int nprobe = 1 + int(random.below(ncell));
        const int64_t limit = random.below(15 * ncell);
        Cells expected;
        int64_t keys = 0;
        for (int32_t c : order) {
            if (static_cast<int>(expected.size()) < nprobe &&
                (expected.empty() || keys + counts[c] <= limit)) {
                expected.push_back(c);
                keys += counts[c];
            }
        }
        EXPECT_EQ(
                take_cells(
                        ncell, scores.data(), counts.data(), nprobe, limit, true),
                expected);
    }
}

TEST(TakeCells, NeverExceedsTheBudget) {
    tests::Random random;
    for (int round = 0; round < 200; round++) {
        const int ncell = 1 + int(random.below(40));
        const auto scores = random.normal(ncell);
        std::vector<int64_t> counts(ncell);
        for (auto& c : counts) {
            c = random.below(30);
        }
        const int64_t limit = random.below(300);
        const auto cells = take_cells(
                ncell, scores.data(), counts.data(), ncell, limit, false);
        int64_t keys = 0;
        for (int32_t c : cells) {
            keys += counts[c];
            EXPECT_GT(counts[c], 0);
        }
        EXPECT_LE(keys, limit);
        EXPECT_TRUE(std::is_sorted(
                cells.begin(), cells.end(), [&](int32_t a, int32_t b) {
                    return scores[a] > scores[b];
                }));
        // Whatever was left out does not fit any more.
        for (int c = 0; c < ncell; c++) {
            if (counts[c] > 0 &&
                std::find(cells.begin(), cells.end(), c) == cells.end()) {
                EXPECT_GT(keys + counts[c], limit);
            }
        }
    }
}

TEST(ShareScores, SumsTheMassPerKey) {
    tests::Random random;
    const int nhead = 4, ncell = 9;
    const float scale = 0.3f;
    const auto scores = random.normal(nhead * ncell, 5);
    std::vector<int64_t> counts(ncell);
    std::iota(counts.begin(), counts.end(), 0); // cell 0 is empty
    std::vector<float> shared(ncell);
    share_scores(
            nhead, ncell, scores.data(), counts.data(), scale, shared.data());
    EXPECT_EQ(shared[0], -INFINITY);
    for (int c = 1; c < ncell; c++) {
        double sum = 0;
        for (int h = 0; h < nhead; h++) {
            double total = 0;
            for (int o = 0; o < ncell; o++) {
                total += counts[o] * std::exp(scale * scores[h * ncell + o]);
            }
            sum += std::exp(scale * scores[h * ncell + c]) / total;
        }
        EXPECT_NEAR(shared[c], std::log(sum), 1e-5);
    }
}

TEST(ShareScores, TinyMassesKeepTheirOrder) {
    const std::vector<float> scores = {0, -5000, -9000};
    const std::vector<int64_t> counts = {1, 1, 1};
    std::vector<float> shared(3);
    share_scores(1, 3, scores.data(), counts.data(), 1, shared.data());
    EXPECT_GT(shared[0], shared[1]);
    EXPECT_GT(shared[1], shared[2]);
    EXPECT_GT(shared[2], -INFINITY);
}

TEST(ShareScores, AHeadThatWantsNothing) {
    const std::vector<float> scores = {
            -INFINITY, -INFINITY, 1, 2}; // two heads, two cells
    const std::vector<int64_t> counts = {3, 3};
    std::vector<float> shared(2);
    share_scores(2, 2, scores.data(), counts.data(), 1, shared.data());
    EXPECT_GT(shared[1], shared[0]);
    EXPECT_TRUE(std::isfinite(shared[0]));
}

TEST(ProbePolicy, ChecksItsFields) {
    ProbePolicy p;
    p.check();
    p.nprobe = 0;
    EXPECT_SENTENCE(p.check(), "nprobe = 0");
    p = {};
    p.max_keys = -1;
    EXPECT_SENTENCE(p.check(), "max_keys = -1");
    for (double s : {-0.1, 1.1, double(NAN)}) {
        p = {};
        p.max_selectivity = s;
        EXPECT_SENTENCE(p.check(), "max_selectivity");
    }
    p = {};
    EXPECT_SENTENCE(p.share(2, 2), "partition = 2, there are 2");
    EXPECT_SENTENCE(p.share(0, -1, 2), "partition = -1");
    p.head_split = {{.5, .5}};
    EXPECT_SENTENCE(p.share(0, 2, 2), "partition = 2, there are 2");
    EXPECT_SENTENCE(p.share(-1, 0, 2), "KV head -1");
    EXPECT_SENTENCE(p.share(1, 0, 2), "KV head 1");
    EXPECT_EQ(p.share(0, 1, 2), .5);
    p = {};
    p.max_keys = 70;
    p.max_selectivity = 0.05;
    EXPECT_EQ(p.key_limit(1000), 50);
    EXPECT_EQ(p.key_limit(10000), 70);
    p.max_keys = INT64_MAX;
    for (int percent = 1; percent < 100; percent++) {
        p.max_selectivity = percent / 100.0; // times 100 often a last bit too little
        EXPECT_EQ(p.key_limit(100), percent);
        EXPECT_EQ(p.key_limit(700000), 7000 * percent);
        EXPECT_EQ(p.key_limit(2000000000), 20000000LL * percent);
        EXPECT_EQ(p.key_limit(99), percent - 1);
    }
    p.max_selectivity = 0.05;
    p.refine = 3;
    EXPECT_EQ(p.candidate_limit(1000), 150);
    p.refine = 1e300;
    EXPECT_EQ(p.candidate_limit(1000), INT64_MAX);
    p = {};
    EXPECT_EQ(p.candidate_limit(1000), INT64_MAX); // nothing to share out
}

} // namespace
} // namespace faiss_saap
