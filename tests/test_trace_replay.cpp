#include "common/TraceReplay.h"

#include "common.h"

using namespace faiss_saap::benchs;
using namespace faiss_saap::tests;

namespace {

constexpr int d = 4;

/// Tokens whose components hang together, each with the token before.
std::vector<float> recorded(Random& random, int64_t tokens) {
    std::vector<float> x = random.normal(tokens * d);
    for (int64_t t = 0; t < tokens; t++) {
        for (int c = 1; c < d; c++) {
            x[t * d + c] = .6f * x[t * d + c - 1] + .8f * x[t * d + c];
        }
        for (int c = 0; t > 0 && c < d; c++) {
            x[t * d + c] = .8f * x[(t - 1) * d + c] + .6f * x[t * d + c];
        }
    }
    for (float& f : x) {
        f += 3;
    }
    return x;
}

/// Mean product of components a and b, less their means, of tokens `lag` apart.
double covariance(const std::vector<float>& x, int a, int b, int64_t lag) {
    const auto n = static_cast<int64_t>(x.size()) / d;
    double mean_a = 0, mean_b = 0, sum = 0;
    for (int64_t t = 0; t < n; t++) {
        mean_a += x[t * d + a] / double(n);
        mean_b += x[t * d + b] / double(n);
    }
    for (int64_t t = lag; t < n; t++) {
        sum += (x[t * d + a] - mean_a) * (x[(t - lag) * d + b] - mean_b);
    }
    return sum / double(n - lag);
}

} // namespace

TEST(TraceReplay, WalksStayWithinTexts) {
    const std::vector<int64_t> lengths = {100, 17, 300};
    const ReplayPath path(lengths, 20000, 8, 3);
    for (int64_t t = 0; t < ReplayPath::kSink; t++) {
        EXPECT_EQ(path.rows[t][0], t);
        EXPECT_EQ(path.rows[t][1], t);
    }
    for (int walk = 0; walk < 2; walk++) {
        int64_t jumps = 0, before = -2;
        std::vector<char> seen(417, 0);
        for (size_t t = ReplayPath::kSink; t < path.rows.size(); t++) {
            const int64_t at = path.rows[t][walk];
            ASSERT_LT(at, 417);
            // the first tokens of a text are not like its others
            ASSERT_TRUE((at >= 16 && at < 100) || at == 116 || at >= 133) << at;
            jumps += at != before + 1;
            seen[at] = 1;
            before = at;
        }
        EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 84 + 1 + 284);
        // runs of 8 tokens, some cut short by the end of a text
        EXPECT_NEAR(static_cast<double>(jumps) / 20000, 1 / 7., .02);
    }
    EXPECT_SENTENCE(ReplayPath({100, 16}, 50, 8, 3), "16 tokens");
}

TEST(TraceReplay, NothingNewIsVerbatim) {
    Random random;
    const auto x = recorded(random, 200);
    const ReplayPath path({200}, 500, 50, random.seed);
    const auto y = path.replay(d, x, 0);
    for (int64_t t = 0; t < 500; t++) {
        for (int c = 0; c < d; c++) {
            EXPECT_NEAR(y[t * d + c], x[path.rows[t][0] * d + c], 1e-5);
        }
    }
}

TEST(TraceReplay, MomentsStay) {
    Random random;
    const auto x = recorded(random, 20000);
    const ReplayPath path({20000}, 40000, 1000, random.seed);
    const auto y = path.replay(d, x, .3);
    for (int a = 0; a < d; a++) {
        EXPECT_NEAR(covariance(y, a, a, 0), covariance(x, a, a, 0), .15);
        EXPECT_NEAR(covariance(y, a, 0, 0), covariance(x, a, 0, 0), .15);
        EXPECT_NEAR(covariance(y, a, 0, 1), covariance(x, a, 0, 1), .15);
        EXPECT_NEAR(covariance(y, a, 0, 5), covariance(x, a, 0, 5), .15);
    }
    double mean_x = 0, mean_y = 0;
    for (float f : x) {
        mean_x += f / double(x.size());
    }
    for (float f : y) {
        mean_y += f / double(y.size());
    }
    EXPECT_NEAR(mean_y, mean_x, .2);
    // and no token is there twice, although places are visited twice
    int64_t repeated = 0;
    for (int64_t t = 17; t < 20000; t++) {
        repeated += y[t * d] == y[(t + 16000) * d];
    }
    EXPECT_LT(repeated, 20);
}

TEST(TraceReplay, NoveltyIsMeasured) {
    Random random;
    constexpr int wide = 64;
    const int64_t half = 512;
    const auto known = random.normal(half * wide);
    const auto noise = random.normal(half * wide);
    for (float b : {0.f, .2f, .4f, 1.f}) {
        // The second half repeats the first, but for a share.
        std::vector<float> x = known;
        for (int64_t i = 0; i < half * wide; i++) {
            x.push_back(
                    std::sqrt(1 - b) * known[i] + std::sqrt(b) * noise[i]);
        }
        // |(1 - sqrt(1 - b)) k - sqrt(b) e|^2 over twice the variance
        const double expected = 1 - std::sqrt(1 - b);
        EXPECT_NEAR(
                novelty(wide, x, {2 * half}), std::min(expected, .5), .02)
                << b;
    }
}
