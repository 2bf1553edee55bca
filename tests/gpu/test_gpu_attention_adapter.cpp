#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include <numeric>

#include "../adapter_cases.h"
#include "device_test.h"

namespace faiss_saap::tests {
namespace {

using gpu::GpuAttentionAdapter;
using gpu::GpuBatch;
using gpu::GpuProbedCells;

/// Caches on the device.
struct DeviceCache {
    CaseWorld::Cache host;
    OnDevice<char> k, v;
    OnDevice<int32_t> pages;

    explicit DeviceCache(CaseWorld::Cache from)
            : host(std::move(from)), k(host.k), v(host.v), pages(host.page_table) {}
    KvView view(int64_t length) const {
        return host.view(k.data(), v.data(), pages.data(), length);
    }
};

std::vector<char> as_type(DType type, const std::vector<float>& x) {
    std::vector<char> bytes(x.size() * 2);
    from_float(type, x.data(), static_cast<int64_t>(x.size()), bytes.data());
    return bytes;
}

/// Rows of cells as ProbedCells has them.
ProbedCells to_host(const GpuProbedCells& probed, int64_t rows) {
    std::vector<int32_t> cells(rows * probed.stride), count(rows);
    EXPECT_EQ(
            cudaMemcpy(
                    cells.data(), probed.cells, cells.size() * 4, cudaMemcpyDeviceToHost),
            cudaSuccess);
    EXPECT_EQ(
            cudaMemcpy(
                    count.data(), probed.count, count.size() * 4, cudaMemcpyDeviceToHost),
            cudaSuccess);
    ProbedCells host;
    host.share_group = probed.share_group;
    host.begin.push_back(0);
    for (int64_t r = 0; r < rows; r++) {
        const auto first = cells.begin() + r * probed.stride;
        host.cells.insert(host.cells.end(), first, first + count[r]);
        host.begin.push_back(static_cast<int64_t>(host.cells.size()));
    }
    return host;
}

CaseResult run_on_device(const CaseWorld& world, Random& random) {
    const AdapterCase& c = world.c;
    GpuAttentionAdapter adapter(world.params, world.partitions);
    std::vector<DeviceCache> caches;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        caches.emplace_back(world.cache(s, random));
    }
    CaseResult result;
    std::vector<SequenceInput> batch;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        SequenceInput in;
        in.sequence = adapter.create({}, 64); // grows
        in.kv = caches[s].view(c.lengths[s]);
        for (int64_t n = 0; n < c.lengths[s]; n += in.q_len) {
            in.q_len = n < c.chunk ? std::min(c.chunk, c.lengths[s] - n) : 1;
            adapter.append(*adapter.plan({in}));
        }
        in.q_len = std::min<int64_t>(c.q_len, c.lengths[s]);
        batch.push_back(in);
        EXPECT_EQ(adapter.length(in.sequence), c.lengths[s]);
        result.slots.emplace_back();
        for (int h = 0; h < c.heads_kv; h++) {
            result.slots.back().emplace_back();
            for (int p = 0; p < adapter.npartition(in.sequence, h); p++) {
                result.slots.back().back().push_back(
                        adapter.lists(in.sequence, h, p).slots);
            }
        }
    }
    const OnDevice<char> queries(as_type(c.dtype, world.queries()));
    const size_t rows = queries.size() / 2 / c.d;
    OnDevice<float> output(rows * c.d), lse(rows);
    OnDevice<AttendStats> stats(rows);
    const auto plan = adapter.plan(batch);
    const int64_t choices = c.share_group ? c.heads_q / c.heads_kv : 1;
    const auto choice_rows = static_cast<int64_t>(rows) / choices;
    GpuProbedCells probed;
    probed.share_group = c.share_group;
    probed.stride = plan->cells() + 3;
    OnDevice<int32_t> cells(choice_rows * probed.stride), count(choice_rows);
    probed.cells = cells.data();
    probed.count = count.data();
    adapter.route(*plan, queries.data(), probed);
    AttendOutput out;
    out.output = output.data();
    out.lse = lse.data();
    out.stats = stats.data();
    adapter.attend_preassigned(*plan, queries.data(), probed, out);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    adapter.check();
    result.probed = to_host(probed, choice_rows);
    result.output = output.host();
    result.lse = lse.host();
    result.stats = stats.host();

