#include "decode_trace.h"

#include <algorithm>
#include <cmath>

#include <cuda_runtime_api.h>
#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include "DeviceMemory.h"
#include "common/GroundTruth.h"

namespace faiss_saap::benchs {

namespace {

DeviceMemory as_half(const float* x, int64_t n) {
    std::vector<char> bytes(n * 2);
    from_float(DType::float16, x, n, bytes.data());
    return DeviceMemory(bytes.data(), bytes.size());
}

} // namespace

DeviceDecode decode_trace(
        const HeadData& data,
        const Partition& partition,
        int64_t sink,
        int64_t window,
        double budget) {
    const int64_t ask = std::min<int64_t>(64, data.tokens);
    const int64_t first = data.tokens - ask;
    AdapterParams params;
    params.heads_q = data.group;
    params.heads_kv = 1;
    params.d = data.d;
    params.sink = sink;
    params.window = window;
    params.policy.nprobe = partition.ncell();
    params.policy.max_selectivity = budget;
    gpu::GpuAttentionAdapter adapter(params, std::vector<Partition>{partition});
    const DeviceMemory k = as_half(data.keys_post.data(), data.tokens * data.d);
    const DeviceMemory v = as_half(data.values.data(), data.tokens * data.d);
    const DeviceMemory q =
            as_half(data.query_post(first, 0), ask * data.group * data.d);
    SequenceInput in;
    in.sequence = adapter.create({}, data.tokens);
    in.kv = KvView::token_major(
            k.as(), v.as(), DType::float16, data.tokens, 1, data.d, data.d);
    in.q_len = data.tokens;
    adapter.append(*adapter.plan({in}));
    in.q_len = ask;
    const auto batch = adapter.plan({in});
    const int64_t rows = ask * data.group;
    std::vector<float> output(rows * data.d), lse(rows);
    std::vector<AttendStats> stats(rows);
    const DeviceMemory d_output(output.size() * 4), d_lse(lse.size() * 4),
            d_stats(stats.size() * sizeof(AttendStats));
    adapter.attend(
            *batch,
            q.as(),
            {d_output.as<float>(), d_lse.as<float>(), d_stats.as<AttendStats>()});
    d_output.copy_to(output.data(), output.size() * 4);
    d_lse.copy_to(lse.data(), lse.size() * 4);
    d_stats.copy_to(stats.data(), stats.size() * sizeof(AttendStats));
    adapter.check();

    DeviceDecode result;
    std::vector<double> read(data.group), far(data.group);
    for (int64_t t = 0; t < ask; t++) {
        const FarRange range = far_range(first + t, sink, window);
        for (int h = 0; h < data.group; h++) {
            const GroundTruth truth(data, first + t, h);
            const int64_t r = t * data.group + h;
            result.error += truth.error_of(output.data() + r * data.d) / rows;
            result.selectivity += stats[r].selectivity() / rows;
            read[h] += std::exp(lse[r] - truth.lse) * (1 - stats[r].dense_mass);
            far[h] += truth.mass_of(range.begin, range.end);
        }
    }
    for (int h = 0; h < data.group; h++) {
        result.mass_recall += read[h] / far[h] / data.group;
    }
    return result;
}

} // namespace faiss_saap::benchs
