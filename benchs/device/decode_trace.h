/// One head of a trace decoded on a GPU.
#pragma once

#include <cstdint>

#include <faiss_saap/Partition.h>

#include "common/HeadData.h"

namespace faiss_saap::benchs {

struct DeviceDecode {
    double error = 0;       ///< mean over queries of |o - o*| / |o*|
    double selectivity = 0; ///< per KV head
    double mass_recall = 0; ///< mean over query heads, as in the demo's table
};

/// The last tokens, at most 64, in float16, each reading at most `budget` of its
/// far keys.
/// @throws faiss::FaissException where the device fails
DeviceDecode decode_trace(
        const HeadData& data,
        const Partition& partition,
        int64_t sink,
        int64_t window,
        double budget);

} // namespace faiss_saap::benchs
