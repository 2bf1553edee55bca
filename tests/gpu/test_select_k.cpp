#include <faiss_saap/ordered_float.h>

#include "select_k_cases.h"

namespace faiss_saap {
namespace {

TEST(OrderedFloat, OrdersAsFloatsDo) {
    const std::vector<float> ascending = {
            -INFINITY, -3e38f, -1, -1e-45f, 0, 1e-45f, 1, 1.0000001f, 3e38f, INFINITY};
    for (size_t i = 0; i < ascending.size(); i++) {
        EXPECT_EQ(from_ordered_bits(ordered_bits(ascending[i])), ascending[i]);
        for (size_t j = 0; j < ascending.size(); j++) {
            EXPECT_EQ(
                    ordered_bits(ascending[i]) < ordered_bits(ascending[j]),
                    ascending[i] < ascending[j]);
        }
    }
    EXPECT_EQ(ordered_bits(-0.0f), ordered_bits(0.0f));
    using Key = SelectionKey;
    for (bool largest : {false, true}) {
        EXPECT_LT(Key::make(2.0f, 5, largest), Key::make(2.0f, 6, largest));
        EXPECT_EQ(Key::make(2.0f, 9, largest) < Key::make(3.0f, 1, largest), !largest);
        EXPECT_EQ(Key::score(Key::make(-7.5f, ~0u, largest), largest), -7.5f);
        EXPECT_EQ(Key::id(Key::make(-7.5f, ~0u, largest)), ~0u);
        for (float f : ascending) {
            EXPECT_LT(Key::make(f, ~0u, largest), Key::kNone);
        }
    }
}

class GpuSelectK : public tests::DeviceTest,
                   public ::testing::WithParamInterface<tests::SelectCase> {};

TEST_P(GpuSelectK, EqualsTheHost) {
    const auto c = GetParam();
    tests::Random random;
    std::vector<float> scores = random.normal(size_t(c.rows) * (c.len + 3));
    for (float& s : scores) { // equal scores, and all that is no score
        const auto dice = random.below(40);
        s = dice == 0 ? NAN
                : dice == 1 ? -INFINITY
                : dice == 2 ? INFINITY
                : dice < 20 ? std::round(s * 4) / 4
                            : s;
    }
    tests::OnDevice<float> sd(scores), values(c.rows * c.k);
    tests::OnDevice<int32_t> ids(c.rows * c.k);
    gpu::SelectKParams p;
    p.rows = c.rows, p.len = c.len, p.k = c.k, p.largest = c.largest;
    p.scores = sd.data(), p.scores_row_stride = c.len + 3;
    p.ids = ids.data(), p.values = values.data();
    gpu::select_k(p, nullptr);
    const auto got = ids.host();
    const auto got_values = values.host();
    for (int r = 0; r < c.rows; r++) {
        const auto expected = tests::select_on_host(
                scores.data() + size_t(r) * (c.len + 3), c.len, c.k, c.largest);
        for (int j = 0; j < c.k; j++) {
            ASSERT_EQ(got[r * c.k + j], expected[j].second) << r << " " << j;
            ASSERT_EQ(got_values[r * c.k + j], expected[j].first) << r << " " << j;
        }
    }
}

TEST_P(GpuSelectK, MoreThanThereIs) {
    const auto c = GetParam();
    tests::OnDevice<float> scores(std::vector<float>(c.rows * 2, 1.5f));
    tests::OnDevice<int32_t> ids(c.rows * c.k);
    gpu::SelectKParams p;
    p.rows = c.rows, p.len = 2, p.k = c.k, p.largest = c.largest;
    p.scores = scores.data(), p.scores_row_stride = 2;
    p.ids = ids.data();
    gpu::select_k(p, nullptr);
    const auto got = ids.host();
    for (int i = 0; i < c.rows * c.k; i++) {
        ASSERT_EQ(got[i], i % c.k < 2 ? i % c.k : -1);
    }
}

TEST_P(GpuSelectK, WorstFirstIsTheHardestOrder) {
    const auto c = GetParam();
    std::vector<float> scores(c.len);
    for (int i = 0; i < c.len; i++) {
        scores[i] = c.largest ? float(i) : float(-i);
    }
    tests::OnDevice<float> sd(scores);
    tests::OnDevice<int32_t> ids(c.k);
    gpu::SelectKParams p;
    p.rows = 1, p.len = c.len, p.k = c.k, p.largest = c.largest;
    p.scores = sd.data(), p.scores_row_stride = c.len;
    p.ids = ids.data();
    gpu::select_k(p, nullptr);
    const auto got = ids.host();
    for (int j = 0; j < c.k; j++) {
        ASSERT_EQ(got[j], c.len - 1 - j);
    }
}

INSTANTIATE_TEST_SUITE_P(
        Cases,
        GpuSelectK,
        ::testing::ValuesIn(tests::select_cases()));

TEST(GpuSelectKErrors, SentencesWithoutADevice) {
    gpu::SelectKParams p;
    p.rows = 1, p.len = 1, p.k = 2049;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "k = 2049");
    p.k = 0;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "k = 0");
    p.k = 1;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "scores is null");
    float x = 0;
    p.scores = &x;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "ids is null");
    p.len = -1;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "len = -1");
    p.rows = int64_t(1) << 40;
    EXPECT_SENTENCE(gpu::select_k(p, nullptr), "rows = 1099511627776");
    p.rows = 0, p.len = 1;
    gpu::select_k(p, nullptr); // nothing to do
}

} // namespace
} // namespace faiss_saap
