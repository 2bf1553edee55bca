/// Partitions as kernels see them.
#pragma once

#include <vector>

#include <faiss_saap/KvView.h>
#include <faiss_saap/Partition.h>

#include "DeviceBuffer.h"
#include "route.h"
#include "sequence_state.h"

namespace faiss_saap::gpu {

/// A partition whose assigners lie on the device.
struct LoweredPartition {
    int kv_head = 0;
    int ncell = 0;
    DeviceRotary rotary;
    DeviceAssigner key, query;
    std::vector<DeviceBuffer> memory;
};

/// @param group       query heads of a KV head
/// @param most_cells  more are refused
/// @throws faiss::FaissException for an assigner that has no kernel, or when
///         the device has no room
LoweredPartition lower(
        const Partition& partition,
        int kv_head,
        int group,
        cudaStream_t stream,
        int most_cells = kMaxCells);

/// A view of device memory, of float16 or bfloat16.
DeviceView lower_view(const KvView& kv);

} // namespace faiss_saap::gpu
