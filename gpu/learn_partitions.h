/// Cells learnt on the device.
#pragma once

#include <vector>

#include <faiss_saap/Partition.h>

#include "StreamBuffer.h"

namespace faiss_saap::gpu {

/// kmeans_partition of every head, all at once: keys go to the nearest centroid,
/// queries are compared with the means by `metric`. Synchronises.
/// @param x      device memory, size nhead * n * d, finite
/// @param ncell  1 to 65,536 and at most n
/// @return one for each head
/// @throws faiss::FaissException also when memory is short
std::vector<Partition> learn_partitions(
        const float* x,
        int nhead,
        int64_t n,
        int d,
        int ncell,
        RoutingNeeds space,
        const KMeansParams& params,
        faiss::MetricType metric,
        const StreamMemory& memory);

} // namespace faiss_saap::gpu
