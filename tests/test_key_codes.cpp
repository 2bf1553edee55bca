#include <faiss_saap/KeyCodes.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "adapter_world.h"

namespace faiss_saap {
namespace {

using tests::World;

constexpr int kFirst = 5; // first slot

KeyCodes coded(int d, const std::vector<float>& keys) {
    KeyCodes codes(d, kFirst);
    for (size_t i = 0; i < keys.size(); i += d) {
        codes.append(keys.data() + i);
    }
    return codes;
}

TEST(KeyCodes, AreAsNearAsFourBitsAllow) {
    tests::Random random;
    for (int d : {1, 7, 32, 33, 64, 80, 96, 128, 256}) {
        const int n = 50;
        auto keys = random.normal(size_t(n) * d);
        for (int i = 0; i < n; i++) {
            keys[i * d] += 30; // a channel of large components
            if (i == 3) {
                std::fill_n(keys.begin() + i * d, d, 0.0f);
            } else if (i == 4) {
                std::fill_n(keys.begin() + i * d, d, 1.5f);
            } else if (i == 5) {
                std::fill_n(keys.begin() + i * d, d, -1e18f / d);
            }
        }
        const KeyCodes codes = coded(d, keys);
        ASSERT_EQ(codes.size(), n);
        EXPECT_EQ(KeyCodes::code_size(d), 20u * ((d + 31) / 32));
        std::vector<float> key(d);
        for (int i = 0; i < n; i++) {
            codes.decode(kFirst + i, key.data());
            const float* x = keys.data() + i * d;
            for (int c = 0; c < d; c++) {
                const int begin = c / 32 * 32, end = std::min(begin + 32, d);
                const auto [low, high] = std::minmax_element(x + begin, x + end);
                // Half a step; base and step have eight bits.
                const float bound = (*high - *low) / 30 +
                        (std::abs(*low) + (*high - *low)) / 256;
                EXPECT_LE(std::abs(key[c] - x[c]), 1.001f * bound)
                        << "d " << d << " key " << i << " component " << c;
            }
        }
        codes.decode(kFirst + 3, key.data());
        EXPECT_EQ(key, std::vector<float>(d, 0.0f));
        codes.decode(kFirst + 4, key.data());
        EXPECT_EQ(key, std::vector<float>(d, 1.5f));
    }
}

/// The best by brute force over the decoded keys, in double precision.
std::vector<int32_t> best_in_double(
        const KeyCodes& codes,
        int d,
        int nq,
        const float* q,
        double scale,
        const std::vector<int32_t>& slots,
        size_t limit) {
    std::vector<double> mass(slots.size(), 0.0);
    for (int h = 0; h < nq; h++) {
        std::vector<double> s;
        for (int32_t slot : slots) {
            std::vector<float> key(d);
            codes.decode(slot, key.data());
            s.push_back(scale * std::inner_product(
                    key.begin(), key.end(), q + h * d, 0.0));
        }
        double sum = 0;
        const double maximum = *std::max_element(s.begin(), s.end());
        for (double x : s) {
            sum += std::exp(x - maximum);
        }
        for (size_t i = 0; i < s.size(); i++) {
            mass[i] += std::exp(s[i] - maximum) / sum;
        }
    }
    std::vector<int> order(slots.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
        return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
    });
    std::vector<int32_t> best;
    for (size_t i = 0; i < std::min(limit, order.size()); i++) {
        best.push_back(slots[order[i]]);
    }
    std::sort(best.begin(), best.end());
    return best;
}

TEST(KeyCodes, TheBestAreThoseOfBruteForce) {
    tests::Random random;
    for (int d : {7, 64, 80, 128}) {
        for (int nq : {1, 2, 3, 4, 7}) {
            const int n = 300;
            const auto keys = random.normal(size_t(n) * d);
            const auto q = random.normal(size_t(nq) * d, 3);
            const KeyCodes codes = coded(d, keys);
            std::vector<int32_t> slots;
            for (int32_t s = kFirst; s < kFirst + n; s += 1 + s % 2) {
                slots.push_back(s);
            }
            const float scale = 1 / std::sqrt(float(d));
            for (int64_t limit : {0, 1, 17, 150, 1000}) {
                const auto got = codes.best(nq, q.data(), scale, slots, limit);
                const auto expected = best_in_double(
                        codes, d, nq, q.data(), scale, slots, limit);
                ASSERT_EQ(got.size(), expected.size());
                // Rounding may swap two that are as good at the limit.
                std::vector<int32_t> same;
                std::set_intersection(
                        got.begin(), got.end(), expected.begin(), expected.end(),
                        std::back_inserter(same));
                EXPECT_LE(got.size() - same.size(), 1u)
                        << "d " << d << " nq " << nq << " limit " << limit;
            }
        }
    }
}

TEST(KeyCodes, OfEqualsTheLowerOnes) {
    const KeyCodes codes = coded(8, std::vector<float>(8 * 20, 1.0f));
    std::vector<int32_t> slots(20);
    std::iota(slots.begin(), slots.end(), kFirst);
    const std::vector<float> q(16, 1.0f);
    EXPECT_EQ(codes.best(2, q.data(), 1, slots, 3),
              (std::vector<int32_t>{kFirst, kFirst + 1, kFirst + 2}));
    EXPECT_EQ(codes.best(1, q.data(), 1, slots, 20), slots);
    EXPECT_TRUE(codes.best(1, q.data(), 1, {}, 5).empty());
}

TEST(KeyCodes, CopiesGoTheirOwnWays) {
    tests::Random random;
    const int d = 40, n = 5000; // more than a chunk
    const auto keys = random.normal(size_t(n) * d), others = random.normal(n * d);
    KeyCodes a = coded(d, keys);
    const size_t alone = a.bytes_used();
    KeyCodes b = a;
    std::unordered_set<const void*> counted;
    EXPECT_EQ(a.bytes_used(&counted), alone);
    EXPECT_LT(b.bytes_used(&counted), alone / 10);
    const auto equal = [&](const KeyCodes& x, const KeyCodes& y) {
        ASSERT_EQ(x.size(), y.size());
        for (int64_t i = 0; i < x.size(); i++) {
            ASSERT_TRUE(std::equal(
                    x.code(kFirst + i),
                    x.code(kFirst + i) + KeyCodes::code_size(d),
                    y.code(kFirst + i)))
                    << i;
        }
    };
    b.truncate(4200);
    for (int i = 4200; i < n; i++) {
        b.append(others.data() + i * d);
    }
    equal(a, coded(d, keys));
    auto mixed = keys;
    std::copy(others.begin() + 4200 * d, others.end(), mixed.begin() + 4200 * d);
    equal(b, coded(d, mixed));
    b.truncate(0);
    EXPECT_EQ(b.size(), 0);
    std::vector<uint8_t> bytes;
    for (int i = 0; i < n; i++) {
        const uint8_t* c = a.code(kFirst + i);
        bytes.insert(bytes.end(), c, c + KeyCodes::code_size(d));
    }
    b.restore(n, bytes.data());
    equal(a, b);
}

TEST(KeyCodes, WrongInput) {
    tests::Random random;
    KeyCodes codes = coded(8, random.normal(80));
    const auto q = random.normal(16);
    EXPECT_SENTENCE(KeyCodes(0, 0), "d = 0");
    EXPECT_SENTENCE(KeyCodes(8, -1), "first_slot = -1");
    EXPECT_SENTENCE(codes.best(1, q.data(), 1, {4}, 0), "slot 4 has no code");
    EXPECT_SENTENCE(codes.best(1, q.data(), 1, {15}, 0), "slot 15 has no code");
    EXPECT_SENTENCE(codes.best(0, q.data(), 1, {5}, 0), "nq = 0");
    EXPECT_SENTENCE(codes.best(1, q.data(), 1, {5}, -1), "limit = -1");
    for (float scale : {0.0f, -1.0f, NAN, INFINITY}) {
        EXPECT_SENTENCE(codes.best(1, q.data(), scale, {5}, 0), "scale = ");
    }
    KeyCodes empty(8, 0);
    EXPECT_SENTENCE(empty.restore(-1, nullptr), "n = -1");
    std::vector<uint8_t> bytes(codes.code(5), codes.code(5) + 20);
    bytes[2] = 0x80, bytes[3] = 0x7f; // a step of infinity
    EXPECT_SENTENCE(empty.restore(1, bytes.data()), "a step of inf");
    bytes[0] = bytes[1] = 0xff;
    EXPECT_SENTENCE(empty.restore(1, bytes.data()), "a base of -nan");
    EXPECT_EQ(empty.size(), 0);
    EXPECT_SENTENCE(codes.truncate(11), "size = 11");
    EXPECT_SENTENCE(codes.restore(1, nullptr), "10 codes already");
    const std::vector<float> huge(8, 1e19f);
    codes.append(huge.data());
    const std::vector<float> huge_query(8, std::numeric_limits<float>::max());
    EXPECT_SENTENCE(codes.best(1, huge_query.data(), 1, {14, 15}, 1), "a product of");
    EXPECT_SENTENCE(codes.best(2, q.data(), 1e38f, {14, 15}, 1), "a product of");
    EXPECT_EQ(codes.size(), 11);
}

/// What one key takes, and what a fork copies, does not grow with the head.
TEST(KeyCodes, CostLittleAtFirst) {
    tests::Random random;
    KeyCodes a = coded(128, random.normal(128));
    EXPECT_LT(a.bytes_used(), 16u << 10);
    KeyCodes b = a;
    b.append(random.normal(128).data());
    EXPECT_LT(b.bytes_used(), 16u << 10);
}

TEST(KeyCodes, KeysThatRoundToOneLevel) {
    // Just below a number of eight bits, which base is rounded up to.
    const std::vector<float> keys(32, std::nextafter(257.0f, 258.0f));
    const KeyCodes codes = coded(32, keys);
    std::vector<float> key(32);
    codes.decode(kFirst, key.data());
    for (float x : key) {
        EXPECT_NEAR(x, keys[0], keys[0] / 256);
    }
}

/// An adapter that ranks keys by their codes.
struct Refining : ::testing::Test {
    static constexpr int kLength = 600, kSink = 4, kWindow = 20;
    tests::Random random;
    World world{random, 6, 2, 32, kLength, 12, NEEDS_POST_ROPE};
    AdapterParams params = world.params(kSink, kWindow);
    KvView kv = world.view(kLength);
    ProbePolicy policy;
    std::vector<float> out, lse;
    std::vector<AttendStats> stats;

