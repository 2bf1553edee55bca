#include <cstdio>

#include <faiss_saap/Trace.h>
#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include "device_test.h"

namespace faiss_saap::tests {
namespace {

class GpuTrace : public DeviceTest {};

/// The recall table of a recorded text is the same on both.
TEST_F(GpuTrace, RecallIsThatOfTheCpu) {
    const Trace trace(given_trace());
    const int d = trace.d, group = trace.group();
    const auto n = static_cast<size_t>(trace.tokens);
    std::vector<int64_t> position(n);
    for (size_t i = 0; i < n; i++) {
        position[i] = static_cast<int64_t>(i);
    }
    const RotaryEmbedding rotary(trace.rope);
    constexpr int kAsk = 64;
    const auto half = [](const std::vector<float>& x) {
        std::vector<char> bytes(x.size() * 2);
        from_float(
                DType::float16, x.data(), static_cast<int64_t>(x.size()), bytes.data());
        return bytes;
    };
    const std::vector<double> budgets = {0.01, 0.02, 0.05, 0.1, 0.2, 1};
    const char* spaces[] = {"post-RoPE", "de-rotated"};
    for (int layer : trace.layers) {
        for (int space = 0; space < 2; space++) {
            std::vector<float> k = trace.keys(layer, 0);
            const std::vector<float> pre = k;
            rotary.rotate(trace.tokens, position.data(), k.data());
            const std::vector<char> keys = half(k), values = half(trace.values(layer, 0));
            std::vector<float> queries(size_t(kAsk) * group * d);
            for (int g = 0; g < group; g++) {
                std::vector<float> q = trace.queries(layer, g);
                rotary.rotate(trace.tokens, position.data(), q.data());
                for (int t = 0; t < kAsk; t++) {
                    std::copy_n(
                            q.data() + (n - kAsk + t) * d,
                            d,
                            queries.data() + (size_t(t) * group + g) * d);
                }
            }
            const std::vector<char> half_queries = half(queries);
            to_float(
                    DType::float16,
                    half_queries.data(),
                    static_cast<int64_t>(queries.size()),
                    queries.data());
            const auto prefix = static_cast<int64_t>(n / 2);
            const Partition partition = kmeans_partition(
                    prefix,
                    d,
                    space ? pre.data() : k.data(),
                    256,
                    space ? NEEDS_PRE_ROPE : NEEDS_POST_ROPE,
                    {},
                    trace.rope);
            AdapterParams params;
            params.heads_q = group;
            params.heads_kv = 1;
            params.d = d;
            params.window = 256;
            params.policy.nprobe = 256;
            AttentionAdapter cpu(params, std::vector<Partition>{partition});
            gpu::GpuAttentionAdapter device(params, std::vector<Partition>{partition});
            SequenceInput on_cpu, on_device;
            on_cpu.q_len = kAsk;
            on_cpu.sequence = cpu.create();
            on_cpu.kv = KvView::token_major(
                    keys.data(), values.data(), DType::float16, trace.tokens, 1, d, d);
            cpu.append(on_cpu.sequence, on_cpu.kv);
            const OnDevice<char> d_keys(keys), d_values(values), d_queries(half_queries);
            on_device.sequence = device.create();
            on_device.kv = KvView::token_major(
                    d_keys.data(), d_values.data(), DType::float16, trace.tokens, 1, d, d);
            on_device.q_len = trace.tokens;
            device.append(*device.plan({on_device}));
            on_device.q_len = kAsk;
            const auto plan = device.plan({on_device});
            const size_t rows = size_t(kAsk) * group;
            std::vector<float> output(rows * d), lse(rows);
            std::vector<AttendStats> stats(rows);
            const OnDevice<float> d_output(rows * d), d_lse(rows);
            const OnDevice<AttendStats> d_stats(rows);
            // Far mass that was read, from LSE and share of the dense part.
            const auto far_mass = [&](const std::vector<float>& l,
                                      const std::vector<AttendStats>& s) {
                std::vector<double> mass;
                for (size_t r = 0; r < rows; r++) {
                    mass.push_back(std::exp(double(l[r])) * (1 - s[r].dense_mass));
                }
                return mass;
            };
            std::vector<double> all;
            for (auto b = budgets.rbegin(); b != budgets.rend(); ++b) {
                ProbePolicy policy = params.policy;
                policy.max_selectivity = *b;
                cpu.attend(
                        {on_cpu},
                        queries.data(),
                        {output.data(), lse.data(), stats.data()},
                        &policy);
                device.attend(
                        *plan,
                        d_queries.data(),
                        {d_output.data(), d_lse.data(), d_stats.data()},
                        &policy);
                ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
                device.check();
                const auto c = far_mass(lse, stats),
                           g = far_mass(d_lse.host(), d_stats.host());
                if (*b == 1) {
                    all = c;
                }
                double recall_c = 0, recall_g = 0;
                for (size_t r = 0; r < rows; r++) {
                    recall_c += c[r] / all[r] / static_cast<double>(rows);
                    recall_g += g[r] / all[r] / static_cast<double>(rows);
                }
                std::printf(
                        "layer %2d, %s cells, budget %.2f: mass recall %.4f on the "
                        "CPU, %.4f on the device\n",
                        layer,
                        spaces[space],
                        *b,
                        recall_c,
                        recall_g);
                EXPECT_NEAR(recall_c, recall_g, 3e-3);
                EXPECT_GT(recall_g, 0.5 * *b);
            }
        }
    }
}

} // namespace
} // namespace faiss_saap::tests
