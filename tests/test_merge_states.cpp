#include <faiss_saap/merge_states.h>

#include <vector>

#include "common.h"

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

} // namespace
} // namespace faiss_saap