    Refining()
            : out(6 * 32), lse(6), stats(6) {
        params.key_codes = true;
        policy.nprobe = 12;
        policy.max_selectivity = 0.05;
        policy.refine = 4;
    }
    int64_t appended(AttentionAdapter& adapter) const {
        const int64_t sequence = adapter.create();
        adapter.append(sequence, kv);
        return sequence;
    }
    void attend(const AttentionAdapter& adapter, int64_t sequence) {
        adapter.attend({{sequence, kv}}, world.queries(kLength - 1),
                       {out.data(), lse.data(), stats.data()}, &policy);
    }
};

TEST_F(Refining, ReadsTheBestOfTheProbedCells) {
    for (bool share : {true, false}) {
        policy.share_group = share;
        AttentionAdapter adapter(params, world.partitions);
        const int64_t a = appended(adapter);
        attend(adapter, a);
        const ProbedCells probed =
                adapter.route({{a, kv}}, world.queries(kLength - 1), &policy);
        const int far = kLength - kSink - kWindow, limit = far / 20;
        const int nq = share ? 3 : 1;
        for (int h = 0; h < 6; h++) {
            const int64_t row = h / nq;
            std::vector<int32_t> slots;
            for (int64_t i = probed.begin[row]; i < probed.begin[row + 1]; i++) {
                const auto in = adapter.lists(a, h / 3).slots(probed.cells[i]);
                slots.insert(slots.end(), in.begin(), in.end());
            }
            std::sort(slots.begin(), slots.end());
            const auto best = adapter.codes(a, h / 3).best(
                    nq, world.queries(kLength - 1) + row * nq * 32,
                    adapter.params().scale, slots, limit);
            // Cells may be too large or too small to offer more than is read.
            const int offered = static_cast<int>(slots.size());
            EXPECT_EQ(stats[h].keys_ranked, offered > limit ? offered : 0);
            EXPECT_EQ(stats[h].keys_read, std::min(offered, limit));
            EXPECT_TRUE(offered <= 4.0 * far / 20 || stats[h].cells == 1);
            EXPECT_EQ(stats[h].far_keys, far);
            const std::set<int64_t> reads(best.begin(), best.end());
            std::vector<double> expected;
            double expected_lse;
            world.reference(
                    kLength - 1, h,
                    [&](int64_t j) {
                        return j < kSink || j >= kLength - kWindow || reads.count(j);
                    },
                    expected, expected_lse);
            EXPECT_LT(tests::relative_error(out.data() + h * 32, expected), 1e-5);
            EXPECT_NEAR(lse[h], expected_lse, 1e-4);
        }
    }
}

/// Several tokens at once, and earlier ones by position, are answered as each
/// alone when it was the newest.
TEST_F(Refining, EarlierTokensSeeTheirOwnKeys) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    const int n = 3, first = kLength - n;
    std::vector<float> several(n * 6 * 32);
    adapter.attend({{a, kv, n}}, world.queries(first), {several.data()}, &policy);
    AttentionAdapter growing(params, world.partitions);
    const int64_t b = growing.create();
    for (int token : {300, first, first + 1, first + 2}) {
        const KvView so_far = world.view(token + 1);
        growing.append(b, so_far);
        growing.attend({{b, so_far}}, world.queries(token),
                       {out.data(), lse.data(), stats.data()}, &policy);
        const std::vector<float> newest = out;
        const int64_t position = token;
        SequenceInput in{a, kv};
        in.positions = &position;
        adapter.attend({in}, world.queries(token),
                       {out.data(), lse.data(), stats.data()}, &policy);
        for (size_t i = 0; i < out.size(); i++) {
            EXPECT_NEAR(out[i], newest[i], 1e-5) << "token " << token;
            if (token >= first) {
                EXPECT_NEAR(several[(token - first) * 6 * 32 + i], newest[i], 1e-5);
            }
        }
    }
}

