/// What bench_decode does alike on the CPU and on a device.
#pragma once

#include <random>
#include <string>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>

#include "CacheOptions.h"

namespace faiss_saap::benchs {

struct DecodeOptions : CacheOptions {
    int sequences = 1, heads_q = 32, repeat = 21;
    double selectivity = 0.05, buffer_gib = 2;
    std::string json;
};

/// Queries whose group looks for the same few things, size heads_q * d.
std::vector<float> decode_queries(const DecodeOptions& o, std::mt19937& random);

/// Partitions of each KV head over given centres: queries by inner product.
HeadPartitions centre_partitions(
        const DecodeOptions& o,
        const std::vector<std::vector<float>>& centres);
/// The same cells, queries by a network of the default size.
HeadPartitions classifier_partitions(
        const DecodeOptions& o,
        const std::vector<std::vector<float>>& centres,
        std::mt19937& random);

/// One row of the results. `bytes` are those that must be read.
struct DecodeStage {
    std::string name;
    double bytes = 0, median = 0, p99 = 0; ///< seconds
};

/// Prints and writes what was measured. `stages` begin with "bandwidth" and
/// have "dense".
void report_decode(
        const DecodeOptions& o,
        const std::vector<DecodeStage>& stages,
        double selectivity,
        const std::string& device);

/// bench_decode on a GPU, each stage replayed as a CUDA graph.
void decode_on_device(const DecodeOptions& o);

} // namespace faiss_saap::benchs
