// bench_build --device cuda.
#include <algorithm>
#include <functional>

#include <cuda_runtime_api.h>
#include <faiss/IndexFlat.h>
#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/gpu/GpuAttentionAdapter.h>
#include <faiss_saap/gpu/assign_bfloat16.h>
#include <faiss_saap/gpu/assign_cells.h>
#include <faiss_saap/gpu/kmeans.h>

#include "DeviceMemory.h"
#include "common/build.h"
#include "common/report.h"

namespace faiss_saap::benchs {

namespace {

/// Seconds that the device works on what `launch` gives it, of each of some runs.
std::vector<double> timed(
        int64_t runs,
        const std::function<void()>& prepare,
        const std::function<void()>& launch) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<double> seconds;
    for (int64_t r = -1; r < runs; r++) { // the first one is not counted
        prepare();
        check(cudaDeviceSynchronize());
        check(cudaEventRecord(begin));
        launch();
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end));
        if (r >= 0) {
            seconds.push_back(1e-3 * ms);
        }
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    return seconds;
}

/// Keys by L2, queries by inner product.
Partition partition_of(int d, int ncell, const float* centroids) {
    const auto flat = [&](faiss::MetricType metric) {
        auto index = std::make_shared<faiss::IndexFlat>(d, metric);
        index->add(ncell, centroids);
        return std::make_shared<QuantizerAssigner>(index, NEEDS_POST_ROPE);
    };
    Partition p;
    p.key = flat(faiss::METRIC_L2);
    p.query = flat(faiss::METRIC_INNER_PRODUCT);
    return p;
}

} // namespace

void build_on_device(const BuildOptions& o) {
    gpu::require_device(0);
    FAISS_THROW_IF_NOT_FMT(
            o.dtype == "bf16",
            "dtype = %s: on a device keys are clustered as bf16",
            o.dtype.c_str());
    const int64_t room = o.tokens + o.inserts + 1;
    CacheShape shape = o.shape(room);
    shape.values = false;
    std::mt19937 random(1);
    const SyntheticCache host(shape, random);
    const DeviceMemory keys(host.k.data(), host.k.size());
    const auto cache = KvView::token_major(
            keys.as(), keys.as(), DType::bfloat16, room, o.heads_kv, o.d, o.d);
    const int64_t end = std::max(o.sink, o.tokens - o.window);
    const int64_t n = end - o.sink;
    const size_t cells = size_t(o.heads_kv) * o.ncell;

    gpu::BatchedKMeansParams kmeans;
    const DeviceMemory centroids(cells * o.d * sizeof(float)),
            cell_of(size_t(o.heads_kv) * n * sizeof(int32_t)),
            bias(cells * sizeof(float));
    kmeans.nhead = o.heads_kv, kmeans.n = n, kmeans.d = o.d;
    kmeans.ncell = o.ncell, kmeans.niter = o.niter;
    kmeans.type = DType::bfloat16;
    kmeans.x = keys.as<uint16_t>() + o.sink * o.heads_kv * o.d;
    kmeans.x_head_stride = o.d;
    kmeans.x_row_stride = int64_t(o.heads_kv) * o.d;
    kmeans.centroids = centroids.as<float>();
    kmeans.cells = cell_of.as<int32_t>();
    kmeans.cells_head_stride = n;
    BuildReport report;
    const DeviceMemory kmeans_room(gpu::kmeans_workspace(kmeans));
    const auto nothing = [] {};
    report.add("cluster", double(o.tokens), timed(o.repeat, nothing, [&] {
                   gpu::kmeans(kmeans, kmeans_room.as(), nullptr);
               }));

    gpu::AssignBfloat16Params assign;
    assign.nhead = o.heads_kv, assign.n = n, assign.d = o.d;
    assign.ncell = o.ncell;
    assign.x = kmeans.x, assign.x_head_stride = kmeans.x_head_stride;
    assign.x_row_stride = kmeans.x_row_stride;
    assign.centroids = kmeans.centroids;
    assign.centroids_head_stride = int64_t(o.ncell) * o.d;
    assign.bias = bias.as<float>(), assign.bias_head_stride = o.ncell;
    assign.cells = kmeans.cells, assign.cells_head_stride = n;
    gpu::half_norms(
            {int64_t(cells), o.d, centroids.as<float>(), bias.as<float>()},
            nullptr);
    const DeviceMemory assign_room(gpu::assign_bfloat16_workspace(assign));
    const auto assigning = timed(o.repeat, nothing, [&] {
        gpu::assign_bfloat16(assign, assign_room.as(), nullptr);
    });
    report.add("assign", double(o.tokens), assigning);

    AdapterParams params;
    params.heads_q = params.heads_kv = o.heads_kv;
    params.d = o.d;
    params.sink = o.sink;
    params.window = o.window;
    std::vector<float> learnt(cells * o.d);
    centroids.copy_to(learnt.data(), learnt.size() * sizeof(float));
    std::vector<Partition> partitions;
    for (int h = 0; h < o.heads_kv; h++) {
        partitions.push_back(partition_of(
                o.d, o.ncell, learnt.data() + int64_t(h) * o.ncell * o.d));
    }
    gpu::GpuAttentionAdapter adapter(params, partitions);
    SequenceInput in;
    in.sequence = adapter.create({}, room);
    in.kv = cache;
    in.q_len = o.tokens;
    const auto all = adapter.plan({in});
    const auto append = timed(
            o.repeat,
            [&] { adapter.reset(in.sequence); },
            [&] { adapter.append(*all); });
    adapter.check();
    // All of an append but the assignment: keys checked, lists made.
    std::vector<double> lists;
    for (size_t i = 0; i < append.size(); i++) {
        lists.push_back(append[i] - percentile(assigning, 0.5));
    }
    report.add("lists", double(o.tokens), lists);
    report.add("append", double(o.tokens), append);
    in.q_len = 1;
    const auto one = adapter.plan({in});
    report.add(
            "insert", 1, timed(o.inserts, nothing, [&] { adapter.append(*one); }));
    adapter.check();
    report.finish(o, adapter.bytes_used());
}

} // namespace faiss_saap::benchs