TEST_F(Refining, ForksTruncatedAndLoadedOnesAnswerAlike) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    attend(adapter, a);
    const std::vector<float> expected = out;
    const int64_t b = adapter.fork(a);
    adapter.truncate(b, 200, kv);
    adapter.append(b, kv);
    attend(adapter, b);
    EXPECT_EQ(out, expected);
    const tests::TemporaryFile file;
    adapter.save(b, file.path);
    attend(adapter, adapter.load(file.path));
    EXPECT_EQ(out, expected);
}

TEST_F(Refining, TheTwoHalvesAreTheWhole) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    attend(adapter, a);
    const std::vector<float> expected = out;
    const float* q = world.queries(kLength - 1);
    const ProbedCells probed = adapter.route({{a, kv}}, q, &policy);
    adapter.attend_preassigned({{a, kv}}, q, probed, {out.data()}, &policy);
    EXPECT_EQ(out, expected);
    adapter.attend_preassigned(
            {{a, kv}}, q, probed, {out.data(), lse.data(), stats.data()});
    int64_t offered = 0;
    for (int64_t i = probed.begin[0]; i < probed.begin[1]; i++) {
        offered += adapter.lists(a, 0).slots(probed.cells[i]).size();
    }
    EXPECT_EQ(stats[0].keys_read, offered);
}

