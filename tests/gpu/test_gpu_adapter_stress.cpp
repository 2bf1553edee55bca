// GpuAttentionAdapter under load: shapes nobody chose, long sequences, many
// streams.
#include <thread>

#include "device_adapter.h"

namespace faiss_saap::tests {
namespace {

class GpuAdapterStress : public DeviceTest {};

TEST_F(GpuAdapterStress, RandomShapesEqualTheCpu) {
    Random random;
    std::printf("FAISS_SAAP_SEED=%u\n", random.seed);
    for (int round = 0; round < 12; round++) {
        const AdapterCase c = random_case(random);
        SCOPED_TRACE(c);
        expect_equal_to_the_cpu(CaseWorld(c, random), random);
        ASSERT_FALSE(HasFailure());
    }
}

/// 100,000 tokens, one at a time, whose lists grow as they come; then as many
/// replays of a graph.
TEST_F(GpuAdapterStress, AppendsAHundredThousandTokens) {
    constexpr int64_t kTokens = 100000;
    AdapterCase c;
    c.name = "";
    c.heads_q = c.heads_kv = 1;
    c.ncell = 50;
    c.lengths = {kTokens};
    Pair p(c);
    p.cpu.append(p.on_cpu, p.host.view(kTokens));
    const auto expect_lists_of_the_cpu = [&](int64_t sequence) {
        p.device.check();
        ASSERT_EQ(p.device.length(sequence), kTokens);
        const auto slots = p.device.lists(sequence, 0).slots;
        const CellLists& expected = p.cpu.lists(p.on_cpu, 0);
        int64_t listed = 0, elsewhere = 0;
        for (int cell = 0; cell < c.ncell; cell++) {
            ASSERT_TRUE(std::is_sorted(slots[cell].begin(), slots[cell].end()));
            for (int32_t slot : slots[cell]) {
                listed++;
                elsewhere += expected.cell_of(slot) != cell;
            }
        }
        EXPECT_EQ(listed, kTokens - c.sink - c.window);
        EXPECT_LE(elsewhere, 20); // as near to another cell
    };

    const auto step = p.device.plan({p.input(1, kTokens)});
    for (int64_t i = 0; i < kTokens; i++) {
        p.device.append(*step);
    }
    expect_lists_of_the_cpu(p.on_device);

    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    SequenceInput in = p.input(1, kTokens);
    in.sequence = p.device.create({}, kTokens, stream);
    const auto other = p.device.plan({in}, stream);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ASSERT_EQ(
            cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
            cudaSuccess);
    for (int i = 0; i < 100; i++) {
        p.device.append(*other, stream);
    }
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (int64_t i = 0; i < kTokens; i += 100) {
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    }
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    expect_lists_of_the_cpu(in.sequence);
    EXPECT_EQ(
            p.device.lists(in.sequence, 0).slots,
            p.device.lists(p.on_device, 0).slots);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

/// Sequences that decode on streams of their own give the bits that they give
/// one after the other.
TEST_F(GpuAdapterStress, ManyStreams) {
    constexpr int kStreams = 8, kSteps = 100;
    constexpr int64_t kFirst = 300;
    AdapterCase c;
    c.name = "";
    c.query = QueryKind::blend;
    c.lengths = {kFirst + kSteps};
    Random random;
    const CaseWorld world(c, random);
    const DeviceCache cache(world.cache(0, random));
    const size_t size = size_t(c.heads_q) * c.d;
    const OnDevice<char> queries(as_type(c.dtype, random.normal(kSteps * size, 2)));
    GpuAttentionAdapter adapter(world.params, world.partitions);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);

    struct Run {
        cudaStream_t stream = nullptr;
        std::unique_ptr<GpuBatch> step;
        OnDevice<float> output;
    };
    const auto decode = [&](int nstream) {
        std::vector<std::vector<float>> outputs;
        std::vector<cudaStream_t> streams(nstream);
        for (auto& stream : streams) {
            EXPECT_EQ(
                    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                    cudaSuccess);
        }
        {
            std::vector<Run> runs;
            for (int i = 0; i < kStreams; i++) {
                Run run{streams[i % nstream], nullptr, OnDevice<float>(kSteps * size)};
                SequenceInput in;
                in.sequence = adapter.create({}, kFirst + kSteps, run.stream);
                in.kv = cache.view(kFirst + kSteps);
                in.q_len = kFirst - 7 * i; // each another length
                adapter.append(*adapter.plan({in}, run.stream), run.stream);
                in.q_len = 1;
                run.step = adapter.plan({in}, run.stream);
                runs.push_back(std::move(run));
            }
            // What set the outputs up knows nothing of these streams.
            EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
            for (int t = 0; t < kSteps; t++) {
                for (Run& run : runs) {
                    adapter.append(*run.step, run.stream);
                    AttendOutput out;
                    out.output = run.output.data() + t * size;
                    adapter.attend(
                            *run.step,
                            queries.data() + t * size * 2,
                            out,
                            nullptr,
                            run.stream);
                }
            }
            for (Run& run : runs) {
                outputs.push_back(run.output.host());
            }
            adapter.check();
        }
        for (auto& stream : streams) {
            cudaStreamDestroy(stream);
        }
        return outputs;
    };
    const auto expected = decode(1), got = decode(kStreams);
    for (int i = 0; i < kStreams; i++) {
        EXPECT_EQ(got[i], expected[i]) << "sequence " << i;
    }
    EXPECT_NE(expected[0], expected[1]);
}

/// Batches that live for one step, as where sequences come and go, are what one
/// batch for all steps is.
TEST_F(GpuAdapterStress, ABatchForEachStep) {
    constexpr int64_t kFirst = 400, kSteps = 100;
    AdapterCase c;
    c.name = "";
    c.lengths = {kFirst + kSteps};
    Pair p(c, kFirst + kSteps);
    const size_t size = size_t(c.heads_q) * c.d;
    const OnDevice<char> queries(as_type(c.dtype, p.random.normal(kSteps * size, 2)));
    cudaStream_t stream;
    ASSERT_EQ(
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    const auto decode = [&](bool one_batch) {
        SequenceInput in = p.input(kFirst, kFirst + kSteps);
        in.sequence = p.device.create({}, kFirst + kSteps, stream);
        const OnDevice<float> output(kSteps * size);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        auto batch = p.device.plan({in}, stream);
        p.device.append(*batch, stream);
        for (int64_t t = 0; t < kSteps; t++) {
            if (t == 0 || !one_batch) {
                batch->release(stream);
                in.q_len = 1;
                batch = p.device.plan({in}, stream);
            }
            p.device.append(*batch, stream);
            AttendOutput out;
            out.output = output.data() + t * size;
            p.device.attend(
                    *batch, queries.data() + t * size * 2, out, nullptr, stream);
        }
        batch->release(stream);
        EXPECT_SENTENCE(p.device.append(*batch, stream), "the batch was released");
        const auto outputs = output.host();
        p.device.check();
        p.device.free(in.sequence, stream);
        return outputs;
    };
    EXPECT_EQ(decode(true), decode(false));
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    cudaStreamDestroy(stream);
}

/// Adapters of several threads do not disturb each other.
TEST_F(GpuAdapterStress, AnAdapterForEachThread) {
    AdapterCase c;
    c.name = "";
    c.lengths = {400};
    Random random;
    const CaseWorld world(c, random);
    const DeviceCache cache(world.cache(0, random));
    const OnDevice<char> queries(as_type(c.dtype, world.queries()));
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const size_t size = size_t(c.heads_q) * c.d;
    constexpr int kThreads = 6;
    std::vector<std::vector<float>> outputs(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; t++) {
        threads.emplace_back([&, t] {
            cudaStream_t stream;
            ASSERT_EQ(
                    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                    cudaSuccess);
            {
                GpuAttentionAdapter adapter(world.params, world.partitions);
                SequenceInput in;
                in.sequence = adapter.create({}, 64, stream);
                in.kv = cache.view(400);
                for (in.q_len = 1; adapter.length(in.sequence) < 400;) {
                    adapter.append(*adapter.plan({in}, stream), stream);
                }
                OnDevice<float> output(size);
                ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
                AttendOutput out;
                out.output = output.data();
                adapter.attend(
                        *adapter.plan({in}, stream), queries.data(), out, nullptr, stream);
                outputs[t] = output.host();
                adapter.check();
            }
            cudaStreamDestroy(stream);
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
    for (const auto& output : outputs) {
        EXPECT_EQ(output, outputs[0]);
    }
    ASSERT_EQ(outputs[0].size(), size);
}

} // namespace
} // namespace faiss_saap::tests
