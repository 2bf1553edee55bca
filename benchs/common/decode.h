/// What bench_decode does alike on the CPU and on a device.
#pragma once

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/AttentionAdapter.h>

#include "CacheOptions.h"

namespace faiss_saap::benchs {

struct DecodeOptions : CacheOptions {
    int sequences = 1, heads_q = 32, repeat = 21;
    double selectivity = 0.05, buffer_gib = 2;
    /// Sequences have tokens * (1 - ragged) to tokens * (1 + ragged), in equal steps.
    double ragged = 0;
    bool fp32_centroids = false;     ///< not rounded so that bfloat16 holds them
    std::vector<std::string> stages; ///< that are timed; empty: all
    std::string json;

    /// Leaves those stages (structs with a name) that are to be timed: bandwidth and
    /// dense, which others are compared with, always are.
    /// @param beside  a stage that is timed elsewhere
    /// @throws faiss::FaissException when there is no stage of a name
    template <class Stage>
    void choose(std::vector<Stage>& all, const std::string& beside = "") const {
        for (const std::string& name : stages) {
            FAISS_THROW_IF_NOT_FMT(
                    name == beside ||
                            std::any_of(
                                    all.begin(),
                                    all.end(),
                                    [&](const Stage& s) { return s.name == name; }),
                    "stages: there is no \"%s\"",
                    name.c_str());
        }
        const auto runs = [&](const Stage& s) {
            return stages.empty() || s.name == "bandwidth" || s.name == "dense" ||
                    std::find(stages.begin(), stages.end(), s.name) != stages.end();
        };
        all.erase(std::stable_partition(all.begin(), all.end(), runs), all.end());
    }
    /// Tokens of each sequence, in an order of their own.
    std::vector<int64_t> lengths() const;
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