TEST_F(Refining, FewFarKeysAreNotRanked) {
    for (int64_t below : {kLength - kSink - kWindow - 1, kLength - kSink - kWindow}) {
        params.dense_below = below;
        AttentionAdapter adapter(params, world.partitions);
        const int64_t a = appended(adapter);
        attend(adapter, a);
        const bool dense = below == kLength - kSink - kWindow;
        EXPECT_EQ(stats[0].keys_ranked == 0, dense);
        EXPECT_EQ(stats[0].keys_read == stats[0].far_keys, dense);
    }
}

/// Ranking every key finds more mass than reading whole cells.
TEST_F(Refining, FindsMoreThanCells) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    double mass[2] = {0, 0};
    for (int refines : {0, 1}) {
        policy.refine = refines ? 20 : 1;
        for (int token = kLength - 30; token < kLength; token++) {
            const int64_t position = token;
            SequenceInput in{a, kv};
            in.positions = &position;
            adapter.attend({in}, world.queries(token),
                           {out.data(), lse.data(), stats.data()}, &policy);
            mass[refines] += std::accumulate(lse.begin(), lse.end(), 0.0);
        }
    }
    EXPECT_GT(mass[1], mass[0] + 1);
}

TEST_F(Refining, WithoutALimitItIsDenseAttention) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    policy.max_selectivity = 1;
    attend(adapter, a);
    for (int h = 0; h < 6; h++) {
        std::vector<double> expected;
        double expected_lse;
        world.reference(kLength - 1, h, [](int64_t) { return true; }, expected,
                        expected_lse);
        EXPECT_LT(tests::relative_error(out.data() + h * 32, expected), 1e-5);
        EXPECT_EQ(stats[h].keys_read, stats[h].far_keys);
        EXPECT_EQ(stats[h].keys_ranked, 0);
    }
}

