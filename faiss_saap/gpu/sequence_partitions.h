/// Cells of a sequence's own keys, learnt on the device.
#pragma once

#include <cstdint>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// faiss_saap::sequence_partitions of a cache on the device: post-RoPE k-means
/// over all KV heads at once, queries by inner product, in the order that
/// GpuAttentionAdapter::create takes. A prefill is this, `create` and `append`.
/// Synchronises.
/// @param kv     device memory, page table included; float16 or bfloat16. Slots
///               begin .. end - 1 are read, values are not
/// @param ncell  cells; N/16 to N/64 of N keys is the useful range
/// @throws faiss::FaissException when there are fewer keys than cells, keys that
///         are not finite, a page that is not there, or too little memory (of
///         which 4 * heads * (end - begin) * d bytes and half as much again are
///         needed meanwhile)
HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        int ncell,
        const KMeansParams& params = {},
        int device = 0,
        cudaStream_t stream = nullptr);

} // namespace faiss_saap::gpu
