#include <faiss_saap/gpu/RaftSelectK.h>

#include "select_k_cases.h"

namespace faiss_saap {
namespace {

class GpuRaftSelectK : public tests::DeviceTest,
                       public ::testing::WithParamInterface<tests::SelectCase> {};

TEST_P(GpuRaftSelectK, AgreesWithOurs) {
    const auto c = GetParam();
    tests::Random random;
    const std::vector<float> scores = random.normal(size_t(c.rows) * c.len);
    tests::OnDevice<float> sd(scores), ours(c.rows * c.k), theirs(c.rows * c.k);
    tests::OnDevice<int32_t> our_ids(c.rows * c.k), their_ids(c.rows * c.k);
    gpu::SelectKParams p;
    p.rows = c.rows, p.len = c.len, p.k = c.k, p.largest = c.largest;
    p.scores = sd.data(), p.scores_row_stride = c.len;
    p.ids = our_ids.data(), p.values = ours.data();
    gpu::select_k(p, nullptr);
    p.ids = their_ids.data(), p.values = theirs.data();
    gpu::RaftSelectK raft;
    raft(p, nullptr);
    const auto values = ours.host();
    EXPECT_EQ(values, theirs.host());
    const auto ids = our_ids.host(), other = their_ids.host();
    for (size_t i = 0; i < ids.size(); i++) { // equal scores may change places
        ASSERT_TRUE(other[i] >= 0 && other[i] < c.len);
        ASSERT_EQ(scores[i / c.k * c.len + other[i]], values[i]);
    }
}

INSTANTIATE_TEST_SUITE_P(
        Cases,
        GpuRaftSelectK,
        ::testing::ValuesIn(tests::select_cases()));

class GpuRaft : public tests::DeviceTest {};

TEST_F(GpuRaft, IsCapturedAfterOneCall) {
    tests::Random random;
    const std::vector<float> scores = random.normal(64 * 1024);
    tests::OnDevice<float> sd(scores);
    tests::OnDevice<int32_t> ids(64 * 32);
    gpu::SelectKParams p;
    p.rows = 64, p.len = 1024, p.k = 32;
    p.scores = sd.data(), p.scores_row_stride = 1024;
    p.ids = ids.data();
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    gpu::RaftSelectK raft;
    raft(p, stream);
    const auto expected = ids.host();
    ASSERT_EQ(cudaMemset(ids.data(), 0, 64 * 32 * 4), cudaSuccess);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    raft(p, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    EXPECT_EQ(ids.host(), expected);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

TEST_F(GpuRaft, RefusesWhatItDoesNotDo) {
    gpu::RaftSelectK raft;
    float x = 0;
    int32_t id = 0;
    gpu::SelectKParams p;
    p.rows = 2, p.len = 3, p.k = 4, p.scores_row_stride = 3;
    p.scores = &x, p.ids = &id;
    EXPECT_SENTENCE(raft(p, nullptr), "k = 4 is more than len = 3");
    p.k = 1, p.scores_row_stride = 5;
    EXPECT_SENTENCE(raft(p, nullptr), "scores_row_stride = 5");
}

} // namespace
} // namespace faiss_saap
