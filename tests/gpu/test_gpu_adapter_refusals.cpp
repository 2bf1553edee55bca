// What GpuAttentionAdapter does not do is refused with a sentence, and nothing
// changes.
#include <cstdlib>
#include <iostream>

#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/SegmentedAssigner.h>

#include "device_adapter.h"

namespace faiss_saap::tests {
namespace {

constexpr int kD = 64;

/// A QuantizerAssigner over an index of so many random vectors.
template <class Index>
std::shared_ptr<const CellAssigner> assigner(
        Random& random,
        std::shared_ptr<Index> index,
        int ncell) {
    index->add(ncell, random.normal(size_t(ncell) * kD).data());
    return std::make_shared<QuantizerAssigner>(index, NEEDS_POST_ROPE);
}

class GpuAdapterRefusals : public DeviceTest {
   protected:
    static AdapterCase quiet() {
        AdapterCase c;
        c.name = "";
        c.layout = CacheLayout::paged;
        c.lengths = {300};
        return c;
    }
};

TEST_F(GpuAdapterRefusals, Partitions) {
    Pair p(quiet());
    p.append(300);
    Random& random = p.random;
    const auto flat = [&](int ncell) {
        return assigner(random, std::make_shared<faiss::IndexFlatL2>(kD), ncell);
    };
    const auto graph = [&](int ncell) {
        return assigner(
                random, std::make_shared<faiss::IndexHNSWFlat>(kD, 8), ncell);
    };
    const auto with = [&](std::shared_ptr<const CellAssigner> key,
                          std::shared_ptr<const CellAssigner> query,
                          int copies = 1) {
        Partition partition;
        partition.key = std::move(key);
        partition.query = std::move(query);
        partition.rope = p.world.rope;
        const std::vector<Partition> head(copies, partition);
        p.device.create(HeadPartitions(p.c.heads_kv, head));
    };
    const size_t held = p.device.bytes_used();
    EXPECT_SENTENCE(with(graph(20), flat(20)), "the key assigner of KV head 0");
    EXPECT_SENTENCE(with(flat(20), graph(20)), "the query assigner of KV head 0");
    const auto cut = std::make_shared<SegmentedAssigner>(flat(20), 100, 2);
    EXPECT_SENTENCE(
            with(cut, std::make_shared<CellMeanAssigner>(kD, 40)),
            "the key assigner of KV head 0");
    const auto many = flat(8193);
    EXPECT_SENTENCE(with(many, many), "8193 cells");
    const auto few = flat(3);
    EXPECT_SENTENCE(with(few, few, 16), "has 17 partitions"); // and the adapter's
    const auto classifier = [&](int group) {
        ClassifierShape shape;
        shape.d = kD, shape.ncell = 3, shape.group = group, shape.width = 8, shape.depth = 1;
        return std::make_shared<QueryClassifier>(
                shape, random.normal(parameter_count(shape)).data());
    };
    EXPECT_SENTENCE(
            with(few, classifier(3)),
            "a query assigner for 3 query heads, the adapter has heads_q / heads_kv = 4");
    EXPECT_SENTENCE(
            with(few, classifier(1)),
            "a classifier for 1 query heads cannot serve a group of 4");
    EXPECT_SENTENCE(
            GpuAttentionAdapter(p.world.params, HeadPartitions()).create(),
            "KV head 0 has no partition");
    AdapterParams coded = p.world.params;
    coded.key_codes = true;
    EXPECT_SENTENCE(GpuAttentionAdapter(coded, HeadPartitions()), "key_codes = true");
    EXPECT_EQ(p.device.bytes_used(), held);
    p.expect_same(p.on_cpu, p.on_device);
}

TEST_F(GpuAdapterRefusals, Views) {
    Pair p(quiet());
    p.append(300);
    const auto with = [&](auto change) {
        SequenceInput in = p.input(1, 300);
        change(in);
        p.device.plan({in});
    };
    const auto shifted = [](const void* pointer) {
        return static_cast<const char*>(pointer) + 2;
    };
    EXPECT_SENTENCE(with([&](auto& in) { in.kv.k = shifted(in.kv.k); }), "kv.k = ");
    EXPECT_SENTENCE(with([&](auto& in) { in.kv.v = shifted(in.kv.v); }), "kv.v = ");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.v_token_stride++; }), "kv.v_token_stride");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.k_head_stride++; }), "kv.k_head_stride");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.v_head_stride++; }), "kv.v_head_stride");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.k_page_stride++; }), "kv.k_page_stride");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.v_page_stride++; }), "kv.v_page_stride");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.k_page_stride = int64_t(1) << 32; }),
            "kv.k spans");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.v_page_stride = int64_t(1) << 32; }),
            "kv.v spans");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.k_token_stride = -64; }),
            "kv.k has strides of -64,");
    EXPECT_SENTENCE(
            with([](auto& in) { in.kv.v_page_stride = -1024; }), "must not be negative");
    EXPECT_SENTENCE( // a product beyond 64 bits
            with([](auto& in) { in.kv.k_page_stride = INT64_MAX / 8 * 8; }),
            "kv.k spans");
    EXPECT_SENTENCE(with([](auto& in) { in.q_len = int64_t(1) << 40; }), "q_len = ");
    SequenceInput other = p.input(1, 300);
    other.sequence = p.device.create({}, 1);
    other.kv.dtype = DType::float16;
    EXPECT_SENTENCE(
            p.device.plan({p.input(1, 300), other}), "that of the batch's first");
    std::vector<SequenceInput> crowd;
    for (int i = 0; i < 140; i++) { // of 512 rows each
        SequenceInput in = p.input(64, 300);
        in.sequence = p.device.create({}, 1);
        crowd.push_back(in);
    }
    EXPECT_SENTENCE(p.device.plan(crowd), "one launch numbers 65535");
    EXPECT_SENTENCE(
            p.device.truncate(p.on_device, 200, p.cache.view(199)),
            "kv.length = 199, 200 tokens are needed");
    p.expect_same(p.on_cpu, p.on_device);
}

