#include "device_adapter.h"

namespace faiss_saap::tests {
namespace {

class GpuAdapterCases : public DeviceTest,
                        public ::testing::WithParamInterface<AdapterCase> {};

TEST_P(GpuAdapterCases, EqualTheCpu) {
    Random random;
    expect_equal_to_the_cpu(CaseWorld(GetParam(), random), random);
}

INSTANTIATE_TEST_SUITE_P(
        Table,
        GpuAdapterCases,
        ::testing::ValuesIn(adapter_cases()),
        [](const auto& info) { return std::to_string(info.index); });

AdapterCase with_means() {
    AdapterCase c;
    c.name = "";
    c.query = QueryKind::blend;
    c.union_of_two = true;
    c.layout = CacheLayout::paged;
    c.lengths = {2000};
    return c;
}

class GpuAdapter : public DeviceTest {};

TEST_F(GpuAdapter, AnyWayOfAppendingGivesOneState) {
    Pair p(with_means());
    for (int64_t to : {1, 2, 44, 45, 46, 47, 80, 500, 501, 502, 1999, 2000}) {
        p.append(to);
        p.expect_same(p.on_cpu, p.on_device);
    }
    // All at once.
    const int64_t bulk = p.device.create();
    SequenceInput in = p.input(2000, 2000);
    in.sequence = bulk;
    p.device.append(*p.device.plan({in}));
    p.expect_same(p.on_cpu, bulk);
}

TEST_F(GpuAdapter, TruncatedForkedAndResetAsOnTheCpu) {
    Pair p(with_means());
    p.append(1500);
    const int64_t cpu_fork = p.cpu.fork(p.on_cpu);
    const int64_t device_fork = p.device.fork(p.on_device);
    p.expect_same(cpu_fork, device_fork);
    // Back and forth, as speculation does it, and far.
    for (int64_t to : {1490, 1300, 700, 60, 45, 10, 0}) {
        p.cpu.truncate(p.on_cpu, to, p.host.view(to));
        p.device.truncate(p.on_device, to, p.cache.view(to));
        p.expect_same(p.on_cpu, p.on_device);
        p.append(to + 200);
        p.expect_same(p.on_cpu, p.on_device);
    }
    p.expect_same(cpu_fork, device_fork);
    p.cpu.reset(p.on_cpu);
    p.device.reset(p.on_device);
    p.append(300);
    p.expect_same(p.on_cpu, p.on_device);
    p.device.free(p.on_device);
    EXPECT_SENTENCE(p.device.length(p.on_device), "was freed");
    p.expect_same(cpu_fork, device_fork);
    p.device.free(device_fork);
    EXPECT_EQ(p.device.bytes_used(), 0u);
}

/// Truncation leaves extents idle; many rounds must not use up the arena.
TEST_F(GpuAdapter, SpeculatesForeverInItsReserve) {
    AdapterCase c;
    c.name = "";
    c.lengths = {1500};
    c.ncell = 8;
    Pair p(c, 1500);
    p.append(1500);
    for (int round = 0; round < 60; round++) {
        const int64_t to = p.random.below(1500);
        p.cpu.truncate(p.on_cpu, to, p.host.view(to));
        p.device.truncate(p.on_device, to, p.cache.view(to));
        p.append(1500);
    }
    p.expect_same(p.on_cpu, p.on_device);
}

/// By a step and by its attention alone, with far keys and without.
TEST_F(GpuAdapter, MergesIntoTheCallersResult) {
    for (int64_t window : {40, 2000}) {
        for (bool steps : {false, true}) {
            SCOPED_TRACE(::testing::Message() << window << (steps ? ", by a step" : ""));
            AdapterCase c;
            c.name = "";
            c.window = window;
            c.lengths = {300};
            c.heads_q = 6; // fewer than a tile has
            Pair p(c, c.lengths[0]);
            const OnDevice<char> queries(as_type(c.dtype, p.world.queries()));
            OnDevice<float> output(c.heads_q * c.d), lse(c.heads_q);
            OnDevice<AttendStats> stats(c.heads_q);
            AttendOutput out;
            out.output = output.data();
            out.lse = lse.data();
            out.stats = stats.data();
            const auto attend = [&](int64_t sequence) {
                SequenceInput in = p.input(1, p.n);
                in.sequence = sequence;
                if (steps) {
                    p.device.step(*p.device.plan({in}), queries.data(), out);
                } else {
                    p.device.attend(*p.device.plan({in}), queries.data(), out);
                }
            };
            p.append(p.n - steps);
            const int64_t again = p.device.fork(p.on_device);
            attend(p.on_device);
            const auto once = output.host(), once_lse = lse.host();
            const auto once_stats = stats.host();
            out.merge = true; // with itself: the same output, twice the sum
            attend(again);
            const auto twice = output.host(), twice_lse = lse.host();
            const auto twice_stats = stats.host();
            p.device.check();
            for (size_t i = 0; i < once.size(); i++) {
                EXPECT_NEAR(once[i], twice[i], 1e-5);
            }
            for (size_t i = 0; i < once_lse.size(); i++) {
                EXPECT_NEAR(once_lse[i] + std::log(2.0f), twice_lse[i], 1e-5);
                EXPECT_NEAR(once_stats[i].dense_mass / 2, twice_stats[i].dense_mass, 1e-5);
            }
        }
    }
}

TEST_F(GpuAdapter, ABatchOfNothingChangesNothing) {
    AdapterCase c;
    c.name = "";
    Pair p(c);
    p.append(300);
    const auto nothing = p.device.plan({});
    AttendOutput out;
    alignas(16) float x = 0;
    out.output = &x;
    p.device.append(*nothing);
    GpuProbedCells cells;
    p.device.route(*nothing, &x, cells);
    p.device.attend_preassigned(*nothing, &x, cells, out);
    p.device.attend(*nothing, &x, out);
    p.device.step(*nothing, &x, out);
    p.device.check();
    p.expect_same(p.on_cpu, p.on_device);
}

/// A captured step, replayed while the sequence grows to 1,000 tokens more, is
/// what the CPU does; beyond its reserve it writes nothing and says so.
TEST_F(GpuAdapter, ReplaysAGraphWhileItGrows) {
    int compared = 0;
    for (int round = 0; round < 6; round++) {
        const bool blend = round % 3 == 1, fused = round % 3 == 2;
        AdapterCase c;
        c.name = "";
        c.query = blend ? QueryKind::blend : QueryKind::quantizer;
        c.union_of_two = blend;
        c.lengths = {2000};
        Pair p(c, 1900);
        p.append(900);
        cudaStream_t stream;
        ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
        const auto plan = p.device.plan({p.input(1, p.n)}, stream);
        const OnDevice<char> queries(as_type(c.dtype, p.world.queries()));
        const size_t rows = c.heads_q;
        OnDevice<float> output(rows * c.d), lse(rows);
        OnDevice<AttendStats> stats(rows);
        AttendOutput out;
        out.output = output.data();
        out.lse = lse.data();
        out.stats = stats.data();
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        cudaGraph_t graph;
        cudaGraphExec_t step;
        ASSERT_EQ(
                cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal),
                cudaSuccess);
        if (fused) {
            p.device.step(*plan, queries.data(), out, nullptr, stream);
        } else {
            p.device.append(*plan, stream);
            p.device.attend(*plan, queries.data(), out, nullptr, stream);
        }
        ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
        ASSERT_EQ(cudaGraphInstantiate(&step, graph, 0), cudaSuccess);
        for (int i = 0; i < 1000; i++) {
            ASSERT_EQ(cudaGraphLaunch(step, stream), cudaSuccess);
        }
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        EXPECT_EQ(p.device.length(p.on_device), 1900);
        p.cpu.append(p.on_cpu, p.host.view(1900));
        p.expect_same(p.on_cpu, p.on_device);
        // The last step's results, in one ordinary call on the CPU.
        SequenceInput in;
        in.sequence = p.on_cpu;
        in.kv = p.host.view(1900);
        const std::vector<float> q = p.world.queries();
        std::vector<float> expected(rows * c.d), expected_lse(rows);
        std::vector<AttendStats> expected_stats(rows);
        AttendOutput to;
        to.output = expected.data();
        to.lse = expected_lse.data();
        to.stats = expected_stats.data();
        p.cpu.attend({in}, q.data(), to);
        const auto got = output.host(), got_lse = lse.host();
        const auto got_stats = stats.host();
        compared += p.identical;
        for (size_t r = 0; r < rows && p.identical; r++) {
            EXPECT_EQ(got_stats[r].keys_read, expected_stats[r].keys_read);
            EXPECT_NEAR(got_lse[r], expected_lse[r], 1e-3);
            for (int j = 0; j < c.d; j++) {
                EXPECT_NEAR(got[r * c.d + j], expected[r * c.d + j], 2e-2);
            }
        }
        // One more does not fit.
        ASSERT_EQ(cudaGraphLaunch(step, stream), cudaSuccess);
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        EXPECT_SENTENCE(p.device.check(), "append: an item of a batch outgrew");
        EXPECT_EQ(p.device.length(p.on_device), 1900);
        p.expect_same(p.on_cpu, p.on_device);
        p.device.reserve(p.on_device, 2000, stream);
        ASSERT_EQ(cudaGraphLaunch(step, stream), cudaSuccess);
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        p.cpu.append(p.on_cpu, p.host.view(1901));
        p.expect_same(p.on_cpu, p.on_device);
        cudaGraphExecDestroy(step);
        cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
    }
    EXPECT_GE(compared, 1); // keys between two cells are rare
}

void write_to_device(void* to, const void* from, size_t n) {
    ASSERT_EQ(cudaMemcpy(to, from, n, cudaMemcpyHostToDevice), cudaSuccess);
}

/// A step is an append and an attend, whatever launches it takes: the same lists
/// and, but for the order of sums, the same results.
TEST_F(GpuAdapter, AStepIsAppendThenAttend) {
    struct Step {
        QueryKind query;
        bool union_of_two, share_group;
        int q_len, heads_q;
        int64_t dense_below;
        int heads_kv = 2; ///< 4: more rows than processors, so blocks run in pairs
    };
    for (const Step& of : {
                 Step{QueryKind::quantizer, false, true, 1, 8, 0},
                 Step{QueryKind::classifier, true, true, 1, 6, 0},
                 Step{QueryKind::perceptron, false, true, 1, 6, 0},
                 Step{QueryKind::l2, false, true, 1, 8, 300},
                 Step{QueryKind::blend, false, true, 1, 8, 0},
                 Step{QueryKind::quantizer, false, false, 1, 8, 0},
                 Step{QueryKind::quantizer, false, true, 2, 8, 0},
                 Step{QueryKind::quantizer, false, true, 1, 16, 0, 4},
                 Step{QueryKind::perceptron, false, true, 1, 12, 300, 4}}) {
        AdapterCase c;
        c.name = "";
        c.query = of.query;
        c.union_of_two = of.union_of_two;
        c.share_group = of.share_group;
        c.q_len = of.q_len;
        c.heads_q = of.heads_q;
        c.heads_kv = of.heads_kv;
        c.dense_below = of.dense_below;
        c.layout = CacheLayout::paged;
        // Enough for teams of several rows; some begin without a far key.
        c.lengths = {400, 100, 101, 102, 230, 310, 380, 399, 400, 150,
                     160, 170, 180, 190, 200, 210, 220, 230, 240, 250,
                     260, 270, 280, 290, 300, 305, 315, 325, 335, 345,
                     355, 365, 375, 385, 395, 99};
        constexpr int64_t kSteps = 60;
        Random random;
        const CaseWorld world(c, random);
        std::vector<DeviceCache> caches;
        for (size_t s = 0; s < c.lengths.size(); s++) {
            caches.emplace_back(world.cache(s, random));
        }
        const OnDevice<char> queries(as_type(c.dtype, world.queries()));
        const size_t rows = queries.size() / 2 / c.d;
        std::vector<std::vector<float>> outputs, lses;
        std::vector<std::vector<std::vector<int32_t>>> lists;
        for (bool fused : {false, true}) {
            GpuAttentionAdapter adapter(world.params, world.partitions);
            std::vector<SequenceInput> batch;
            for (size_t s = 0; s < c.lengths.size(); s++) {
                SequenceInput in;
                in.sequence = adapter.create({}, 400);
                in.kv = caches[s].view(c.lengths[s]);
                in.q_len = c.lengths[s] - kSteps * c.q_len;
                if (in.q_len > 0) {
                    adapter.append(*adapter.plan({in}));
                }
                in.q_len = c.q_len;
                batch.push_back(in);
            }
            const auto plan = adapter.plan(batch);
            OnDevice<float> output(rows * c.d), lse(rows);
            OnDevice<AttendStats> stats(rows);
            AttendOutput out;
            out.output = output.data();
            out.lse = lse.data();
            out.stats = stats.data();
            const int64_t steps =
                    std::min(kSteps, *std::min_element(c.lengths.begin(), c.lengths.end()) / c.q_len);
            for (int64_t i = 0; i < steps; i++) {
                if (fused) {
                    adapter.step(*plan, queries.data(), out);
                } else {
                    adapter.append(*plan);
                    adapter.attend(*plan, queries.data(), out);
                }
            }
            outputs.push_back(output.host());
            lses.push_back(lse.host());
            adapter.check();
            lists.emplace_back();
            for (size_t s = 0; s < batch.size(); s++) {
                for (int h = 0; h < c.heads_kv; h++) {
                    for (int p = 0; p < adapter.npartition(batch[s].sequence, h); p++) {
                        for (auto& cell : adapter.lists(batch[s].sequence, h, p).slots) {
                            lists.back().push_back(std::move(cell));
                        }
                    }
                }
            }
        }
        int different = 0; // cells: rounding may decide between two
        for (size_t i = 0; i < lists[0].size(); i++) {
            different += lists[0][i] != lists[1][i];
        }
        ASSERT_LE(different, static_cast<int>(lists[0].size()) / 200);
        if (different == 0) {
            for (size_t i = 0; i < rows; i++) {
                ASSERT_NEAR(lses[0][i], lses[1][i], 1e-4) << i;
            }
            for (size_t i = 0; i < outputs[0].size(); i++) {
                ASSERT_NEAR(outputs[0][i], outputs[1][i], 1e-3) << i;
            }
        }
    }
}

/// A step finds the cells of keys that leave the window later. Where these are dropped and
/// others come in their place, in this sequence or a fork of it, theirs count.
void expect_steps_after_a_truncation_to_list_what_is_there(AdapterCase c) {
    c.lengths = {600};
    Pair p(c, 600);
    const OnDevice<char> queries(as_type(c.dtype, p.world.queries()));
    OnDevice<float> output(c.heads_q * c.d);
    AttendOutput out;
    out.output = output.data();
    const auto step_to = [&](int64_t to) {
        const auto plan = p.device.plan({p.input(1, p.n)});
        while (p.device.length(p.on_device) < to) {
            p.device.step(*plan, queries.data(), out);
        }
        p.cpu.append(p.on_cpu, p.host.view(to));
        p.expect_same(p.on_cpu, p.on_device);
    };
    // Other keys from a slot on.
    const auto replace_keys = [&](int64_t from) {
        const KvView view = p.host.view(p.n);
        const std::vector<char> before = p.host.k;
        const auto offset = [&](int h, int64_t slot) {
            return static_cast<const char*>(view.key(h, slot)) - p.host.k.data();
        };
        for (int64_t slot = from; slot < p.n; slot++) {
            for (int h = 0; h < c.heads_kv; h++) {
                const auto other = offset(h, p.random.below(p.n));
                std::copy_n(before.data() + other, 2 * c.d, p.host.k.data() + offset(h, slot));
            }
        }
        ASSERT_EQ(
                cudaMemcpy(
                        p.cache.k.data(),
                        p.host.k.data(),
                        p.host.k.size(),
                        cudaMemcpyHostToDevice),
                cudaSuccess);
    };
    p.append(c.window + 90);
    for (int round = 0; round < 9; round++) {
        const int64_t length = p.cpu.length(p.on_cpu) + 1 + p.random.below(5);
        step_to(length);
        if (round % 3 == 2) {
            p.on_cpu = p.cpu.fork(p.on_cpu);
            p.on_device = p.device.fork(p.on_device);
        } else if (round % 3 == 1) { // lists move
            p.device.reserve(p.on_device, 2 * p.n + round);
        }
        const int64_t left = length - p.random.below(c.window);
        p.cpu.truncate(p.on_cpu, left, p.host.view(left));
        p.device.truncate(p.on_device, left, p.cache.view(left));
        replace_keys(left);
        step_to(left + c.window + 3);
    }
    p.cpu.reset(p.on_cpu);
    p.device.reset(p.on_device);
    replace_keys(0);
    step_to(c.window + 40);
}

TEST_F(GpuAdapter, StepsAfterATruncationListWhatIsThereNow) {
    AdapterCase c;
    c.name = "";
    expect_steps_after_a_truncation_to_list_what_is_there(c);
    c.query = QueryKind::classifier; // blocks tell each other of its hidden layers
    c.width = 196;
    expect_steps_after_a_truncation_to_list_what_is_there(c);
    c.ncell = 1100; // so many that no part of them is empty
    expect_steps_after_a_truncation_to_list_what_is_there(c);
    c.d = 128;
    expect_steps_after_a_truncation_to_list_what_is_there(c);
    c.d = 96;
    c.heads_q = c.heads_kv = 1;
    expect_steps_after_a_truncation_to_list_what_is_there(c);
    c.d = 64;
    c.heads_q = c.heads_kv = 8;
    c.query = QueryKind::quantizer;
    c.bf16_centroids = true;
    c.window = 15; // too few keys for all parts
    expect_steps_after_a_truncation_to_list_what_is_there(c);
}

/// Rows of a step that cells are found ahead of.
struct RowsAhead {
    int d, heads_kv, sequences;
    int ncell = 24;
    bool bf16_centroids = false; ///< which come through shared memory
};

void PrintTo(const RowsAhead& r, std::ostream* out) {
    *out << "d" << r.d << "heads" << r.heads_kv << "cells" << r.ncell << "sequences"
         << r.sequences;
}

class GpuAdapterAhead : public GpuAdapter, public testing::WithParamInterface<RowsAhead> {};

/// In no step does anything wait for the search for a key's cell: a key that only this step
/// would find elsewhere is listed where it was.
TEST_P(GpuAdapterAhead, StepsKnowCellsBeforeTheyNeedThem) {
    cudaDeviceProp properties;
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    if (properties.major < 9) {
        GTEST_SKIP() << "without clusters of blocks, cells are found as they are needed";
    }
    const RowsAhead& rows = GetParam();
    if (rows.heads_kv * rows.sequences + 8 > 2 * properties.multiProcessorCount) {
        GTEST_SKIP() << "no blocks have room beside so many rows";
    }
    AdapterCase c;
    c.name = "";
    c.d = rows.d;
    c.heads_kv = rows.heads_kv;
    c.ncell = rows.ncell;
    c.bf16_centroids = rows.bf16_centroids;
    c.lengths = {600};
    c.sink = 0; // then the leaving slot is all that differs
    Pair p(c, 600);
    const OnDevice<char> queries(
            as_type(c.dtype, p.random.normal(rows.sequences * c.heads_q * c.d)));
    OnDevice<float> output(rows.sequences * c.heads_q * c.d);
    AttendOutput out;
    out.output = output.data();
    p.append(300);
    std::vector<SequenceInput> inputs = {p.input(1, p.n)};
    while (static_cast<int>(inputs.size()) < rows.sequences) {
        inputs.push_back(inputs[0]);
        inputs.back().sequence = p.device.fork(p.on_device);
    }
    const auto step = p.device.plan(inputs);
    const KvView view = p.host.view(p.n);
    for (int i = 0; i < 60; i++) {
        const int64_t leaving = p.device.length(p.on_device) - c.window;
        for (int h = 0; h < c.heads_kv && i >= 20; h++) {
            const char* key = static_cast<const char*>(view.key(h, leaving));
            std::vector<char> opposite(key, key + 2 * c.d);
            for (int j = 0; j < c.d; j++) {
                opposite[2 * j + 1] ^= static_cast<char>(0x80); // the sign
            }
            write_to_device(
                    p.cache.k.data() + (key - p.host.k.data()),
                    opposite.data(),
                    opposite.size());
        }
        p.device.step(*step, queries.data(), out);
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
    p.cpu.append(p.on_cpu, p.host.view(360));
    for (const SequenceInput& input : inputs) {
        p.expect_same(p.on_cpu, input.sequence);
    }
}

INSTANTIATE_TEST_SUITE_P(
        Rows,
        GpuAdapterAhead,
        testing::Values(
                RowsAhead{64, 2, 1},
                RowsAhead{96, 2, 1},
                RowsAhead{128, 2, 1},
                RowsAhead{64, 4, 9},
                RowsAhead{64, 4, 24}, // rows of two blocks that share processors
                RowsAhead{96, 4, 40}, // pairs of rows
                RowsAhead{128, 8, 31},
                RowsAhead{128, 2, 1, 600, true},
                RowsAhead{64, 4, 40, 1100, true},
                RowsAhead{96, 8, 16, 100, true},   // few blocks have room: two visits
                RowsAhead{128, 8, 32, 100, true}), // one visit
        testing::PrintToStringParamName());

/// Cells of later keys are sought over several steps, in which blocks share rows out
/// differently.
TEST_F(GpuAdapter, StepsInOtherBatchesListTheSame) {
    AdapterCase c;
    c.name = "";
    c.heads_kv = 4;
    c.ncell = 1100;
    c.bf16_centroids = true;
    c.lengths = {600};
    Pair p(c, 600);
    constexpr int kOthers = 63;
    const OnDevice<char> queries(
            as_type(c.dtype, p.random.normal((kOthers + 1) * c.heads_q * c.d)));
    OnDevice<float> output((kOthers + 1) * c.heads_q * c.d);
    AttendOutput out;
    out.output = output.data();
    p.append(300);
    std::vector<SequenceInput> inputs = {p.input(1, p.n)};
    for (int i = 0; i < kOthers; i++) {
        inputs.push_back(inputs[0]);
        inputs.back().sequence = p.device.create({}, 600);
    }
    std::vector<std::unique_ptr<gpu::GpuBatch>> batches;
    for (int n : {1, 2, 16, 24, 40, kOthers + 1}) {
        batches.push_back(p.device.plan({inputs.begin(), inputs.begin() + n}));
    }
    const gpu::GpuBatch* batch = batches[0].get();
    while (p.device.length(p.on_device) < p.n) {
        if (p.random.below(6) == 0) {
            batch = batches[p.random.below(batches.size())].get();
        }
        p.device.step(*batch, queries.data(), out);
    }
    p.cpu.append(p.on_cpu, p.host.view(p.n));
    p.expect_same(p.on_cpu, p.on_device);
}

/// A paged sequence of 600 tokens, and what a step of the next one takes.
struct PagedStep {
    Pair p;
    OnDevice<char> queries;
    OnDevice<float> output, lse;
    AttendOutput out;
    std::unique_ptr<gpu::GpuBatch> plan;

    static AdapterCase of(int64_t window) {
        AdapterCase c;
        c.name = "";
        c.layout = CacheLayout::paged;
        c.window = window;
        return c;
    }
    explicit PagedStep(int64_t window)
            : p(of(window), 700),
              queries(as_type(p.c.dtype, p.world.queries())),
              output(p.c.heads_q * p.c.d),
              lse(p.c.heads_q) {
        p.append(600);
        out.output = output.data();
        out.lse = lse.data();
        plan = p.device.plan({p.input(1, p.n)});
    }
    void step() {
        p.device.step(*plan, queries.data(), out);
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
    int32_t* page(int i) {
        return p.cache.pages.data() + i;
    }
};

/// Windows of steps that have far keys, and of those that have none.
class GpuAdapterWindows : public GpuAdapter, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Windows, GpuAdapterWindows, ::testing::Values(40, 1500));

TEST_P(GpuAdapterWindows, AStepThatIsRefusedChangesNothing) {
    PagedStep s(GetParam());
    Pair& p = s.p;
    const auto refused = [&](const char* sentence) {
        s.step();
        EXPECT_SENTENCE(p.device.check(), sentence);
        p.expect_same(p.on_cpu, p.on_device);
    };
    const KvView host = p.host.view(p.n);
    const std::vector<char> nan = as_type(p.c.dtype, {NAN, NAN});
    const auto refuse_key = [&](int slot) {
        const auto offset = static_cast<size_t>(
                static_cast<const char*>(host.key(1, slot)) - p.host.k.data());
        write_to_device(p.cache.k.data() + offset, nan.data(), 2);
        refused("append: a new key is not finite");
        write_to_device(p.cache.k.data() + offset, p.host.k.data() + offset, 2);
    };
    refuse_key(600);
    const int32_t hole = -1;
    const int page = 600 / CaseWorld::kPage;
    write_to_device(s.page(page), &hole, 4);
    refused("append: the page table names a page that is not there");
    write_to_device(s.page(page), &p.host.page_table[page], 4);
    s.step();
    p.device.check();
    p.append(601); // on the CPU alone
    p.expect_same(p.on_cpu, p.on_device);
    // Whichever step it is: some find the cells of keys that leave the window later.
    for (int n = 601; n < 612; n++) {
        refuse_key(n);
        s.step();
        p.device.check();
        p.append(n + 1);
        p.expect_same(p.on_cpu, p.on_device);
    }
    // Captured, beyond the reserve.
    p.append(700);
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    ASSERT_EQ(
            cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    p.device.step(*s.plan, s.queries.data(), s.out, nullptr, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_SENTENCE(p.device.check(), "append: an item of a batch outgrew");
    p.expect_same(p.on_cpu, p.on_device);
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

TEST_P(GpuAdapterWindows, AStepThatReadsAHoleAppendsAllTheSame) {
    PagedStep s(GetParam());
    Pair& p = s.p;
    const int page = 600 / CaseWorld::kPage - 1; // in the window, not the new token's
    const int32_t hole = -1;
    write_to_device(s.page(page), &hole, 4);
    // Until the hole is the next key to leave, and cells of keys in it would have been sought.
    int n = 600;
    for (; n - p.c.window < page * CaseWorld::kPage && n < 640; n++) {
        s.step();
        EXPECT_SENTENCE(
                p.device.check(), "attend: the page table names a page that is not there");
    }
    write_to_device(s.page(page), &p.host.page_table[page], 4);
    p.append(n); // on the CPU alone
    p.expect_same(p.on_cpu, p.on_device);
    for (; n < 660; n++) {
        s.step();
        p.device.check();
    }
    p.append(n);
    p.expect_same(p.on_cpu, p.on_device);
}

TEST_F(GpuAdapter, FaultsThatKernelsSeeChangeNothing) {
    AdapterCase c;
    c.name = "";
    c.layout = CacheLayout::paged;
    c.heads_q = 4;
    Pair p(c);
    p.append(600);
    const auto refused = [&](int64_t q_len, const char* sentence) {
        p.device.append(*p.device.plan({p.input(q_len, p.n)}));
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        EXPECT_SENTENCE(p.device.check(), sentence);
        p.device.check(); // once
        p.expect_same(p.on_cpu, p.on_device);
    };
    // A key that is not finite, in the last slot of the chunk.
    const KvView host = p.host.view(p.n);
    const auto offset = static_cast<size_t>(
            static_cast<const char*>(host.key(1, 700)) - p.host.k.data());
    const std::vector<char> nan = as_type(c.dtype, {NAN, NAN});
    ASSERT_EQ(
            cudaMemcpy(
                    p.cache.k.data() + offset, nan.data(), 2, cudaMemcpyHostToDevice),
            cudaSuccess);
    refused(101, "append: a new key is not finite");
    ASSERT_EQ(
            cudaMemcpy(
                    p.cache.k.data() + offset,
                    p.host.k.data() + offset,
                    2,
                    cudaMemcpyHostToDevice),
            cudaSuccess);
    // Holes in the page table.
    for (int32_t hole : {-1, static_cast<int32_t>(p.host.npages)}) {
        int32_t* entry = p.cache.pages.data() + 650 / CaseWorld::kPage;
        ASSERT_EQ(
                cudaMemcpy(entry, &hole, 4, cudaMemcpyHostToDevice), cudaSuccess);
        refused(101, "append: the page table names a page that is not there");
        ASSERT_EQ(
                cudaMemcpy(
                        entry,
                        &p.host.page_table[650 / CaseWorld::kPage],
                        4,
                        cudaMemcpyHostToDevice),
                cudaSuccess);
    }
    p.append(p.n);
    p.expect_same(p.on_cpu, p.on_device);

    const auto plan = p.device.plan({p.input(1, p.n)});
    const size_t rows = c.heads_q;
    OnDevice<float> output(rows * c.d), lse(rows);
    AttendOutput out;
    out.output = output.data();
    out.lse = lse.data();
    const OnDevice<char> queries(as_type(c.dtype, p.world.queries()));
    const OnDevice<char> bad(
            as_type(c.dtype, std::vector<float>(rows * c.d, NAN)));
    p.device.attend(*plan, bad.data(), out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_SENTENCE(p.device.check(), "route: the query assigner gives a score");

    // Cells that are not there, and too many of them.
    GpuProbedCells probed;
    probed.stride = 4;
    std::vector<int32_t> cells = {0, 3, c.ncell, -1, 5, 5, 5, 5};
    OnDevice<int32_t> d_cells(cells), count(std::vector<int32_t>{4, 4});
    probed.cells = d_cells.data();
    probed.count = count.data();
    OnDevice<AttendStats> stats(rows);
    out.stats = stats.data();
    p.device.attend_preassigned(*plan, queries.data(), probed, out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_SENTENCE(p.device.check(), "attend_preassigned: a probed cell");
    EXPECT_EQ(stats.host()[0].cells, 2);
    EXPECT_EQ(stats.host()[rows - 1].cells, 1); // named four times
    OnDevice<int32_t> too_many(std::vector<int32_t>{5, -1});
    probed.count = too_many.data();
    p.device.attend_preassigned(*plan, queries.data(), probed, out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_SENTENCE(p.device.check(), "attend_preassigned: a probed cell");
    // All is well afterwards.
    p.device.attend(*plan, queries.data(), out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    p.device.check();
    for (float x : output.host()) {
        EXPECT_TRUE(std::isfinite(x));
    }
}

TEST_F(GpuAdapter, OutOfMemoryLeavesAllAsItWas) {
    AdapterCase c;
    c.name = "";
    c.heads_q = c.heads_kv = 512;
    c.ncell = 2;
    c.lengths = {100};
    Pair p(c);
    p.append(100);
    // Lists of 16 partitions for the most tokens: 360 GB, which no device has.
    constexpr int64_t kMost = int64_t(1) << 22;
    HeadPartitions own = p.world.partitions;
    for (auto& head : own) {
        head = std::vector<Partition>(15, head[0]);
    }
    const int64_t wide = p.device.create(own, 64);
    const auto free_memory = [] {
        size_t bytes = 0, total = 0;
        cudaMemPool_t pool = nullptr;
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        EXPECT_EQ(cudaDeviceGetMemPool(&pool, 0), cudaSuccess);
        EXPECT_EQ(cudaMemPoolTrimTo(pool, 0), cudaSuccess);
        EXPECT_EQ(cudaMemGetInfo(&bytes, &total), cudaSuccess);
        return bytes;
    };
    const size_t free_before = free_memory(), held = p.device.bytes_used();
    EXPECT_SENTENCE(p.device.create(own, kMost), "out of memory");
    EXPECT_SENTENCE(p.device.reserve(wide, kMost), "out of memory");
    p.expect_same(p.on_cpu, p.on_device);
    // Nothing has leaked: there is as much room as before.
    EXPECT_GE(free_memory() + (size_t(64) << 20), free_before);
    EXPECT_EQ(p.device.bytes_used(), held);
    p.device.reserve(wide, 100);
    SequenceInput in = p.input(100, 100);
    in.sequence = wide;
    p.device.append(*p.device.plan({in}));
    p.expect_same(p.on_cpu, wide);
}

TEST_F(GpuAdapter, RefusesWithASentence) {
    AdapterCase c;
    c.name = "";
    Pair p(c);
    const auto with = [&](auto change) {
        SequenceInput in = p.input(1, p.n);
        change(in);
        p.device.plan({in});
    };
    EXPECT_SENTENCE(with([](auto& in) { in.sequence = 77; }), "sequence = 77");
    EXPECT_SENTENCE(with([](auto& in) { in.q_len = -1; }), "q_len = -1");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.dtype = DType::float32; }), "float32");
    EXPECT_SENTENCE(with([](auto& in) { in.kv.heads = 3; }), "kv.heads = 3");
    EXPECT_SENTENCE(with([](auto& in) { in.kv.d = 32; }), "kv.d = 32");
    EXPECT_SENTENCE(with([](auto& in) { in.kv.d_v = 32; }), "kv.d_v = 32");
    EXPECT_SENTENCE(with([](auto& in) { in.kv.k = nullptr; }), "kv.k is null");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.k_token_stride++; }), "kv.k_token_stride");
    const int64_t position = 0;
    EXPECT_SENTENCE(
            with([&](auto& in) { in.positions = &position; }), "positions");
    EXPECT_SENTENCE(
            p.device.plan({p.input(1, p.n), p.input(1, p.n)}), "twice");
    EXPECT_SENTENCE(p.device.create({}, 0), "reserve = 0");
    EXPECT_SENTENCE(p.device.create({}, int64_t(1) << 40), "reserve = ");
    EXPECT_SENTENCE(p.device.truncate(p.on_device, -1, p.cache.view(0)), "length = -1");
    EXPECT_SENTENCE(p.device.truncate(p.on_device, 1, p.cache.view(1)), "length = 1");
    const auto prefill = p.device.plan({p.input(100, p.n)});
    AttendOutput out;
    alignas(16) float x = 0;
    out.output = &x;
    EXPECT_SENTENCE(p.device.attend(*prefill, &x, out), "q_len = 100");
    const auto plan = p.device.plan({p.input(1, 0)});
    EXPECT_SENTENCE(p.device.append(*plan), "kv.length = 0");
    out.output = nullptr;
    EXPECT_SENTENCE(p.device.attend(*plan, &x, out), "output is null");
    p.device.free(p.on_device);
    EXPECT_SENTENCE(p.device.append(*plan), "was freed");

    AdapterParams odd = p.world.params;
    odd.d = 80;
    EXPECT_SENTENCE(GpuAttentionAdapter(odd, HeadPartitions()), "d = 80");
    odd = p.world.params;
    odd.heads_q = 34;
    EXPECT_SENTENCE(GpuAttentionAdapter(odd, HeadPartitions()), "at most 16");
    EXPECT_SENTENCE(
            GpuAttentionAdapter(p.world.params, HeadPartitions(), 99), "device = 99");
}

} // namespace
} // namespace faiss_saap::tests
