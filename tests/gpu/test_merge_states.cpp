#include <faiss_saap/gpu/merge_states.h>

#include <cuda_runtime_api.h>

#include <faiss_saap/merge_states.h>

#include "device_test.h"

namespace faiss_saap {
namespace {

class GpuMergeStates : public tests::DeviceTest {};

float* to_device(const std::vector<float>& x) {
    float* p = nullptr;
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&p), x.size() * 4), cudaSuccess);
    EXPECT_EQ(
            cudaMemcpy(p, x.data(), x.size() * 4, cudaMemcpyHostToDevice),
            cudaSuccess);
    return p;
}

TEST_F(GpuMergeStates, EqualsTheHost) {
    tests::Random random;
    for (int64_t n : {1, 32, 70000}) {
        for (int d_v : {1, 64, 128, 257}) {
            std::vector<float> o = random.normal(n * d_v), ob = random.normal(n * d_v);
            std::vector<float> lse = random.normal(n, 5), lseb = random.normal(n, 5);
            lse[random.below(n)] = -INFINITY;
            lseb[random.below(n)] = -INFINITY;
            lse[0] = lseb[0] = -INFINITY; // both empty
            gpu::MergeStatesParams p;
            p.n = n;
            p.d_v = d_v;
            p.output = to_device(o);
            p.lse = to_device(lse);
            float* b = to_device(ob);
            float* lb = to_device(lseb);
            p.output_b = b;
            p.lse_b = lb;
            gpu::merge_states(p, nullptr);
            merge_states(n, d_v, o.data(), lse.data(), ob.data(), lseb.data());
            std::vector<float> got(o.size()), got_lse(lse.size());
            ASSERT_EQ(
                    cudaMemcpy(got.data(), p.output, got.size() * 4, cudaMemcpyDeviceToHost),
                    cudaSuccess);
            ASSERT_EQ(
                    cudaMemcpy(got_lse.data(), p.lse, got_lse.size() * 4, cudaMemcpyDeviceToHost),
                    cudaSuccess);
            for (size_t i = 0; i < got.size(); i++) {
                ASSERT_NEAR(got[i], o[i], 1e-5) << i;
            }
            EXPECT_EQ(got_lse[0], -INFINITY);
            for (size_t i = 1; i < got_lse.size(); i++) {
                if (got_lse[i] != lse[i]) { // infinities are equal
                    ASSERT_NEAR(got_lse[i], lse[i], 1e-5) << i;
                }
            }
            for (void* q : {(void*)p.output, (void*)p.lse, (void*)b, (void*)lb}) {
                cudaFree(q);
            }
        }
    }
}

TEST(GpuErrors, SentencesWithoutADevice) {
    gpu::MergeStatesParams p;
    p.d_v = 1;
    gpu::merge_states(p, nullptr); // nothing to do
    p.n = -1;
    EXPECT_SENTENCE(gpu::merge_states(p, nullptr), "n = -1");
    p.n = 1;
    EXPECT_SENTENCE(gpu::merge_states(p, nullptr), "output is null");
    p.d_v = 0;
    EXPECT_SENTENCE(gpu::merge_states(p, nullptr), "d_v = 0");
    EXPECT_SENTENCE(gpu::require_device(-1), "device = -1");
    EXPECT_SENTENCE(gpu::device_info(1000), "device = 1000");
}

} // namespace
} // namespace faiss_saap
