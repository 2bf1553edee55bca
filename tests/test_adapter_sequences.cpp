// AttentionAdapter over batches, forks, several partitions and files; its
// exactness in every layout.
#include <algorithm>
#include <fstream>
#include <numeric>
#include <set>

#include <faiss/IndexFlat.h>

#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>

#include "adapter_world.h"

namespace faiss_saap {
namespace {

using tests::expect_same_state;
using tests::relative_error;
using tests::World;

enum class Layout { token_major, head_major, paged };

struct Inputs {
    DType dtype;
    Layout layout;
    int d, d_v, heads_kv, group;
    RoutingNeeds space;
    bool share_group;
};

std::ostream& operator<<(std::ostream& os, const Inputs& in) {
    static const char* layouts[] = {"token_major", "head_major", "paged"};
    return os << name(in.dtype) << " " << layouts[int(in.layout)] << " d="
              << in.d << " d_v=" << in.d_v << " Hkv=" << in.heads_kv
              << " group=" << in.group << " needs=" << in.space
              << " share=" << in.share_group;
}

/// A cache of random rows in one of the layouts.
struct Cache {
    std::vector<char> k, v;
    std::vector<int32_t> pages;
    KvView view;

    Cache(tests::Random& random, const Inputs& in, int64_t length) {
        constexpr int page_size = 16;
        const int64_t npages = length / page_size + 2;
        const int64_t capacity = npages * page_size;
        k.resize(capacity * in.heads_kv * in.d * element_size(in.dtype));
        v.resize(capacity * in.heads_kv * in.d_v * element_size(in.dtype));
        switch (in.layout) {
            case Layout::token_major:
                view = KvView::token_major(
                        k.data(), v.data(), in.dtype, length, in.heads_kv, in.d,
                        in.d_v);
                break;
            case Layout::head_major:
                view = KvView::head_major(
                        k.data(), v.data(), in.dtype, length, capacity,
                        in.heads_kv, in.d, in.d_v);
                break;
            case Layout::paged:
                pages.resize(npages);
                std::iota(pages.begin(), pages.end(), 0);
                std::shuffle(pages.begin(), pages.end(), random.engine);
                view = KvView::paged(
                        k.data(), v.data(), in.dtype, length, npages, page_size,
                        pages.data(), in.heads_kv, in.d, in.d_v);
        }
        for (int64_t s = 0; s < length; s++) {
            for (int h = 0; h < in.heads_kv; h++) {
                from_float(in.dtype, random.normal(in.d).data(), in.d,
                           const_cast<void*>(view.key(h, s)));
                from_float(in.dtype, random.normal(in.d_v).data(), in.d_v,
                           const_cast<void*>(view.value(h, s)));
            }
        }
    }
    Cache(const Cache&) = delete;
};

/// Dense attention of one query in double precision, over slots below `end`.
void reference(
        const KvView& kv,
        int head,
        const float* q,
        int64_t end,
        std::vector<double>& out,
        double& lse) {
    std::vector<float> row(std::max(kv.d, kv.d_v));
    std::vector<double> s;
    for (int64_t j = 0; j < end; j++) {
        to_float(kv.dtype, kv.key(head, j), kv.d, row.data());
        double dot = 0;
        for (int i = 0; i < kv.d; i++) {
            dot += double(q[i]) * row[i];
        }
        s.push_back(dot / std::sqrt(double(kv.d)));
    }
    const double maximum = *std::max_element(s.begin(), s.end());
    out.assign(kv.d_v, 0.0);
    double sum = 0;
    for (int64_t j = 0; j < end; j++) {
        to_float(kv.dtype, kv.value(head, j), kv.d_v, row.data());
        const double w = std::exp(s[j] - maximum);
        sum += w;
        for (int i = 0; i < kv.d_v; i++) {
            out[i] += w * row[i];
        }
    }
    for (double& o : out) {
        o /= sum;
    }
    lse = maximum + std::log(sum);
}

class RaggedBatch : public ::testing::TestWithParam<Inputs> {};

/// Sequences of very different lengths, some shorter than sink and window,
/// asking with different numbers of tokens, all cells probed: dense attention.
TEST_P(RaggedBatch, EveryCellProbedIsDenseAttention) {
    const Inputs in = GetParam();
    tests::Random random;
    const std::vector<std::pair<int64_t, int64_t>> lengths = {
            {150, 1}, {3, 2}, {1, 1}, {60, 7}, {333, 2}};
    AdapterParams params;
    params.heads_kv = in.heads_kv;
    params.heads_q = in.heads_kv * in.group;
    params.d = in.d;
    params.sink = 4;
    params.window = 24;
    params.dense_below = 0;
    RopeParams rope;
    rope.d = in.d;
    HeadPartitions partitions(in.heads_kv);
    for (auto& head : partitions) {
        // Some cells stay empty.
        head.push_back(kmeans_partition(
                40, in.d, random.normal(40 * in.d).data(), 9, in.space, {}, rope));
    }
    AttentionAdapter adapter(params, partitions);
    std::vector<std::unique_ptr<Cache>> caches;
    std::vector<SequenceInput> batch;
    int64_t tokens = 0;
    for (const auto& [length, q_len] : lengths) {
        caches.push_back(std::make_unique<Cache>(random, in, length));
        const int64_t id = adapter.create();
        adapter.append(id, caches.back()->view);
        batch.push_back({id, caches.back()->view, q_len});
        tokens += q_len;
    }
    const int64_t rows = tokens * params.heads_q;
    const auto q = random.normal(rows * in.d, 2);
    std::vector<float> out(rows * in.d_v), lse(rows);
    std::vector<AttendStats> stats(rows);
    ProbePolicy policy;
    policy.nprobe = 9;
    policy.share_group = in.share_group;
    adapter.attend(batch, q.data(), {out.data(), lse.data(), stats.data()}, &policy);

    int64_t row = 0;
    for (const SequenceInput& s : batch) {
        for (int64_t t = 0; t < s.q_len; t++) {
            const int64_t end = s.kv.length - s.q_len + t + 1;
            for (int h = 0; h < params.heads_q; h++, row++) {
                std::vector<double> expected;
                double expected_lse;
                reference(s.kv, h / in.group, q.data() + row * in.d, end,
                          expected, expected_lse);
                EXPECT_LT(relative_error(out.data() + row * in.d_v, expected), 1e-5);
                EXPECT_NEAR(lse[row], expected_lse, 1e-4);
                EXPECT_EQ(stats[row].keys_read, stats[row].far_keys);
                EXPECT_EQ(stats[row].far_keys, std::max<int64_t>(0, end - 28));
            }
        }
    }

    // One by one is the same as together.
    row = 0;
    policy.nprobe = 2;
    adapter.attend(batch, q.data(), {out.data(), lse.data()}, &policy);
    for (const SequenceInput& s : batch) {
        const int64_t n = s.q_len * params.heads_q;
        std::vector<float> alone(n * in.d_v), alone_lse(n);
        adapter.attend({s}, q.data() + row * in.d,
                       {alone.data(), alone_lse.data()}, &policy);
        for (int64_t i = 0; i < n; i++) {
            EXPECT_NEAR(alone_lse[i], lse[row + i], 1e-5);
            for (int j = 0; j < in.d_v; j++) {
                EXPECT_NEAR(alone[i * in.d_v + j], out[(row + i) * in.d_v + j], 1e-5);
            }
        }
        row += n;
    }
}

std::vector<Inputs> cases() {
    std::vector<Inputs> all;
    const DType types[] = {DType::float32, DType::float16, DType::bfloat16};
    const Layout layouts[] = {
            Layout::token_major, Layout::head_major, Layout::paged};
    const int dimensions[] = {64, 80, 96, 128, 256};
    const int groups[] = {1, 2, 3, 4, 5, 7, 8, 16};
    int i = 0;
    for (DType t : types) {
        for (Layout l : layouts) {
            for (int d : dimensions) {
                const int group = groups[i % 8];
                all.push_back(
                        {t, l, d, i % 3 ? d : 48, 1 + i % 3, group,
                         i % 2 ? NEEDS_PRE_ROPE : NEEDS_POST_ROPE, i % 5 != 0});
                i++;
            }
        }
    }
    return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, RaggedBatch, ::testing::ValuesIn(cases()));

struct Sequences : ::testing::Test {
    tests::Random random;
    World world{random, 4, 2, 8, 400, 10, NEEDS_POST_ROPE};
    Sequences() {
        for (Partition& p : world.partitions) { // statistics are part of it
            p.query = std::make_shared<CellMeanAssigner>(8, 10);
        }
    }
    AttentionAdapter make() {
        AdapterParams params = world.params(4, 20);
        params.key_codes = true;
        return AttentionAdapter(params, world.partitions);
    }
};

TEST_F(Sequences, TruncationIsAsIfNeverAppended) {
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create(), b = adapter.create();
    adapter.append(a, world.view(200));
    for (int64_t length : {350, 250, 230, 201}) {
        adapter.append(a, world.view(length));
        adapter.truncate(a, 200, world.view(length));
    }
    adapter.append(b, world.view(200));
    expect_same_state(adapter, a, b);
    adapter.append(a, world.view(300));
    adapter.append(b, world.view(300));
    expect_same_state(adapter, a, b);
    for (int64_t length : {25, 24, 10, 0}) { // into the window, into the sink
        adapter.truncate(a, length, world.view(length));
        EXPECT_EQ(adapter.length(a), length);
        EXPECT_EQ(adapter.lists(a, 0).size(), std::max<int64_t>(0, length - 24));
    }
    EXPECT_SENTENCE(adapter.truncate(b, -1, world.view(300)), "length = -1");
    EXPECT_SENTENCE(adapter.truncate(b, 301, world.view(300)), "length = 301");
    EXPECT_SENTENCE(adapter.truncate(b, 280, world.view(279)), "kv.length = 279");
    EXPECT_EQ(adapter.length(b), 300);
    EXPECT_EQ(adapter.lists(b, 1).size(), 276);
}

TEST_F(Sequences, ForksGoTheirOwnWays) {
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create();
    adapter.append(a, world.view(150));
    const int64_t b = adapter.fork(a);
    expect_same_state(adapter, a, b);
    // b goes back and on along a text of its own, a goes on.
    World other = world;
    const auto keys = random.normal(300 * 2 * 8);
    std::copy(keys.begin(), keys.end(), other.k.begin() + 100 * 2 * 8);
    adapter.truncate(b, 100, world.view(150));
    adapter.append(b, other.view(260));
    adapter.append(a, world.view(280));
    const int64_t a_alone = adapter.create(), b_alone = adapter.create();
    adapter.append(a_alone, world.view(280));
    adapter.append(b_alone, other.view(260));
    expect_same_state(adapter, a, a_alone);
    expect_same_state(adapter, b, b_alone);
    adapter.free(a);
    expect_same_state(adapter, b, b_alone);
}

TEST_F(Sequences, FreedOnesAreRefusedByName) {
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create(), b = adapter.create();
    adapter.append(b, world.view(100));
    adapter.free(a);
    EXPECT_SENTENCE(adapter.fork(a), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.free(a), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.reset(a), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.append(a, world.view(1)), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.truncate(a, 0, world.view(1)), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.lists(a, 0), "sequence 0 was freed");
    EXPECT_SENTENCE(adapter.length(2), "sequence 2 was never made");
    EXPECT_SENTENCE(adapter.length(-1), "sequence -1 was never made");
    EXPECT_SENTENCE(adapter.lists(b, 2), "kv_head = 2");
    EXPECT_SENTENCE(adapter.lists(b, 0, 1), "partition = 1");
    std::vector<float> out(64, 7.0f);
    EXPECT_SENTENCE(
            adapter.attend({{b, world.view(100)}, {a, world.view(100)}},
                           world.queries(0), {out.data()}),
            "sequence 0 was freed");
    EXPECT_EQ(out, std::vector<float>(64, 7.0f));
    EXPECT_EQ(adapter.create(), 2);

    const AttentionAdapter now = std::move(adapter);
    EXPECT_EQ(now.length(b), 100);
    EXPECT_SENTENCE(adapter.create(), "moved from");
    EXPECT_SENTENCE(adapter.length(b), "was freed");
}

TEST_F(Sequences, MemoryIsUsedAgain) {
    AttentionAdapter adapter = make();
    const size_t empty = adapter.bytes_used();
    int64_t a = adapter.create();
    adapter.append(a, world.view(400));
    const size_t full = adapter.bytes_used();
    EXPECT_GT(full, empty);
    const int64_t b = adapter.fork(a);
    EXPECT_LT(adapter.bytes_used() - full, full - empty);
    adapter.free(b);
    EXPECT_EQ(adapter.bytes_used(), full);
    adapter.reset(a);
    EXPECT_EQ(adapter.length(a), 0);
    adapter.append(a, world.view(400));
    EXPECT_EQ(adapter.bytes_used(), full);
    for (int i = 0; i < 5; i++) {
        adapter.free(a);
        a = adapter.create();
        adapter.append(a, world.view(400));
        EXPECT_EQ(adapter.bytes_used(), full);
    }
}

TEST_F(Sequences, SeveralPartitionsShareTheBudget) {
    // Head 0: the adapter's partition and one of its own; head 1: one.
    AttentionAdapter adapter = make();
    HeadPartitions own(2);
    own[0] = sequence_partitions(world.view(300), 4, 280, 14)[0];
    const int64_t s = adapter.create(own);
    EXPECT_EQ(adapter.npartition(s, 0), 2);
    EXPECT_EQ(adapter.npartition(s, 1), 1);
    const KvView kv = world.view(300);
    adapter.append(s, kv);
    for (bool share : {true, false}) {
        ProbePolicy policy;
        policy.nprobe = 24;
        policy.share_group = share;
        std::vector<float> out(32), lse(4);
        std::vector<AttendStats> stats(4);
        const auto attend = [&] {
            adapter.attend({{s, kv}}, world.queries(299),
                           {out.data(), lse.data(), stats.data()}, &policy);
        };
        attend(); // all cells of all partitions: each key once
        for (int h = 0; h < 4; h++) {
            std::vector<double> expected;
            double expected_lse;
            world.reference(299, h, [](int64_t) { return true; }, expected, expected_lse);
            EXPECT_LT(relative_error(out.data() + h * 8, expected), 1e-5);
            EXPECT_NEAR(lse[h], expected_lse, 1e-4);
            EXPECT_EQ(stats[h].keys_read, 276);
        }
        policy.max_selectivity = 0.4;
        policy.split = {0.5, 0.5};
        const ProbedCells probed = adapter.route({{s, kv}}, world.queries(299), &policy);
        attend();
        for (int h = 0; h < 4; h++) {
            // What is read is the union, as the lists say.
            const int64_t r = share ? h / 2 : h;
            std::set<int32_t> slots;
            bool first = false, second = false;
            for (int64_t i = probed.begin[r]; i < probed.begin[r + 1]; i++) {
                const int c = probed.cells[i];
                (c < 10 ? first : second) = true;
                const auto list = c < 10 ? adapter.lists(s, h / 2).slots(c)
                                         : adapter.lists(s, 0, 1).slots(c - 10);
                slots.insert(list.begin(), list.end());
            }
            EXPECT_TRUE(first);
            EXPECT_EQ(second, h < 2);
            EXPECT_EQ(stats[h].keys_read, int64_t(slots.size()));
            EXPECT_LE(stats[h].keys_read, 0.4 * 276);
            EXPECT_EQ(stats[h].cells, probed.begin[r + 1] - probed.begin[r]);
        }
        // A share of nothing leaves a partition out.
        policy.split = {0, 1};
        const ProbedCells one = adapter.route({{s, kv}}, world.queries(299), &policy);
        for (int64_t i = one.begin[0]; i < one.begin[1]; i++) {
            EXPECT_GE(one.cells[i], 10);
        }
        policy.split = {1};
        EXPECT_SENTENCE(attend(), "1 shares, a KV head has 2");
        policy.split = {0.7, 0.7};
        EXPECT_SENTENCE(attend(), "sums up to 1.4");
        policy.split = {-0.1, 1};
        EXPECT_SENTENCE(attend(), "share of -0.1");
    }
    AttentionAdapter none(world.params(4, 20));
    EXPECT_SENTENCE(none.create(), "KV head 0 has no partition");
    EXPECT_SENTENCE(none.create({{world.partitions[0]}}), "partitions for 1 heads");
    EXPECT_SENTENCE(
            none.create({{world.partitions[0]}, {}}), "KV head 1 has no partition");
    EXPECT_SENTENCE(sequence_partitions(kv, 0, 301, 4), "301");
    EXPECT_SENTENCE(sequence_partitions(kv, 0, 3, 4), "fewer");
}

/// Attention does not know an order among far keys.
TEST_F(Sequences, PermutingFarKeysChangesNothing) {
    World shuffled = world;
    std::vector<int64_t> order(400 - 24);
    std::iota(order.begin(), order.end(), 4);
    std::shuffle(order.begin(), order.end(), random.engine);
    for (size_t i = 0; i < order.size(); i++) {
        for (auto pair : {std::pair(&world.k, &shuffled.k),
                          std::pair(&world.v, &shuffled.v)}) {
            std::copy_n(pair.first->begin() + order[i] * 16, 16,
                        pair.second->begin() + (4 + int64_t(i)) * 16);
        }
    }
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create(), b = adapter.create();
    adapter.append(a, world.view(400));
    adapter.append(b, shuffled.view(400));
    ProbePolicy policy;
    policy.nprobe = 3;
    std::vector<float> x(32), y(32);
    adapter.attend({{a, world.view(400)}}, world.queries(399), {x.data()}, &policy);
    adapter.attend({{b, shuffled.view(400)}}, world.queries(399), {y.data()}, &policy);
    for (int i = 0; i < 32; i++) {
        EXPECT_NEAR(x[i], y[i], 1e-4);
    }
}

TEST_F(Sequences, AllKeysInOneCell) {
    // Every centroid but one is far from all keys.
    auto centres = std::make_shared<faiss::IndexFlatL2>(8);
    std::vector<float> c(10 * 8, 1e6f);
    std::fill_n(c.begin() + 3 * 8, 8, 0.0f);
    centres->add(10, c.data());
    for (Partition& p : world.partitions) {
        p.key = p.query =
                std::make_shared<QuantizerAssigner>(centres, NEEDS_POST_ROPE);
    }
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create();
    adapter.append(a, world.view(400));
    ProbePolicy policy;
    policy.nprobe = 1;
    policy.max_selectivity = 0.01; // the one cell does not fit and is taken
    std::vector<float> out(32), lse(4);
    std::vector<AttendStats> stats(4);
    adapter.attend({{a, world.view(400)}}, world.queries(399),
                   {out.data(), lse.data(), stats.data()}, &policy);
    std::vector<double> expected;
    double expected_lse;
    world.reference(399, 3, [](int64_t) { return true; }, expected, expected_lse);
    EXPECT_LT(relative_error(out.data() + 24, expected), 1e-5);
    EXPECT_EQ(stats[3].cells, 1);
    EXPECT_EQ(stats[3].keys_read, 376);
}

TEST_F(Sequences, SavedAndLoaded) {
    AttentionAdapter adapter = make();
    HeadPartitions own(2);
    own[1] = sequence_partitions(world.view(200), 4, 180, 9)[1];
    const int64_t a = adapter.create(own);
    adapter.append(a, world.view(300));
    const tests::TemporaryFile file;
    adapter.save(a, file.path);
    const int64_t b = adapter.load(file.path);
    expect_same_state(adapter, a, b);
    adapter.append(a, world.view(400));
    adapter.append(b, world.view(400));
    expect_same_state(adapter, a, b);
    std::vector<float> x(32), y(32);
    ProbePolicy policy;
    policy.nprobe = 2;
    adapter.attend({{a, world.view(400)}}, world.queries(399), {x.data()}, &policy);
    adapter.attend({{b, world.view(400)}}, world.queries(399), {y.data()}, &policy);
    EXPECT_EQ(x, y);
    // Also by another adapter that has the same partitions.
    AttentionAdapter again = make();
    EXPECT_EQ(again.length(again.load(file.path)), 300);

    AdapterParams params = world.params(4, 21);
    EXPECT_SENTENCE(
            AttentionAdapter(params, world.partitions).load(file.path),
            "saved with window = 20, this adapter has 21");
    params = world.params(4, 20);
    EXPECT_SENTENCE(
            AttentionAdapter(params, world.partitions).load(file.path),
            "saved with key_codes = 1, this adapter has 0");
    params.key_codes = true;
    auto others = world.partitions;
    others[1] = sequence_partitions(world.view(99), 0, 99, 10)[1][0];
    AttentionAdapter stranger(params, others);
    EXPECT_SENTENCE(stranger.load(file.path), "partition 0 of KV head");
    others[0] = world.partitions[0]; // the same assigners, another k-means
    others[1].query = world.partitions[1].query;
    EXPECT_SENTENCE(
            AttentionAdapter(params, others).load(file.path),
            "partition 0 of KV head 1");
    EXPECT_SENTENCE(AttentionAdapter(params).load(file.path), "partitions of a head");
    EXPECT_SENTENCE(stranger.load(file.path + "x"), file.path + "x");

    std::ifstream in(file.path, std::ios::binary);
    const std::string bytes(
            (std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const auto written = [&](const std::string& content) {
        std::ofstream(file.path, std::ios::binary) << content;
    };
    std::string damaged = bytes;
    damaged[bytes.size() / 2] ^= 1;
    written(damaged);
    EXPECT_SENTENCE(adapter.load(file.path), "checksum");
    written(bytes.substr(0, bytes.size() - 5));
    EXPECT_SENTENCE(adapter.load(file.path), "truncated");
    written("SaIx");
    EXPECT_SENTENCE(adapter.load(file.path), "too few");
    EXPECT_SENTENCE(adapter.save(77, file.path), "never made");
}

/// Damage that the checksum does not show, as the file was made like that.
TEST(SequenceFile, NewestKeysMustBeFinite) {
    tests::Random random;
    const World world(random, 4, 2, 8, 60, 6, NEEDS_PRE_ROPE);
    ClassifierShape shape;
    shape.d = 8;
    shape.group = 2;
    shape.ncell = 6;
    shape.width = 4;
    const auto classifier = std::make_shared<QueryClassifier>(
            shape, random.normal(parameter_count(shape)).data());
    auto partitions = world.partitions;
    for (Partition& p : partitions) {
        p.query = std::make_shared<BlendAssigner>(
                classifier, std::vector<BlendWeights>(2), .3f);
    }
    AttentionAdapter adapter(world.params(4, 10), partitions);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, world.view(60));
    const tests::TemporaryFile file;
    adapter.save(sequence, file.path);
    std::ifstream in(file.path, std::ios::binary);
    std::vector<uint8_t> bytes((std::istreambuf_iterator<char>(in)), {});
    // The key that has left the window last is the newest of its cell.
    const auto* key = reinterpret_cast<const uint8_t*>(world.k.data() + 49 * 2 * 8);
    const auto at = std::search(bytes.begin(), bytes.end(), key, key + 32);
    ASSERT_NE(at, bytes.end());
    const float nan = NAN;
    std::memcpy(&*at, &nan, sizeof(nan));
    tests::seal(bytes);
    std::ofstream(file.path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()),
                   static_cast<std::streamsize>(bytes.size()));
    EXPECT_SENTENCE(adapter.load(file.path), "corrupt: newest keys");
}

/// An assigner that the library does not know, with the same score for all.
struct Constant : CellAssigner {
    float score;
    explicit Constant(float s)
            : CellAssigner(8, 10, NEEDS_POST_ROPE), score(s) {}
    void scores(const RoutingInput& in, const CellStats*, float* out)
            const override {
        std::fill_n(out, in.n * ncell, score);
    }
    size_t bytes_read() const override {
        return 0;
    }
};

TEST_F(Sequences, ScoresThatMeanNothingAreRefused) {
    for (float score : {NAN, INFINITY}) {
        world.partitions[1].query = std::make_shared<Constant>(score);
        AttentionAdapter adapter = make();
        const int64_t a = adapter.create();
        adapter.append(a, world.view(200));
        std::vector<float> out(32, 7.0f);
        EXPECT_SENTENCE(
                adapter.attend({{a, world.view(200)}}, world.queries(199), {out.data()}),
                "KV head 1 gives cell 0 a score of");
        EXPECT_EQ(out, std::vector<float>(32, 7.0f));
    }
}

TEST_F(Sequences, ASplitThatDoesNotFitIsRefusedBeforeItMatters) {
    AttentionAdapter adapter = make();
    HeadPartitions own(2);
    own[0] = sequence_partitions(world.view(100), 0, 100, 5)[0];
    const int64_t a = adapter.create(own);
    adapter.append(a, world.view(3)); // no far keys yet
    ProbePolicy policy;
    policy.split = {0.2, 0.2, 0.6};
    std::vector<float> out(32);
    EXPECT_SENTENCE(
            adapter.attend({{a, world.view(3)}}, world.queries(2), {out.data()}, &policy),
            "3 shares, a KV head has 2");
    const auto probed = adapter.route({{a, world.view(3)}}, world.queries(2));
    EXPECT_SENTENCE(
            adapter.attend_preassigned(
                    {{a, world.view(3)}}, world.queries(2), probed, {out.data()}, &policy),
            "3 shares, a KV head has 2");
    policy.split.clear();
    policy.head_split = {{.5, .5}, {.5, .5}, {.5, .5}};
    EXPECT_SENTENCE(
            adapter.attend({{a, world.view(3)}}, world.queries(2), {out.data()}, &policy),
            "policy.head_split is for 3 KV heads, the adapter has 2");
}

TEST_F(Sequences, WhatHasNoFileFormIsNotSaved) {
    HeadPartitions own(2);
    own[0] = {{world.partitions[0].key, std::make_shared<Constant>(1), {}}};
    AttentionAdapter adapter = make();
    const int64_t a = adapter.create(own);
    const tests::TemporaryFile file;
    EXPECT_SENTENCE(adapter.save(a, file.path), "no file form");
    EXPECT_FALSE(std::ifstream(file.path).good());
}

} // namespace
} // namespace faiss_saap