TEST_F(GpuAdapterRefusals, Calls) {
    AdapterCase two = quiet();
    two.union_of_two = true;
    Pair p(two);
    p.append(300);
    const size_t rows = p.c.heads_q;
    const auto plan = p.device.plan({p.input(1, 300)});
    const OnDevice<char> queries(as_type(p.c.dtype, p.world.queries()));
    const OnDevice<float> output(rows * kD + 4), lse(rows);
    AttendOutput out;
    out.output = output.data();
    const auto attend = [&](const void* q,
                            const AttendOutput& to,
                            const ProbePolicy* policy = nullptr) {
        p.device.attend(*plan, q, to, policy);
    };
    EXPECT_SENTENCE(attend(nullptr, out), "queries is null");
    GpuAttentionAdapter another(p.world.params, p.world.partitions);
    another.create(); // of the same number
    EXPECT_SENTENCE(another.append(*plan), "planned by another adapter");
    EXPECT_SENTENCE(
            another.step(*plan, queries.data(), out), "planned by another adapter");
    EXPECT_SENTENCE(attend(queries.data() + 2, out), "queries = ");
    AttendOutput bad = out;
    bad.output++;
    EXPECT_SENTENCE(attend(queries.data(), bad), "output = ");
    bad.output = nullptr;
    EXPECT_SENTENCE(attend(queries.data(), bad), "output is null");
    bad = out;
    bad.merge = true;
    EXPECT_SENTENCE(attend(queries.data(), bad), "lse is null");
    ProbePolicy policy;
    policy.nprobe = 0;
    EXPECT_SENTENCE(attend(queries.data(), out, &policy), "policy.nprobe = 0");
    policy.nprobe = 1;
    policy.split = {0.5, 0.3, 0.2};
    EXPECT_SENTENCE(
            attend(queries.data(), out, &policy), "policy.split has 3 shares");
    policy.split.clear();
    policy.head_split = {{0.5, 0.5}, {0.5, 0.5}};
    EXPECT_SENTENCE(attend(queries.data(), out, &policy), "policy.head_split");
    EXPECT_SENTENCE(
            p.device.step(*plan, queries.data(), out, &policy), "policy.head_split");
    policy.head_split.clear();
    policy.refine = 6;
    EXPECT_SENTENCE(attend(queries.data(), out, &policy), "policy.refine = 6");
    EXPECT_SENTENCE(
            p.device.step(*plan, queries.data(), out, &policy), "policy.refine = 6");
    policy.refine = 1;
    policy.share_group = false;

    OnDevice<int32_t> cells(rows * 100), count(rows);
    GpuProbedCells probed;
    probed.stride = 100;
    probed.cells = cells.data();
    probed.count = count.data();
    const auto route = [&](const GpuProbedCells& to) {
        p.device.route(*plan, queries.data(), to);
    };
    EXPECT_SENTENCE(
            p.device.route(*plan, queries.data(), probed, &policy),
            "probed.share_group = 1");
    EXPECT_SENTENCE(p.device.route(*plan, nullptr, probed), "queries is null");
    GpuProbedCells wrong = probed;
    wrong.stride = p.c.ncell - 1;
    EXPECT_SENTENCE(route(wrong), "probed.stride = 23");
    wrong = probed;
    wrong.cells = nullptr;
    EXPECT_SENTENCE(route(wrong), "probed.cells is null");
    EXPECT_SENTENCE(
            p.device.attend_preassigned(*plan, queries.data(), wrong, out),
            "probed.cells is null");
    wrong = probed;
    wrong.count = nullptr;
    EXPECT_SENTENCE(route(wrong), "probed.count is null");
    EXPECT_SENTENCE(
            p.device.attend_preassigned(*plan, queries.data(), wrong, out),
            "probed.count is null");
    wrong = probed;
    wrong.stride = 0;
    EXPECT_SENTENCE(
            p.device.attend_preassigned(*plan, queries.data(), wrong, out),
            "probed.stride = 0");

    EXPECT_SENTENCE(p.device.lists(p.on_device, 2), "kv_head = 2");
    EXPECT_SENTENCE(p.device.lists(p.on_device, 0, 2), "partition = 2");
    EXPECT_SENTENCE(p.device.npartition(p.on_device, -1), "kv_head = -1");
    EXPECT_SENTENCE(p.device.reserve(p.on_device, 0), "reserve = 0");
    EXPECT_SENTENCE(p.device.fork(99), "sequence = 99");
    EXPECT_SENTENCE(p.device.free(99), "sequence = 99");
    EXPECT_SENTENCE(p.device.reset(99), "sequence = 99");
    EXPECT_SENTENCE(p.device.reserve(99, 1), "sequence = 99");
    EXPECT_SENTENCE(p.device.length(99), "sequence = 99");
    EXPECT_SENTENCE(
            p.device.truncate(99, 0, p.cache.view(1)), "sequence = 99");
    p.expect_same(p.on_cpu, p.on_device);
    attend(queries.data(), out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    p.device.check();
}

TEST(GpuDevice, TooOldIsRefusedWithASentence) {
    gpu::DeviceInfo info;
    info.name = "Tesla T4";
    info.major = 7, info.minor = 5;
    EXPECT_SENTENCE(
            gpu::require_capability(1, info),
            "device = 1 (Tesla T4) has compute capability 7.5, faiss_saap needs 8.0");
    info.major = 8, info.minor = 0;
    gpu::require_capability(0, info);
    info.major = 12;
    gpu::require_capability(0, info);
}

/// Ends a death test's process, which keeps its failures to itself: their words go
/// where its parent looks.
[[noreturn]] void exit_saying_what_failed() {
    const ::testing::TestResult& result =
            *::testing::UnitTest::GetInstance()->current_test_info()->result();
    for (int i = 0; i < result.total_part_count(); i++) {
        const ::testing::TestPartResult& part = result.GetTestPartResult(i);
        std::cerr << part.file_name() << ':' << part.line_number() << ": Failure\n"
                  << part.message() << std::endl;
    }
    std::exit(result.Failed() ? 1 : 0);
}

/// In a process of its own: what a wild pointer leaves behind cannot be undone.
using GpuAdapterDeathTest = GpuAdapterRefusals;

TEST_F(GpuAdapterDeathTest, SaysThatTheContextIsLost) {
    ::testing::FLAGS_gtest_death_test_style = "threadsafe";
    const auto lose = [] {
        {
            Pair p(quiet());
            p.append(300);
            SequenceInput wild = p.input(1, 300);
            wild.kv.k = reinterpret_cast<const void*>(16);
            wild.kv.page_table = nullptr;
            wild.sequence = p.device.create();
            const auto plan = p.device.plan({wild});
            p.device.append(*plan);
            const cudaError_t fault = cudaDeviceSynchronize();
            SCOPED_TRACE(cudaGetErrorName(fault)); // which one, is the driver's choice
            EXPECT_NE(fault, cudaSuccess);
            EXPECT_SENTENCE(p.device.check(), "context is lost");
            EXPECT_SENTENCE(p.device.append(*plan), "context is lost");
            EXPECT_SENTENCE(p.device.create(), "context is lost");
            EXPECT_SENTENCE(p.device.fork(p.on_device), "context is lost");
            alignas(16) char query[16] = {};
            AttendOutput out;
            alignas(16) float x = 0;
            out.output = &x;
            EXPECT_SENTENCE(p.device.attend(*plan, query, out), "context is lost");
        } // all is torn down without a word
        exit_saying_what_failed();
    };
    EXPECT_EXIT(lose(), ::testing::ExitedWithCode(0), "");
}

} // namespace
} // namespace faiss_saap::tests