TEST_F(Refining, ALimitOfNothingReadsOneKey) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    policy.max_keys = 0;
    attend(adapter, a);
    EXPECT_EQ(stats[0].keys_read, 1);
    EXPECT_EQ(stats[0].cells, 1); // the best one, whose keys are ranked
    EXPECT_NE(stats[0].keys_ranked, 1);
}

TEST_F(Refining, SeveralPartitionsRankTheirKeysTogether) {
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = adapter.create(sequence_partitions(kv, kSink, 500, 9));
    adapter.append(a, kv);
    policy.split = {0.75, 0.25};
    policy.refine = 8;
    attend(adapter, a);
    const int limit = (kLength - kSink - kWindow) / 20;
    EXPECT_EQ(stats[0].keys_read, limit);
    // Shares of a head's own are limits by themselves.
    policy.split.clear();
    policy.refine = 20; // candidates enough, whatever the cells' sizes
    policy.head_split = {{0.25, 0.25}, {0, 1}};
    attend(adapter, a);
    EXPECT_EQ(stats[0].keys_read, limit / 2);
    EXPECT_EQ(stats[5].keys_read, limit);
    // Of a head all of whose shares are 0, no far key, whoever chose its cells.
    const ProbedCells probed = adapter.route({{a, kv}}, world.queries(kLength - 1), &policy);
    policy.head_split = {{0, 0}, {0, 1}};
    adapter.attend_preassigned({{a, kv}}, world.queries(kLength - 1), probed,
                               {out.data(), nullptr, stats.data()}, &policy);
    EXPECT_EQ(stats[0].keys_read, 0);
    EXPECT_EQ(stats[5].keys_read, limit);
}

TEST_F(Refining, NeedsCodes) {
    params.key_codes = false;
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = appended(adapter);
    out.assign(out.size(), 7.0f);
    EXPECT_SENTENCE(attend(adapter, a), "policy.refine = 4");
    EXPECT_EQ(out, std::vector<float>(out.size(), 7.0f));
    EXPECT_SENTENCE(adapter.codes(a, 0), "key_codes = false");
    EXPECT_SENTENCE(
            adapter.attend_preassigned({{a, kv}}, world.queries(kLength - 1), {},
                                       {out.data()}, &policy),
            "policy.refine = 4");
    params.policy = policy;
    EXPECT_SENTENCE(AttentionAdapter(params, HeadPartitions()), "policy.refine = 4");
    params.policy = ProbePolicy();
    policy.refine = 0.5;
    EXPECT_SENTENCE(attend(adapter, a), "policy.refine = 0.5");
    policy.refine = NAN;
    EXPECT_SENTENCE(attend(adapter, a), "policy.refine = nan");
    params.key_codes = true;
    AttentionAdapter with(params, world.partitions);
    EXPECT_SENTENCE(with.codes(with.create(), 2), "kv_head = 2");
}

} // namespace
} // namespace faiss_saap
