#include <faiss_saap/AttentionAdapter.h>

#include <algorithm>
#include <memory>
#include <set>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include "adapter_world.h"

namespace faiss_saap {
namespace {

using tests::relative_error;
using tests::World;

struct Inputs {
    int heads_q, heads_kv, d;
    int64_t length, sink, window, q_len;
    RoutingNeeds space;
    bool share_group;
};

std::ostream& operator<<(std::ostream& os, const Inputs& in) {
    return os << "Hq=" << in.heads_q << " Hkv=" << in.heads_kv << " d=" << in.d
              << " length=" << in.length << " sink=" << in.sink
              << " window=" << in.window << " q_len=" << in.q_len
              << " needs=" << in.space << " share=" << in.share_group;
}

class Adapter : public ::testing::TestWithParam<Inputs> {};

/// The test of all tests.
TEST_P(Adapter, EveryCellProbedIsDenseAttention) {
    const Inputs in = GetParam();
    tests::Random random;
    const World world(
            random, in.heads_q, in.heads_kv, in.d, in.length, 10, in.space);
    AttentionAdapter adapter(
            world.params(in.sink, in.window), world.partitions);
    const KvView kv = world.view(in.length);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, kv);
    ProbePolicy policy;
    policy.nprobe = 10;
    policy.share_group = in.share_group;
    std::vector<float> out(in.q_len * in.heads_q * in.d), lse(in.q_len * in.heads_q);
    std::vector<AttendStats> stats(in.q_len * in.heads_q);
    const int64_t first = in.length - in.q_len;
    adapter.attend(
            {{sequence, kv, in.q_len}}, world.queries(first),
            {out.data(), lse.data(), stats.data()}, &policy);
    for (int64_t t = 0; t < in.q_len; t++) {
        for (int h = 0; h < in.heads_q; h++) {
            std::vector<double> expected;
            double expected_lse;
            world.reference(
                    first + t, h, [](int64_t) { return true; }, expected,
                    expected_lse);
            const int64_t row = t * in.heads_q + h;
            EXPECT_LT(relative_error(out.data() + row * in.d, expected), 1e-5);
            EXPECT_NEAR(lse[row], expected_lse, 1e-4);
            EXPECT_EQ(stats[row].keys_read, stats[row].far_keys);
            EXPECT_EQ(
                    stats[row].far_keys,
                    std::max<int64_t>(
                            0,
                            first + t + 1 - in.window -
                                    std::min(in.sink, first + t + 1)));
        }
    }
}

/// What is read is exactly sink, window and the probed cells.
TEST_P(Adapter, ReadsTheProbedCellsOnce) {
    const Inputs in = GetParam();
    tests::Random random;
    const World world(
            random, in.heads_q, in.heads_kv, in.d, in.length, 10, in.space);
    AttentionAdapter adapter(
            world.params(in.sink, in.window), world.partitions);
    const KvView kv = world.view(in.length);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, kv);
    ProbePolicy policy;
    policy.nprobe = 3;
    policy.max_selectivity = 0.4;
    policy.share_group = in.share_group;
    const int64_t first = in.length - in.q_len;
    ProbedCells probed =
            adapter.route({{sequence, kv, in.q_len}}, world.queries(first), &policy);
    // Cells named twice count once.
    ProbedCells doubled;
    doubled.share_group = probed.share_group;
    doubled.begin.push_back(0);
    for (size_t r = 0; r + 1 < probed.begin.size(); r++) {
        for (int twice = 0; twice < 2; twice++) {
            doubled.cells.insert(
                    doubled.cells.end(),
                    probed.cells.begin() + probed.begin[r],
                    probed.cells.begin() + probed.begin[r + 1]);
        }
        doubled.begin.push_back(int64_t(doubled.cells.size()));
    }
    std::vector<float> out(in.q_len * in.heads_q * in.d), lse(in.q_len * in.heads_q);
    std::vector<AttendStats> stats(in.q_len * in.heads_q);
    adapter.attend_preassigned(
            {{sequence, kv, in.q_len}}, world.queries(first), doubled,
            {out.data(), lse.data(), stats.data()});
    const int group = in.heads_q / in.heads_kv;
    for (int64_t t = 0; t < in.q_len; t++) {
        for (int h = 0; h < in.heads_q; h++) {
            const int64_t row = t * in.heads_q + h;
            const int64_t choice = in.share_group ? row / group : row;
            const std::set<int32_t> cells(
                    probed.cells.begin() + probed.begin[choice],
                    probed.cells.begin() + probed.begin[choice + 1]);
            EXPECT_LE(cells.size(), 3u);
            const int64_t i = first + t;
            int64_t keys = 0;
            std::vector<double> expected;
            double expected_lse;
            world.reference(
                    i, h,
                    [&](int64_t j) {
                        const bool far = j >= in.sink && j <= i - in.window;
                        const bool probed_key = far &&
                                cells.count(adapter.lists(sequence, h / group).cell_of(j));
                        keys += probed_key;
                        return !far || probed_key;
                    },
                    expected, expected_lse);
            EXPECT_EQ(stats[row].keys_read, keys);
            EXPECT_EQ(stats[row].cells, int64_t(cells.size()));
            EXPECT_LT(relative_error(out.data() + row * in.d, expected), 1e-5);
            EXPECT_NEAR(lse[row], expected_lse, 1e-4);
            if (cells.size() > 1) {
                EXPECT_LE(keys, 0.4 * stats[row].far_keys);
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
        Cases,
        Adapter,
        ::testing::Values(
                Inputs{3, 1, 16, 300, 4, 32, 1, NEEDS_POST_ROPE, true},
                Inputs{3, 1, 16, 300, 4, 32, 1, NEEDS_PRE_ROPE, false},
                Inputs{8, 2, 64, 200, 16, 20, 5, NEEDS_PRE_ROPE, true},
                Inputs{2, 2, 8, 150, 0, 1, 150, NEEDS_POST_ROPE, true},
                Inputs{4, 2, 8, 100, 16, 90, 3, NEEDS_POST_ROPE, false},
                Inputs{4, 2, 8, 40, 16, 64, 40, NEEDS_POST_ROPE, true},
                Inputs{4, 4, 8, 40, 64, 8, 2, NEEDS_POST_ROPE, true},
                Inputs{4, 2, 8, 90, 0, 0, 3, NEEDS_POST_ROPE, true},
                Inputs{3, 1, 8, 90, 5, 0, 90, NEEDS_PRE_ROPE, false}));

TEST(AttentionAdapter, BulkEqualsTokenByToken) {
    tests::Random random;
    World world(random, 4, 2, 8, 200, 12, NEEDS_PRE_ROPE);
    for (auto& p : world.partitions) {
        p.query = std::make_shared<CellMeanAssigner>(8, 12);
    }
    AttentionAdapter adapter(world.params(5, 20), world.partitions);
    const int64_t bulk = adapter.create(), single = adapter.create();
    adapter.append(bulk, world.view(200));
    for (int64_t n = 1; n <= 200; n++) {
        adapter.append(single, world.view(n));
    }
    EXPECT_EQ(adapter.lists(bulk, 0).size(), 200 - 5 - 20);
    tests::expect_same_state(adapter, bulk, single);
    std::vector<float> x(4 * 8), y(4 * 8);
    adapter.attend({{bulk, world.view(200)}}, world.queries(199), {x.data()});
    adapter.attend({{single, world.view(200)}}, world.queries(199), {y.data()});
    EXPECT_EQ(x, y);
}

TEST(AttentionAdapter, MergesWithADenseKernelElsewhere) {
    // The caller attends to the last 20 tokens with its own kernel and hands
    // the result in: an adapter of the first 100, without window.
    tests::Random random;
    const World world(random, 2, 1, 8, 120, 6, NEEDS_POST_ROPE);
    AttentionAdapter adapter(world.params(4, 0), world.partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(100));
    const int64_t last = 99;
    std::vector<float> out(16), lse(2);
    attend_range(
            world.view(120), 0, 2, world.queries(119), 1 / std::sqrt(8.0f), 100,
            120, out.data(), lse.data());
    adapter.attend(
            {{sequence, world.view(100), 1, &last}}, world.queries(119),
            {out.data(), lse.data(), nullptr, /*merge=*/true});
    for (int h = 0; h < 2; h++) {
        std::vector<double> expected;
        double expected_lse;
        world.reference(
                119, h, [](int64_t) { return true; }, expected, expected_lse);
        EXPECT_LT(relative_error(out.data() + h * 8, expected), 1e-5);
        EXPECT_NEAR(lse[h], expected_lse, 1e-4);
    }
    EXPECT_SENTENCE(
            adapter.attend(
                    {{sequence, world.view(100), 1, &last}}, world.queries(119),
                    {out.data(), nullptr, nullptr, true}),
            "lse is null");
}

TEST(AttentionAdapter, SinkAndWindowMayBeTheCallers) {
    tests::Random random;
    const World world(random, 2, 1, 8, 120, 6, NEEDS_POST_ROPE);
    AdapterParams params = world.params(4, 20);
    AttentionAdapter whole(params, world.partitions);
    params.attend_dense = false;
    AttentionAdapter far(params, world.partitions);
    const KvView kv = world.view(120);
    const int64_t a = whole.create(), b = far.create();
    whole.append(a, kv);
    far.append(b, kv);
    ProbePolicy policy;
    policy.nprobe = 2;
    std::vector<float> expected(16), expected_lse(2), out(16), lse(2), part(16), part_lse(2);
    whole.attend({{a, kv}}, world.queries(119),
                 {expected.data(), expected_lse.data()}, &policy);
    std::vector<AttendStats> stats(2);
    far.attend({{b, kv}}, world.queries(119),
               {out.data(), lse.data(), stats.data()}, &policy);
    EXPECT_EQ(stats[0].dense_mass, 0);
    const float scale = 1 / std::sqrt(8.0f);
    for (const auto& [begin, end] : {std::pair(0, 4), std::pair(100, 120)}) {
        attend_range(kv, 0, 2, world.queries(119), scale, begin, end,
                     part.data(), part_lse.data());
        merge_states(2, 8, out.data(), lse.data(), part.data(), part_lse.data());
    }
    for (int i = 0; i < 16; i++) {
        EXPECT_NEAR(out[i], expected[i], 1e-5);
    }
    EXPECT_NEAR(lse[1], expected_lse[1], 1e-5);
}

TEST(AttentionAdapter, AnAssignerThatReturnsWrongCells) {
    struct Wrong : CellAssigner {
        Wrong() : CellAssigner(8, 6, NEEDS_POST_ROPE) {}
        void scores(const RoutingInput&, const CellStats*, float*) const override {}
        void assign(const RoutingInput& in, const CellStats*, int, int32_t* cells,
                    float*) const override {
            for (int64_t i = 0; i < in.n; i++) {
                cells[i] = i < 3 ? 0 : 6;
            }
        }
        size_t bytes_read() const override {
            return 0;
        }
    };
    tests::Random random;
    World world(random, 2, 1, 8, 50, 6, NEEDS_POST_ROPE);
    world.partitions[0].key = std::make_shared<Wrong>();
    AttentionAdapter adapter(world.params(4, 10), world.partitions);
    const int64_t sequence = adapter.create();
    EXPECT_SENTENCE(
            adapter.append(sequence, world.view(50)), "slot 7 into cell 6");
    EXPECT_EQ(adapter.length(sequence), 0);
    EXPECT_EQ(adapter.lists(sequence, 0).size(), 0);
}

/// An assigner that knows which query head asks: head h wants cell h.
struct CellOfHead : CellAssigner {
    CellOfHead(int d, int ncell)
            : CellAssigner(d, ncell, NEEDS_POST_ROPE | NEEDS_HEAD) {}
    void scores(const RoutingInput& input, const CellStats* stats, float* out)
            const override {
        check(input, stats);
        for (int64_t i = 0; i < input.n; i++) {
            for (int c = 0; c < ncell; c++) {
                out[i * ncell + c] = input.head[i] == c ? 1.0f : 0.0f;
            }
        }
    }
    size_t bytes_read() const override {
        return 0;
    }
};

TEST(AttentionAdapter, AssignersLearnWhichQueryHeadAsks) {
    tests::Random random;
    World world(random, 6, 2, 8, 200, 6, NEEDS_POST_ROPE);
    for (Partition& p : world.partitions) {
        p.query = std::make_shared<CellOfHead>(8, 6);
    }
    AttentionAdapter adapter(world.params(4, 10), world.partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(200));
    ProbePolicy policy;
    policy.nprobe = 1;
    policy.share_group = false;
    const ProbedCells probed =
            adapter.route({{sequence, KvView(), 2}}, world.queries(198), &policy);
    EXPECT_EQ(probed.cells, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}));
    world.partitions[1].key = world.partitions[1].query;
    EXPECT_SENTENCE(
            AttentionAdapter(world.params(4, 10), world.partitions),
            "partition.key needs query heads");
}

/// The best cell of one partition may be more than its share; the others get what is left.
TEST(AttentionAdapter, SeveralPartitionsKeepTheLimitTogether) {
    tests::Random random;
    const World world(random, 4, 2, 16, 600, 12, NEEDS_POST_ROPE);
    AttentionAdapter adapter(world.params(4, 36), world.partitions);
    const KvView kv = world.view(600);
    const int64_t sequence = adapter.create(sequence_partitions(kv, 4, 564, 40));
    adapter.append(sequence, kv);
    int64_t largest = 0;
    for (int h = 0; h < 2; h++) {
        for (int p = 0; p < 2; p++) {
            const CellLists& lists = adapter.lists(sequence, h, p);
            for (int c = 0; c < lists.ncell(); c++) {
                largest = std::max(largest, lists.count_before(c, 564));
            }
        }
    }
    std::vector<float> out(4 * 16);
    std::vector<AttendStats> stats(4);
    for (const std::vector<double>& split :
         {std::vector<double>{}, {.01, .99}, {.99, .01}, {0, 1}}) {
        for (bool share_group : {true, false}) {
            for (int64_t more : {0, 1, 7, 50}) {
                ProbePolicy policy;
                policy.split = split;
                policy.share_group = share_group;
                policy.max_keys = largest + more;
                for (int64_t i = 590; i < 600; i++) {
                    adapter.attend(
                            {{sequence, kv}}, world.queries(i),
                            {out.data(), nullptr, stats.data()}, &policy);
                    for (const AttendStats& s : stats) {
                        EXPECT_GT(s.keys_read, 0);
                        EXPECT_LE(s.keys_read, policy.max_keys);
                    }
                }
            }
        }
    }
}

TEST(AttentionAdapter, FewFarKeysAreReadDensely) {
    tests::Random random;
    const World world(random, 2, 1, 8, 100, 6, NEEDS_POST_ROPE);
    AdapterParams params = world.params(4, 36);
    params.policy.nprobe = 1;
    params.dense_below = 60; // exactly as many as there are
    AttentionAdapter adapter(params, world.partitions);
    std::vector<float> out(16);
    std::vector<AttendStats> stats(2);
    const auto attend = [&](AttentionAdapter& a) {
        const int64_t sequence = a.create();
        a.append(sequence, world.view(100));
        a.attend({{sequence, world.view(100)}}, world.queries(99),
                 {out.data(), nullptr, stats.data()});
    };
    attend(adapter);
    EXPECT_EQ(stats[0].far_keys, 60);
    EXPECT_EQ(stats[0].keys_read, 60);
    params.dense_below = 59;
    AttentionAdapter sparse(params, world.partitions);
    attend(sparse);
    EXPECT_EQ(stats[0].cells, 1);
    EXPECT_LT(stats[0].keys_read, 60);
}

TEST(AttentionAdapter, PositionsAskForEarlierTokens) {
    tests::Random random;
    const World world(random, 2, 1, 8, 100, 6, NEEDS_POST_ROPE);
    AdapterParams params = world.params(4, 10);
    params.position_offset = 1000;
    params.policy.nprobe = 6;
    AttentionAdapter adapter(params, world.partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(100));
    const int64_t position = 1050;
    std::vector<float> out(16), lse(2);
    adapter.attend(
            {{sequence, world.view(100), 1, &position}}, world.queries(50),
            {out.data(), lse.data()});
    std::vector<double> expected;
    double expected_lse;
    world.reference(50, 0, [](int64_t) { return true; }, expected, expected_lse);
    EXPECT_LT(relative_error(out.data(), expected), 1e-5);
    for (int64_t wrong : {999, 1100, -5}) {
        EXPECT_SENTENCE(
                adapter.attend(
                        {{sequence, world.view(100), 1, &wrong}},
                        world.queries(50), {out.data(), lse.data()}),
                "positions[0] = " + std::to_string(wrong));
    }
}

TEST(AttentionAdapter, EmptySequence) {
    tests::Random random;
    const World world(random, 2, 1, 8, 50, 6, NEEDS_POST_ROPE);
    AttentionAdapter adapter(world.params(4, 10), world.partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(0));
    EXPECT_EQ(adapter.length(sequence), 0);
    float unused;
    adapter.attend({{sequence, world.view(0), 0}}, nullptr, {&unused});
    adapter.attend({}, nullptr, {});
    EXPECT_SENTENCE(
            adapter.attend({{sequence, world.view(0)}}, world.queries(0), {&unused}),
            "q_len = 1 exceeds");
}

TEST(AttentionAdapter, WrongInputChangesNothing) {
    tests::Random random;
    World world(random, 4, 2, 8, 100, 6, NEEDS_POST_ROPE);
    AttentionAdapter adapter(world.params(4, 10), world.partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(80));
    std::vector<float> out(32, 7.0f);
    const auto append = [&](const KvView& kv) { adapter.append(sequence, kv); };
    const auto attend = [&](const KvView& kv, const float* q, int64_t q_len) {
        adapter.attend({{sequence, kv, q_len}}, q, {out.data()});
    };
    EXPECT_SENTENCE(append(world.view(79)), "kv.length = 79");
    KvView kv = world.view(100);
    kv.heads = 1;
    EXPECT_SENTENCE(append(kv), "kv.heads = 1");
    kv = world.view(100);
    kv.d = 4;
    EXPECT_SENTENCE(append(kv), "kv.d = 4");
    EXPECT_SENTENCE(attend(world.view(79), world.queries(79), 1), "kv.length = 79");
    EXPECT_SENTENCE(attend(world.view(80), nullptr, 1), "queries is null");
    EXPECT_SENTENCE(attend(world.view(81), world.queries(80), 1), "append first");
    const int64_t far_away[] = {INT64_MIN, INT64_MAX};
    for (const int64_t& position : far_away) {
        EXPECT_SENTENCE(
                adapter.attend({{sequence, world.view(80), 1, &position}},
                               world.queries(0), {out.data()}),
                "positions[0]");
    }
    EXPECT_SENTENCE(attend(world.view(80), world.queries(0), -1), "q_len = -1");
    EXPECT_SENTENCE(attend(world.view(80), world.queries(0), 81), "q_len = 81");
    EXPECT_SENTENCE(
            adapter.attend({{sequence, world.view(80)}}, world.queries(79), {}),
            "output is null");
    auto q = std::vector<float>(32, 1.0f);
    q[19] = INFINITY;
    EXPECT_SENTENCE(attend(world.view(80), q.data(), 1), "queries[19]");
    world.k[95 * 16 + 11] = NAN;
    EXPECT_SENTENCE(append(world.view(100)), "key of slot 95, head 1: key[3]");
    // A page table with a hole, and one that points outside the buffers.
    for (int32_t page : {-1, 10}) {
        std::vector<int32_t> pages = {0, 1, 2, page, 4, 5, 6, 7, 8, 9};
        kv = world.view(90);
        kv.page_table = pages.data();
        kv.page_size = 10;
        kv.npages = 10;
        kv.k_page_stride = kv.v_page_stride = 10 * 16;
        EXPECT_SENTENCE(
                append(kv), "page_table[3] = " + std::to_string(page));
        EXPECT_SENTENCE(attend(kv, world.queries(79), 1), "page_table[3]");
    }
    EXPECT_EQ(adapter.length(sequence), 80);
    EXPECT_EQ(adapter.lists(sequence, 0).size(), 80 - 14);

    ProbedCells probed =
            adapter.route({{sequence, KvView()}}, world.queries(79));
    const auto preassigned = [&](const ProbedCells& p) {
        adapter.attend_preassigned(
                {{sequence, world.view(80)}}, world.queries(79), p, {out.data()});
    };
    ProbedCells wrong = probed;
    wrong.cells[0] = 6;
    EXPECT_SENTENCE(preassigned(wrong), "probed.cells[0] = 6");
    wrong = probed;
    wrong.begin.pop_back();
    EXPECT_SENTENCE(preassigned(wrong), "probed.begin");
    wrong = probed;
    wrong.begin[1] = -1;
    EXPECT_SENTENCE(preassigned(wrong), "probed.begin[1] = -1 is out of order");
    wrong = probed;
    const auto last = static_cast<int64_t>(wrong.begin.size()) - 1;
    wrong.begin[last] = static_cast<int64_t>(wrong.cells.size()) + 1;
    EXPECT_SENTENCE(
            preassigned(wrong),
            ("probed.begin[" + std::to_string(last) + "] = " +
             std::to_string(wrong.begin[last]))
                    .c_str());
    EXPECT_EQ(out, std::vector<float>(32, 7.0f));
}

TEST(AttentionAdapter, WrongParameters) {
    tests::Random random;
    const World world(random, 4, 2, 8, 50, 6, NEEDS_PRE_ROPE);
    const auto make = [&](auto change) {
        AdapterParams p = world.params(4, 10);
        auto partitions = world.partitions;
        change(p, partitions);
        AttentionAdapter adapter(p, partitions);
    };
    using P = AdapterParams&;
    using V = std::vector<Partition>&;
    EXPECT_SENTENCE(make([](P p, V) { p.heads_kv = 0; }), "heads_kv = 0");
    EXPECT_SENTENCE(make([](P p, V) { p.heads_q = 3; }), "heads_q = 3");
    EXPECT_SENTENCE(make([](P p, V) { p.heads_q = 0; }), "heads_q = 0");
    EXPECT_SENTENCE(make([](P p, V) { p.d = 0; }), "d = 0");
    EXPECT_SENTENCE(make([](P p, V) { p.d = 4; }), "a partition of KV head 0 has d = 8");
    EXPECT_SENTENCE(make([](P p, V) { p.sink = -1; }), "sink = -1");
    EXPECT_SENTENCE(make([](P p, V) { p.window = -1; }), "window = -1");
    EXPECT_SENTENCE(make([](P p, V) { p.scale = NAN; }), "scale");
    EXPECT_SENTENCE(make([](P p, V) { p.policy.nprobe = 0; }), "nprobe = 0");
    EXPECT_SENTENCE(make([](P p, V) { p.dense_below = -1; }), "dense_below");
    EXPECT_SENTENCE(make([](P p, V) { p.position_offset = -1; }), "offset");
    EXPECT_SENTENCE(make([](P, V v) { v.pop_back(); }), "partitions for 1 heads");
    EXPECT_SENTENCE(make([](P, V v) { v[1].query = nullptr; }), "no query");
    EXPECT_SENTENCE(make([](P, V v) { v[1].rope.d = 4; }), "partial rotary");
    EXPECT_SENTENCE(make([](P, V v) { v[1].rope.d = 0; }), "no RoPE parameters");
    EXPECT_SENTENCE(make([](P, V v) { v[1].rope.theta = 0; }), "theta = 0");
    EXPECT_SENTENCE(make([](P p, V) { p.scale = -1; }), "scale = -1");
    ClassifierShape shape; // for groups of three, not of two
    shape.d = 8;
    shape.group = 3;
    shape.ncell = 6;
    shape.width = 4;
    const auto parameters = random.normal(parameter_count(shape));
    const auto classifier = std::make_shared<QueryClassifier>(shape, parameters.data());
    EXPECT_SENTENCE(
            make([&](P, V v) { v[1].query = classifier; }),
            "KV head 1 has a query assigner for 3 query heads");
}

} // namespace
} // namespace faiss_saap
