#include <faiss_saap/merge_states.h>

#include <vector>

#include "common.h"
#include "index/vector_kernels.h"

namespace faiss_saap {
namespace {

TEST(MergeStates, EmptySetIsTheIdentity) {
    const MergeWeights both = merge_weights(-INFINITY, -INFINITY);
    EXPECT_EQ(both.a, 0);
    EXPECT_EQ(both.b, 0);
    EXPECT_EQ(both.lse, -INFINITY);
    const MergeWeights left = merge_weights(3.5f, -INFINITY);
    EXPECT_EQ(left.a, 1);
    EXPECT_EQ(left.b, 0);
    EXPECT_EQ(left.lse, 3.5f);
    const MergeWeights right = merge_weights(-INFINITY, -7.0f);
    EXPECT_EQ(right.b, 1);
    EXPECT_EQ(right.lse, -7.0f);
}

TEST(MergeStates, ExtremeLogits) {
    for (float a : {-1e30f, -1e4f, 0.0f, 1e4f, 1e30f}) {
        for (float b : {-1e30f, -1e4f, 0.0f, 1e4f, 1e30f}) {
            const MergeWeights w = merge_weights(a, b);
            EXPECT_NEAR(w.a + w.b, 1, 1e-6) << a << " " << b;
            EXPECT_GE(w.lse, std::max(a, b));
            EXPECT_TRUE(std::isfinite(w.lse));
        }
    }
}

TEST(MergeStates, SplitsMergeToTheWhole) {
    tests::Random random;
    const int n = 40, d_v = 3;
    const auto scores = random.normal(n, 4);
    const auto values = random.normal(n * d_v);
    const auto attend = [&](int begin, int end, float* o, float* lse) {
        double sum = 0;
        std::vector<double> out(d_v);
        for (int i = begin; i < end; i++) {
            const double w = std::exp(double(scores[i]));
            sum += w;
            for (int j = 0; j < d_v; j++) {
                out[j] += w * values[i * d_v + j];
            }
        }
        for (int j = 0; j < d_v; j++) {
            o[j] = sum > 0 ? float(out[j] / sum) : 0.0f;
        }
        *lse = sum > 0 ? float(std::log(sum)) : -INFINITY;
    };
    float whole[d_v], whole_lse;
    attend(0, n, whole, &whole_lse);
    for (int split = 0; split <= n; split++) {
        float a[d_v], b[d_v], lse_a, lse_b;
        attend(0, split, a, &lse_a);
        attend(split, n, b, &lse_b);
        merge_states(1, d_v, a, &lse_a, b, &lse_b);
        EXPECT_NEAR(lse_a, whole_lse, 1e-5);
        for (int j = 0; j < d_v; j++) {
            EXPECT_NEAR(a[j], whole[j], 1e-5) << "split " << split;
        }
    }
}

TEST(MergeStates, NaNIsNotLost) {
    EXPECT_TRUE(std::isnan(merge_weights(NAN, -INFINITY).lse));
    EXPECT_TRUE(std::isnan(merge_weights(-INFINITY, NAN).lse));
    EXPECT_TRUE(std::isnan(merge_weights(NAN, 1).lse));
    EXPECT_TRUE(std::isnan(merge_weights(1, NAN).lse));
}

/// All parts of a query at once are what they are one after the other.
TEST(MergeParts, EqualsMergesInTurn) {
    tests::Random random;
    for (int d_v : {1, 3, 64, 80, 128, 131}) {
        for (int64_t n : {0, 1, 2, 7, 40}) {
            for (float spread : {1.0f, 50.0f}) {
                const int64_t stride = 3; // others' results lie between
                std::vector<float> part = random.normal(n * stride * d_v);
                std::vector<float> lse = random.normal(n * stride, spread);
                for (int64_t i = 0; i < n; i += 3) { // an empty one
                    lse[i * stride] = -INFINITY;
                    std::fill_n(part.begin() + i * stride * d_v, d_v, 0.0f);
                }
                for (bool merge : {false, true}) {
                    std::vector<float> got(d_v, NAN); // without an LSE it does not count
                    float start = -INFINITY;
                    if (merge) {
                        got = random.normal(d_v);
                        start = random.normal(1, spread)[0];
                    }
                    double sum = std::exp(double(start));
                    std::vector<double> expected(d_v);
                    for (int j = 0; merge && j < d_v; j++) {
                        expected[j] = sum * got[j];
                    }
                    for (int64_t i = 0; i < n; i++) {
                        const double w = std::exp(double(lse[i * stride]));
                        sum += w;
                        for (int j = 0; j < d_v; j++) {
                            expected[j] += w * part[i * stride * d_v + j];
                        }
                    }
                    const float all = merge_parts(
                            n, stride, d_v, part.data(), lse.data(), got.data(), start);
                    if (sum == 0) {
                        EXPECT_EQ(all, -INFINITY);
                        EXPECT_EQ(got, std::vector<float>(d_v, 0.0f));
                        continue;
                    }
                    EXPECT_NEAR(all, std::log(sum), 1e-5 * spread);
                    for (int j = 0; j < d_v; j++) {
                        EXPECT_NEAR(got[j], expected[j] / sum, 2e-5 * spread);
                    }
                }
            }
        }
    }
}

TEST(MergeParts, WhatIsNotANumberIsSeen) {
    const float part[2] = {1, 2};
    for (float start : {-INFINITY, 0.0f}) {
        for (float other : {-INFINITY, 3.0f}) {
            for (int first : {0, 1}) {
                float lse[2] = {other, other};
                lse[first] = NAN;
                float output = 0;
                EXPECT_TRUE(std::isnan(merge_parts(2, 1, 1, part, lse, &output, start)));
                EXPECT_TRUE(std::isnan(output));
            }
        }
    }
}

} // namespace
} // namespace faiss_saap
