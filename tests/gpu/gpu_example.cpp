#include <cstdio>
#include <random>
#include <vector>

#include <cuda_runtime.h>

#include <faiss_saap/gpu/GpuAttentionAdapter.h>
#include <faiss_saap/gpu/sequence_partitions.h>

using namespace faiss_saap;

int main() {
    if (gpu::device_count() == 0) return std::puts("no CUDA device here") < 0;
    const int n = 8192, d = 128, heads_q = 8, heads_kv = 2, ncell = 128;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> k(n * heads_kv * d), q(heads_q * d);
    for (auto* x : {&k, &q})
        for (float& f : *x) f = normal(random);

    // An adapter for each layer. Partitions that were trained for the model
    // (read_partitions) would be its second argument.
    AdapterParams params;
    params.heads_q = heads_q, params.heads_kv = heads_kv, params.d = d;
    params.policy.nprobe = ncell, params.policy.max_selectivity = 0.05;
    gpu::GpuAttentionAdapter adapter(params);

    // Your engine's cache, on the device: room for n tokens, of type bfloat16.
    std::vector<char> bytes(2 * k.size());
    from_float(DType::bfloat16, k.data(), k.size(), bytes.data());
    char *cache, *queries;
    float *out, *lse;
    cudaMalloc(&cache, bytes.size()), cudaMalloc(&queries, 2 * q.size());
    cudaMalloc(&out, 4 * q.size()), cudaMalloc(&lse, 4 * heads_q);
    cudaMemcpy(cache, bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
    from_float(DType::bfloat16, q.data(), q.size(), bytes.data());
    cudaMemcpy(queries, bytes.data(), 2 * q.size(), cudaMemcpyHostToDevice);

    // Prefill of 8,000 tokens: cells learnt from their keys, lists with room for n.
    SequenceInput in;
    in.kv = KvView::token_major(cache, cache, DType::bfloat16, n, heads_kv, d, d);
    in.sequence = adapter.create(gpu::sequence_partitions(in.kv, 0, 8000, ncell), n);
    in.q_len = 8000;
    adapter.append(*adapter.plan({in}));

    // A decode step appends one token and attends: kernels only, so it can be
    // captured once and replayed while the sequence grows.
    in.q_len = 1;
    auto batch = adapter.plan({in}); // as many sequences as you like
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    cudaDeviceSynchronize();
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    adapter.step(*batch, queries, {out, lse}, nullptr, stream);
    cudaGraph_t graph;
    cudaGraphExec_t step;
    cudaStreamEndCapture(stream, &graph);
    cudaGraphInstantiate(&step, graph, 0);
    for (int token = 0; token < 100; token++) cudaGraphLaunch(step, stream);
    cudaStreamSynchronize(stream);
    adapter.check(); // what kernels met is thrown here, or by the next call
    std::printf("%lld tokens, lists of %.2f MB\n",
                static_cast<long long>(adapter.length(in.sequence)), adapter.bytes_used() / 1e6);
}
