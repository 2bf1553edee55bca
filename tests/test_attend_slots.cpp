#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "common.h"

namespace faiss_saap {
namespace {

/// One cache in one of the layouts, and the same numbers as doubles.
struct Cache {
    int heads, d, d_v;
    int64_t length;
    std::vector<char> k, v;
    std::vector<int32_t> pages;
    std::vector<float> keys, values; ///< (heads, length, d) as read back
    KvView view;
};

enum class Layout { token_major, head_major, paged };

Cache make_cache(
        tests::Random& random,
        DType dtype,
        Layout layout,
        int heads,
        int d,
        int d_v,
        int64_t length) {
    Cache c;
    c.heads = heads;
    c.d = d;
    c.d_v = d_v;
    c.length = length;
    constexpr int page_size = 16;
    const int64_t capacity = layout == Layout::paged
            ? (length / page_size + 3) * page_size
            : length + (layout == Layout::head_major ? 5 : 0);
    c.k.resize(capacity * heads * d * element_size(dtype));
    c.v.resize(capacity * heads * d_v * element_size(dtype));
    if (layout == Layout::token_major) {
        c.view = KvView::token_major(
                c.k.data(), c.v.data(), dtype, length, heads, d, d_v);
    } else if (layout == Layout::head_major) {
        c.view = KvView::head_major(
                c.k.data(), c.v.data(), dtype, length, capacity, heads, d, d_v);
    } else {
        c.pages.resize(capacity / page_size);
        std::iota(c.pages.begin(), c.pages.end(), 0);
        std::shuffle(c.pages.begin(), c.pages.end(), random.engine);
        c.view = KvView::paged(
                c.k.data(),
                c.v.data(),
                dtype,
                length,
                capacity / page_size,
                page_size,
                c.pages.data(),
                heads,
                d,
                d_v);
    }
    for (int h = 0; h < heads; h++) {
        for (int64_t s = 0; s < length; s++) {
            const auto fill = [&](const void* row, int width,
                                  std::vector<float>& copy) {
                const auto x = random.normal(width);
                from_float(dtype, x.data(), width, const_cast<void*>(row));
                std::vector<float> back(width);
                to_float(dtype, row, width, back.data());
                copy.insert(copy.end(), back.begin(), back.end());
            };
            fill(c.view.key(h, s), d, c.keys);
            fill(c.view.value(h, s), d_v, c.values);
        }
    }
    return c;
}

/// Attention in double precision.
void reference(
        const Cache& c,
        int head,
        const float* q,
        float scale,
        const std::vector<int32_t>& slots,
        std::vector<double>& out,
        double& lse) {
    out.assign(c.d_v, 0.0);
    std::vector<double> s;
    for (int32_t slot : slots) {
        double dot = 0;
        for (int j = 0; j < c.d; j++) {
            dot += double(q[j]) * c.keys[(head * c.length + slot) * c.d + j];
        }
        s.push_back(scale * dot);
    }
    const double maximum = s.empty() ? 0 : *std::max_element(s.begin(), s.end());
    double sum = 0;
    for (size_t i = 0; i < s.size(); i++) {
        const double w = std::exp(s[i] - maximum);
        sum += w;
        for (int j = 0; j < c.d_v; j++) {
            out[j] +=
                    w * c.values[(head * c.length + slots[i]) * c.d_v + j];
        }
    }
    for (double& o : out) {
        o /= sum > 0 ? sum : 1;
    }
    lse = sum > 0 ? maximum + std::log(sum) : -INFINITY;
}

double relative_error(const float* o, const std::vector<double>& expected) {
    double difference = 0, norm = 0;
    for (size_t j = 0; j < expected.size(); j++) {
        difference += (o[j] - expected[j]) * (o[j] - expected[j]);
        norm += expected[j] * expected[j];
    }
    return std::sqrt(difference / std::max(norm, 1e-300));
}

struct Inputs {
    DType dtype;
    Layout layout;
    int d, d_v, nq;
    float logit_scale; ///< large ones make softmax peaked
};

std::ostream& operator<<(std::ostream& os, const Inputs& in) {
    static const char* layouts[] = {"token_major", "head_major", "paged"};
    return os << name(in.dtype) << " " << layouts[int(in.layout)] << " d="
              << in.d << " d_v=" << in.d_v << " nq=" << in.nq << " scale="
              << in.logit_scale;
}

class AttendSlots : public ::testing::TestWithParam<Inputs> {};

/// A logit of some 100 is rounded by 6e-6, which a weight errs by, and sums err as much.
double tolerance_of(const Inputs& in) {
    return 1e-5 * std::max(1.0f, in.logit_scale / 10);
}

TEST_P(AttendSlots, EqualsDoublePrecision) {
    const Inputs in = GetParam();
    tests::Random random;
    const int heads = 2;
    const int64_t length = 333;
    const Cache c = make_cache(
            random, in.dtype, in.layout, heads, in.d, in.d_v, length);
    const float scale = in.logit_scale / std::sqrt(float(in.d));
    const auto q = random.normal(in.nq * in.d);
    for (int64_t n : {0, 1, 63, 64, 65, 95, 96, 97, 200}) {
        std::vector<int32_t> slots;
        for (int64_t i = 0; i < n; i++) {
            slots.push_back(int32_t(random.below(length)));
        }
        std::vector<float> out(in.nq * in.d_v, NAN), lse(in.nq, NAN);
        attend_slots(
                c.view,
                1,
                in.nq,
                q.data(),
                scale,
                n,
                slots.data(),
                out.data(),
                lse.data());
        for (int i = 0; i < in.nq; i++) {
            std::vector<double> expected;
            double expected_lse;
            reference(
                    c, 1, q.data() + i * in.d, scale, slots, expected,
                    expected_lse);
            if (n == 0) {
                EXPECT_EQ(lse[i], -INFINITY);
                EXPECT_EQ(out[i * in.d_v], 0);
                continue;
            }
            EXPECT_NEAR(lse[i], expected_lse, 1e-5 * (1 + std::abs(expected_lse)));
            EXPECT_LT(
                    relative_error(out.data() + i * in.d_v, expected), tolerance_of(in))
                    << "n = " << n;
        }
    }
    // A range is the same as its slots.
    std::vector<int32_t> slots(200);
    std::iota(slots.begin(), slots.end(), 17);
    std::vector<float> a(in.nq * in.d_v), b(in.nq * in.d_v), la(in.nq), lb(in.nq);
    attend_slots(
            c.view, 0, in.nq, q.data(), scale, 200, slots.data(), a.data(),
            la.data());
    attend_range(
            c.view, 0, in.nq, q.data(), scale, 17, 217, b.data(), lb.data());
    EXPECT_EQ(a, b);
    EXPECT_EQ(la, lb);
}

std::vector<Inputs> cases() {
    std::vector<Inputs> all;
    for (DType t : {DType::float32, DType::float16, DType::bfloat16}) {
        for (Layout l :
             {Layout::token_major, Layout::head_major, Layout::paged}) {
            all.push_back({t, l, 64, 64, 3, 1});
            all.push_back({t, l, 128, 96, 1, 30});
        }
        for (int d : {80, 96, 256, 5}) {
            all.push_back({t, Layout::token_major, d, d, 4, 1});
        }
    }
    return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, AttendSlots, ::testing::ValuesIn(cases()));

/// All heads at once, in stretches on several threads.
TEST_P(AttendSlots, DenseOverAllHeads) {
    const Inputs in = GetParam();
    tests::Random random;
    const int heads = 3;
    const int64_t length = 1200;
    const Cache c = make_cache(
            random, in.dtype, in.layout, heads, in.d, in.d_v, length);
    const float scale = in.logit_scale / std::sqrt(float(in.d));
    const int heads_q = heads * in.nq;
    const auto q = random.normal(heads_q * in.d);
    for (const auto& [begin, end] :
         {std::pair(0, 1200), std::pair(5, 70), std::pair(9, 9)}) {
        std::vector<float> out(heads_q * in.d_v, NAN), lse(heads_q, NAN);
        attend_dense(
                c.view, heads_q, q.data(), scale, begin, end, out.data(),
                lse.data());
        std::vector<int32_t> slots(end - begin);
        std::iota(slots.begin(), slots.end(), begin);
        for (int h = 0; h < heads_q; h++) {
            std::vector<double> expected;
            double expected_lse;
            reference(
                    c, h / in.nq, q.data() + h * in.d, scale, slots, expected,
                    expected_lse);
            if (slots.empty()) {
                EXPECT_EQ(lse[h], -INFINITY);
                continue;
            }
            EXPECT_NEAR(lse[h], expected_lse, 1e-5 * (1 + std::abs(expected_lse)));
            EXPECT_LT(relative_error(out.data() + h * in.d_v, expected), tolerance_of(in));
        }
    }
    if (in.layout == Layout::paged) {
        KvView view = c.view;
        view.npages = 1;
        std::vector<float> out(heads_q * in.d_v), lse(heads_q);
        EXPECT_SENTENCE(
                attend_dense(view, heads_q, q.data(), 1, 0, 1, out.data(), lse.data()),
                "there are 1 pages");
    }
    std::vector<float> out(in.d_v), lse(1);
    EXPECT_SENTENCE(
            attend_dense(c.view, 1, q.data(), 1, 0, 1, out.data(), lse.data()),
            "heads_q = 1");
    EXPECT_SENTENCE(
            attend_dense(c.view, 3, q.data(), 1, 0, 1201, out.data(), lse.data()),
            "1201");
}

/// Every type, layout, head dimension and group size, whatever kernels they
/// take.
TEST(AttendSlots, EveryCombination) {
    tests::Random random;
    const int heads = 2;
    const int64_t length = 77; // a whole tile and a part of one
    std::vector<int32_t> slots(length);
    std::iota(slots.begin(), slots.end(), 0);
    for (DType t : {DType::float32, DType::float16, DType::bfloat16}) {
        for (Layout l :
             {Layout::token_major, Layout::head_major, Layout::paged}) {
            for (int d : {64, 80, 96, 128, 256}) {
                const Cache c = make_cache(random, t, l, heads, d, d, length);
                const float scale = 1 / std::sqrt(float(d));
                for (int group : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
                    const auto q = random.normal(heads * group * d);
                    std::vector<float> out(q.size()), lse(heads * group);
                    attend_dense(
                            c.view, heads * group, q.data(), scale, 0, length,
                            out.data(), lse.data());
                    for (int h = 0; h < heads * group; h++) {
                        std::vector<double> expected;
                        double expected_lse;
                        reference(
                                c, h / group, q.data() + h * d, scale, slots,
                                expected, expected_lse);
                        const Inputs in = {t, l, d, d, group, 1};
                        EXPECT_LT(
                                relative_error(out.data() + h * d, expected),
                                1e-5)
                                << in << " query head " << h;
                        EXPECT_NEAR(lse[h], expected_lse, 1e-4)
                                << in << " query head " << h;
                    }
                }
            }
        }
    }
}

TEST(AttendSlots, LongSumsStayExact) {
    // 200,000 equal logits: a naive float sum would lose three digits.
    const int64_t n = 200000;
    std::vector<float> k(n, 0.0f), v(n);
    for (int64_t i = 0; i < n; i++) {
        v[i] = 1 + float(i % 2);
    }
    const KvView kv = KvView::token_major(
            k.data(), v.data(), DType::float32, n, 1, 1, 1);
    float out, lse;
    const float q = 1;
    attend_range(kv, 0, 1, &q, 1, 0, n, &out, &lse);
    EXPECT_NEAR(out, 1.5, 1.5e-5);
    EXPECT_NEAR(lse, std::log(double(n)), 1e-5);
}

TEST(AttendSlots, AMillionRowsStayExact) {
    tests::Random random;
    const int64_t n = 1000000;
    const int d = 8;
    const auto k = random.normal(n * d), q = random.normal(d);
    auto v = random.normal(n * d);
    for (float& x : v) {
        x = 1 + .1f * x; // one sign: the sums grow all the time
    }
    const float scale = 1 / std::sqrt(float(d));
    std::vector<double> expected(d);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double dot = 0;
        for (int j = 0; j < d; j++) {
            dot += double(q[j]) * k[i * d + j];
        }
        const double w = std::exp(scale * dot);
        sum += w;
        for (int j = 0; j < d; j++) {
            expected[j] += w * v[i * d + j];
        }
    }
    const KvView kv =
            KvView::token_major(k.data(), v.data(), DType::float32, n, 1, d, d);
    std::vector<float> out(d);
    float lse;
    attend_range(kv, 0, 1, q.data(), scale, 0, n, out.data(), &lse);
    EXPECT_NEAR(lse, std::log(sum), 3e-6);
    for (int j = 0; j < d; j++) {
        EXPECT_NEAR(out[j], expected[j] / sum, 1e-5) << "component " << j;
    }
}

TEST(AttendSlots, WrongInputLeavesOutputsUntouched) {
    tests::Random random;
    const Cache c = make_cache(
            random, DType::float32, Layout::token_major, 2, 4, 4, 10);
    const std::vector<float> q(4, 1.0f);
    std::vector<float> out(4, 7.0f), lse(1, 7.0f);
    const auto call = [&](int head, int nq, const float* queries, float scale,
                          std::vector<int32_t> slots) {
        attend_slots(
                c.view, head, nq, queries, scale, int64_t(slots.size()),
                slots.data(), out.data(), lse.data());
    };
    EXPECT_SENTENCE(call(2, 1, q.data(), 1, {0}), "kv_head = 2");
    EXPECT_SENTENCE(call(-1, 1, q.data(), 1, {0}), "kv_head = -1");
    EXPECT_SENTENCE(call(0, -1, q.data(), 1, {0}), "nq = -1");
    EXPECT_SENTENCE(call(0, 1, nullptr, 1, {0}), "queries is null");
    EXPECT_SENTENCE(call(0, 1, q.data(), NAN, {0}), "scale = nan");
    EXPECT_SENTENCE(call(0, 1, q.data(), 1, {0, 10}), "slots[1] = 10");
    EXPECT_SENTENCE(call(0, 1, q.data(), 1, {-1}), "slots[0] = -1");
    EXPECT_SENTENCE(
            attend_slots(
                    c.view, 0, 1, q.data(), 1, -2, nullptr, out.data(),
                    lse.data()),
            "n = -2");
    EXPECT_SENTENCE(
            attend_slots(
                    c.view, 0, 1, q.data(), 1, 1, nullptr, out.data(),
                    lse.data()),
            "slots is null");
    EXPECT_SENTENCE(
            attend_range(
                    c.view, 0, 1, q.data(), 1, 3, 11, out.data(), lse.data()),
            "outside the view");
    EXPECT_SENTENCE(
            attend_range(
                    c.view, 0, 1, q.data(), 1, 3, 2, out.data(), lse.data()),
            "outside the view");
    EXPECT_EQ(out, std::vector<float>(4, 7.0f));
    EXPECT_EQ(lse[0], 7.0f);
}

TEST(AttendSlots, NotFiniteValuesAreNeitherLostNorFound) {
    // An empty set is (0, -infinity); a broken one must not look like it.
    tests::Random random;
    std::vector<float> k = random.normal(200 * 8), v = random.normal(200 * 8);
    const KvView kv = KvView::token_major(
            k.data(), v.data(), DType::float32, 200, 1, 8, 8);
    std::vector<float> q = random.normal(2 * 8), out(16), lse(2);
    const auto attend = [&] {
        attend_range(kv, 0, 2, q.data(), 1, 0, 200, out.data(), lse.data());
    };
    for (float evil : {NAN, INFINITY, -INFINITY}) {
        for (int at : {0, 70 * 8 + 3, 199 * 8 + 7}) {
            const float before = std::exchange(k[at], evil);
            attend();
            EXPECT_TRUE(std::isnan(lse[0])) << evil << " at " << at;
            EXPECT_TRUE(std::isnan(out[5]));
            k[at] = before;
        }
        q[11] = evil;
        EXPECT_SENTENCE(attend(), "queries[11]");
        q[11] = 1;
    }
    attend();
    EXPECT_TRUE(std::isfinite(lse[0]) && std::isfinite(out[15]));
}

/// However many rows there are beside those that are read together.
TEST(AttendSlots, InfiniteValuesStayInfinite) {
    constexpr int d = 32;
    tests::Random random;
    std::vector<float> k = random.normal(200 * d), v = random.normal(200 * d);
    const KvView kv = KvView::token_major(
            k.data(), v.data(), DType::float32, 200, 1, d, d);
    const std::vector<float> q = random.normal(d);
    std::vector<int32_t> slots(200);
    std::iota(slots.begin(), slots.end(), 0);
    std::vector<float> out(d), lse(1);
    for (int n = 193; n <= 200; n++) {
        const float before = std::exchange(v[(n - 1) * d + 5], INFINITY);
        for (bool listed : {false, true}) {
            if (listed) {
                attend_slots(
                        kv, 0, 1, q.data(), .1f, n, slots.data(), out.data(), lse.data());
            } else {
                attend_range(kv, 0, 1, q.data(), .1f, 0, n, out.data(), lse.data());
            }
            EXPECT_EQ(out[5], INFINITY) << n;
            EXPECT_TRUE(std::isfinite(out[4]) && std::isfinite(lse[0])) << n;
        }
        v[(n - 1) * d + 5] = before;
    }
}

TEST(KvView, WrongInput) {
    std::vector<float> x(64);
    const auto paged = [&](int64_t length, int page_size,
                           std::vector<int32_t> table) {
        KvView::paged(
                x.data(), x.data(), DType::float32, length, 4, page_size,
                table.data(), 1, 4, 4).check();
    };
    paged(16, 4, {3, 1, 0, 2});
    EXPECT_SENTENCE(paged(16, 4, {3, 1, 4, 2}), "page_table[2] = 4");
    EXPECT_SENTENCE(paged(16, 4, {3, -1, 0, 2}), "page_table[1] = -1");
    EXPECT_SENTENCE(paged(16, 0, {0}), "page_size = 0");
    paged(0, 0, {0}); // no page is looked at
    paged(0, -1, {0});
    const auto plain = [&](const void* k, int64_t length, int heads, int d) {
        KvView::token_major(k, x.data(), DType::float32, length, heads, d, d);
    };
    EXPECT_SENTENCE(plain(nullptr, 1, 1, 4), "kv.k is null");
    EXPECT_SENTENCE(plain(x.data(), -1, 1, 4), "kv.length = -1");
    EXPECT_SENTENCE(plain(x.data(), int64_t(1) << 31, 1, 4), "kv.length");
    EXPECT_SENTENCE(plain(x.data(), 1, 0, 4), "kv.heads = 0");
    EXPECT_SENTENCE(plain(x.data(), 1, 1, 0), "kv.d = 0");
    EXPECT_SENTENCE(
            KvView::head_major(
                    x.data(), x.data(), DType::float32, 8, 4, 1, 2, 2),
            "exceeds capacity");
    // By hand.
    const KvView whole = KvView::token_major(x.data(), x.data(), DType::float32, 8, 1, 4, 4);
    KvView view = whole;
    view.v_token_stride = 0;
    EXPECT_SENTENCE(view.check(), "all tokens would be the same");
    view.page_size = 1; // without a table it says nothing
    EXPECT_SENTENCE(view.check(), "all tokens would be the same");
    view.length = 1;
    view.check();
    const int32_t pages[] = {0, 1};
    view = whole;
    view.page_table = pages;
    view.page_size = 4, view.npages = 2;
    EXPECT_SENTENCE(view.check(), "all pages would be the same");
    view.k_page_stride = view.v_page_stride = 16;
    view.check();
    view = whole;
    view.dtype = static_cast<DType>(7);
    EXPECT_SENTENCE(view.check(), "kv.dtype = 7");
}

TEST(AttendSlots, NoQueriesAndNoHeads) {
    std::vector<float> x(32), q(4), out = {7}, lse = {7};
    const KvView kv = KvView::token_major(x.data(), x.data(), DType::float32, 8, 1, 4, 4);
    const int32_t slot = 3;
    attend_slots(kv, 0, 0, nullptr, 1, 1, &slot, nullptr, nullptr);
    attend_range(kv, 0, 0, nullptr, 1, 0, 8, nullptr, nullptr);
    attend_dense(kv, 0, nullptr, 1, 0, 8, nullptr, nullptr);
    EXPECT_SENTENCE(
            attend_dense(KvView(), 4, q.data(), 1, 0, 0, out.data(), lse.data()),
            "kv.heads = 0");
}

TEST(DType, ConversionsRoundToNearestEven) {
    const std::vector<float> x = {
            0.0f, 1.0f, -2.5f, 65504.0f, 3.14159274f, INFINITY, -INFINITY};
    for (DType t : {DType::float32, DType::float16, DType::bfloat16}) {
        std::vector<char> bytes(x.size() * element_size(t));
        std::vector<float> back(x.size());
        from_float(t, x.data(), x.size(), bytes.data());
        to_float(t, bytes.data(), x.size(), back.data());
        for (size_t i = 0; i < x.size(); i++) {
            if (std::isinf(x[i])) {
                EXPECT_EQ(back[i], x[i]);
            } else {
                const double digits = t == DType::bfloat16 ? 1.0 / 256 : 1e-3;
                EXPECT_NEAR(back[i], x[i], digits * std::abs(x[i])) << name(t);
            }
        }
    }
    // Exactly between two bfloat16: to the even one.
    const float tie = 1 + 1.0f / 256, above = 1 + 3.0f / 256;
    uint16_t bits;
    from_float(DType::bfloat16, &tie, 1, &bits);
    EXPECT_EQ(bits, 0x3f80);
    from_float(DType::bfloat16, &above, 1, &bits);
    EXPECT_EQ(bits, 0x3f82);
    const float nan = NAN;
    float back;
    for (DType t : {DType::float16, DType::bfloat16}) {
        from_float(t, &nan, 1, &bits);
        to_float(t, &bits, 1, &back);
        EXPECT_TRUE(std::isnan(back)) << name(t);
    }
}

TEST(DType, Float16RoundsToNearestEvenEverywhere) {
    const auto value = [](int bits) {
        const int exponent = bits >> 10, fraction = bits & 0x3ff;
        return exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                        : std::ldexp(static_cast<float>(fraction), -24);
    };
    for (int low = 0; low < 0x7c00; low++) { // and the one above, in the end 2^16
        const float a = value(low), b = value(low + 1), middle = (a + b) / 2;
        for (int sign : {0, 0x8000}) {
            const float s = sign ? -1.0f : 1.0f;
            const float x[] = {
                    s * a,
                    s * std::nextafter(middle, a),
                    s * middle,
                    s * std::nextafter(middle, b)};
            const int expected[] = {low, low, low + low % 2, low + 1};
            uint16_t bits[4];
            from_float(DType::float16, x, 4, bits);
            float back;
            to_float(DType::float16, bits, 1, &back);
            ASSERT_EQ(back, x[0]);
            for (int i = 0; i < 4; i++) {
                ASSERT_EQ(bits[i], sign | expected[i]) << x[i];
            }
        }
    }
}

} // namespace
} // namespace faiss_saap
