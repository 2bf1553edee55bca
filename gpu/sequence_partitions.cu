#include <faiss_saap/gpu/sequence_partitions.h>

#include <cinttypes>
#include <climits>

#include "DeviceBuffer.h"
#include "check_vectors.h"
#include "device_vectors.cuh"
#include "learn_partitions.h"
#include "lower.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

/// Keys as floats, head after head. One warp per key.
__global__ void load_keys_kernel(
        DeviceView kv,
        int heads,
        int64_t begin,
        int64_t n,
        int d,
        float* x) {
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    if (i >= heads * n) {
        return;
    }
    const char* row = key_row(kv, static_cast<int>(i / n), begin + i % n);
    for (int j = threadIdx.x % 32; j < d; j += 32) {
        x[i * d + j] = element(row, kv.bf16, j);
    }
}

} // namespace

HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        int ncell,
        const KMeansParams& params,
        int device,
        cudaStream_t stream) {
    kv.check_shape();
    FAISS_THROW_IF_NOT_FMT(
            kv.dtype != DType::float32,
            "kv.dtype = %s: on the device there are float16 and bfloat16",
            name(kv.dtype));
    FAISS_THROW_IF_NOT_FMT(
            begin >= 0 && begin <= end && end <= kv.length && end - begin <= INT_MAX,
            "slots %" PRId64 " .. %" PRId64
            " - 1 are outside the view, which has %" PRId64,
            begin,
            end,
            kv.length);
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536 && ncell <= end - begin,
            "ncell = %d must be between 1 and 65536, and at most the %" PRId64
            " keys",
            ncell,
            end - begin);
    require_device(device);
    const DeviceScope scope(device);
    StreamMemory memory;
    memory.stream = stream;
    FAISS_SAAP_CUDA_CHECK(cudaDeviceGetDefaultMemPool(&memory.pool, device));
    if (kv.page_table) {
        std::vector<int32_t> table((end + kv.page_size - 1) / kv.page_size);
        copy_async(table.data(), kv.page_table, table.size(), stream);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
        KvView host = kv;
        host.page_table = table.data();
        host.length = end;
        host.check();
    }
    const int64_t n = end - begin, keys = kv.heads * n;
    const StreamBuffer<float> x(memory, keys * kv.d);
    load_keys_kernel<<<
            static_cast<unsigned>((keys * 32 + kThreads - 1) / kThreads),
            kThreads,
            0,
            stream>>>(lower_view(kv), kv.heads, begin, n, kv.d, x.get());
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    check_finite(x.get(), keys, kv.d, 0, "keys", memory);
    HeadPartitions heads;
    for (Partition& p : learn_partitions(
                 x.get(),
                 kv.heads,
                 n,
                 kv.d,
                 ncell,
                 NEEDS_POST_ROPE,
                 params,
                 faiss::METRIC_INNER_PRODUCT,
                 memory)) {
        heads.push_back({std::move(p)});
    }
    return heads;
}

} // namespace faiss_saap::gpu