    // Both halves in one call are the same.
    OnDevice<float> again(rows * c.d);
    out.output = again.data();
    out.lse = nullptr;
    out.stats = nullptr;
    adapter.attend(*plan, queries.data(), out);
    EXPECT_EQ(again.host(), result.output);
    return result;
}

class GpuAdapterCases : public DeviceTest,
                        public ::testing::WithParamInterface<AdapterCase> {};

TEST_P(GpuAdapterCases, EqualTheCpu) {
    Random random;
    const CaseWorld world(GetParam(), random);
    const AdapterCase& c = GetParam();
    const CaseResult got = run_on_device(world, random);
    check_case(world, got, c.dtype == DType::float16 ? 2e-3 : 1e-2, 1e-3);
    const CaseResult cpu = run_on_cpu(world, random);
    // Keys as near to one cell as to another may lie in either.
    size_t same = 0, all = 0;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        for (int h = 0; h < c.heads_kv; h++) {
            for (size_t p = 0; p < cpu.slots[s][h].size(); p++) {
                for (int cell = 0; cell < c.ncell; cell++) {
                    const auto &x = cpu.slots[s][h][p][cell],
                               &y = got.slots[s][h][p][cell];
                    std::vector<int32_t> both;
                    std::set_intersection(
                            x.begin(),
                            x.end(),
                            y.begin(),
                            y.end(),
                            std::back_inserter(both));
                    same += both.size();
                    all += x.size();
                }
            }
        }
    }
    EXPECT_GE(same, all - all / 1000);
    if (same < all) {
        return; // other lists, other choices
    }
    ASSERT_EQ(got.probed.begin.size(), cpu.probed.begin.size());
    size_t rows_alike = 0;
    for (size_t r = 0; r + 1 < cpu.probed.begin.size(); r++) {
        const auto row = [&](const ProbedCells& p) {
            return std::vector<int32_t>(
                    p.cells.begin() + p.begin[r], p.cells.begin() + p.begin[r + 1]);
        };
        rows_alike += row(got.probed) == row(cpu.probed);
    }
    // Scores that rounding may swap are rare among random ones.
    const size_t rows = cpu.probed.begin.size() - 1;
    EXPECT_GE(rows_alike, rows - rows / 20 - 1) << rows;
    if (rows_alike == rows) {
        const double tolerance = c.dtype == DType::float16 ? 2e-3 : 1e-2;
        for (size_t i = 0; i < cpu.lse.size(); i++) {
            if (cpu.lse[i] > -INFINITY) {
                EXPECT_NEAR(got.lse[i], cpu.lse[i], 1e-3);
            }
        }
        for (size_t i = 0; i < cpu.output.size(); i++) {
            EXPECT_NEAR(got.output[i], cpu.output[i], 4 * tolerance);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
        Table,
        GpuAdapterCases,
        ::testing::ValuesIn(adapter_cases()),
        [](const auto& info) { return std::to_string(info.index); });

/// A world of one sequence, on the CPU and on the device.
struct Pair {
    AdapterCase c;
    Random random;
    CaseWorld world;
    CaseWorld::Cache host;
    DeviceCache cache;
    AttentionAdapter cpu;
    GpuAttentionAdapter device;
    int64_t on_cpu, on_device;
    int64_t n;
    bool identical = true; ///< all lists that were compared

    explicit Pair(AdapterCase of, int64_t reserve = 64)
            : c(of),
              world(c, random),
              host(world.cache(0, random)),
              cache(host),
              cpu(world.params, world.partitions),
              device(world.params, world.partitions),
              on_cpu(cpu.create()),
              on_device(device.create({}, reserve)),
              n(c.lengths[0]) {}

    SequenceInput input(int64_t q_len, int64_t capacity) const {
        SequenceInput in;
        in.sequence = on_device;
        in.kv = cache.view(capacity);
        in.q_len = q_len;
        return in;
    }
    void append(int64_t to) {
        cpu.append(on_cpu, host.view(to));
        const int64_t more = to - device.length(on_device);
        device.append(*device.plan({input(more, to)}));
    }
    /// The same lists and means, of these sequences, but for keys so near to two
    /// cells that rounding decides.
    void expect_same(int64_t a, int64_t b) {
        ASSERT_EQ(cpu.length(a), device.length(b));
        device.check();
        for (int h = 0; h < c.heads_kv; h++) {
            for (int p = 0; p < cpu.npartition(a, h); p++) {
                const CellLists& x = cpu.lists(a, h, p);
                const gpu::GpuListsCopy y = device.lists(b, h, p);
                int different = 0;
                std::vector<int32_t> all;
                const CellStats stats = x.stats();
                for (int cell = 0; cell < x.ncell(); cell++) {
                    all.insert(
                            all.end(), y.slots[cell].begin(), y.slots[cell].end());
                    if (x.slots(cell) != y.slots[cell]) {
                        different++;
                        continue;
                    }
                    // An empty cell's mean is nobody's.
                    for (int j = 0; stats.count[cell] && !y.means.empty() && j < c.d;
                         j++) {
                        const int i = cell * c.d + j;
                        ASSERT_NEAR(y.means[i], stats.mean_post_rope[i], 1e-5);
                    }
                }
                std::sort(all.begin(), all.end());
                ASSERT_EQ(static_cast<int64_t>(all.size()), x.size());
                for (size_t i = 0; i < all.size(); i++) {
                    ASSERT_EQ(all[i], c.sink + static_cast<int64_t>(i));
                }
                ASSERT_LE(different, 4);
                identical = identical && different == 0;
            }
        }
    }
};

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

TEST_F(GpuAdapter, MergesIntoTheCallersResult) {
    AdapterCase c;
    c.name = "";
    Pair p(c);
    p.append(p.n);
    const auto plan = p.device.plan({p.input(1, p.n)});
    const OnDevice<char> queries(as_type(c.dtype, p.world.queries()));
    OnDevice<float> output(c.heads_q * c.d), lse(c.heads_q);
    AttendOutput out;
    out.output = output.data();
    out.lse = lse.data();
    p.device.attend(*plan, queries.data(), out);
    const auto once = output.host(), once_lse = lse.host();
    out.merge = true; // with itself: the same output, twice the sum
    p.device.attend(*plan, queries.data(), out);
    const auto twice = output.host(), twice_lse = lse.host();
    for (size_t i = 0; i < once.size(); i++) {
        EXPECT_NEAR(once[i], twice[i], 1e-5);
    }
    for (size_t i = 0; i < once_lse.size(); i++) {
        EXPECT_NEAR(once_lse[i] + std::log(2.0f), twice_lse[i], 1e-5);
    }
}

/// A captured step, replayed while the sequence grows to 1,000 tokens more, is
/// what the CPU does; beyond its reserve it writes nothing and says so.
TEST_F(GpuAdapter, ReplaysAGraphWhileItGrows) {
    int compared = 0;
    for (int round = 0; round < 4; round++) {
        const bool blend = round % 2;
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
        p.device.append(*plan, stream);
        p.device.attend(*plan, queries.data(), out, nullptr, stream);
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
    c.heads_q = c.heads_kv = 64;
    c.lengths = {200};
    Pair p(c);
    p.append(200);
    size_t free_before = 0, total = 0;
    ASSERT_EQ(cudaMemGetInfo(&free_before, &total), cudaSuccess);
    std::vector<int64_t> made;
    bool threw = false;
    for (int i = 0; i < 200 && !threw; i++) { // some GiB each
        try {
            made.push_back(p.device.create({}, int64_t(1) << 22));
        } catch (const faiss::FaissException& e) {
            threw = true;
            EXPECT_NE(std::string(e.what()).find("out of memory"), std::string::npos);
        }
    }
    EXPECT_TRUE(threw);
    EXPECT_ANY_THROW(p.device.reserve(p.on_device, int64_t(1) << 22));
    p.expect_same(p.on_cpu, p.on_device);
    for (int64_t s : made) {
        p.device.free(s);
    }
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const int64_t more = p.device.create({}, 1 << 20); // there is room again
    p.device.free(more);
    p.expect_same(p.on_cpu, p.on_device);
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
