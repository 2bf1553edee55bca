/// The trained partitions of a model, and the file that carries them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <faiss_saap/ProbePlan.h>
#include <faiss_saap/rope.h>
#include <faiss_saap/train_partition.h>

namespace faiss_saap {

/// Trained partitions of some KV heads of one model, with what they were
/// trained on.
struct PartitionSet {
    std::string model;
    RopeParams rope;
    int64_t sink = 0, window = 0;   ///< used in training
    std::vector<std::string> texts; ///< trained on; the last one was held out
    int seed = 0;
    std::string version; ///< of the library that trained; set by reading
    std::vector<TrainedPartition> partitions;
    /// what KV heads probe; empty where nothing was chosen
    std::vector<ProbePlan> plans;
    std::vector<std::string> plan_texts; ///< that the plans were chosen by

    /// @throws faiss::FaissException when this KV head has no partition
    const TrainedPartition& find(int layer, int kv_head) const;
    /// @throws faiss::FaissException when this KV head has no plan
    const ProbePlan& find_plan(int layer, int kv_head) const;

    /// @throws faiss::FaissException when the partitions were trained for
    ///         another head dimension or other RoPE parameters
    void check_rope(const RopeParams& other) const;
};

/// Writes a .saap file: safetensors, for each partition the tensors
/// layer.{l}.kv.{h}.centroids (ncell, d; bfloat16 where that holds them
/// exactly, else float32) and, for each layer of the classifier,
/// layer.{l}.kv.{h}.{name}.weight (networks, rows, padded cols) and .bias
/// (networks, rows), and where it has a blend layer.{l}.kv.{h}.blend (query
/// heads, weights); what else there is, plans included, stands in the metadata
/// as text. Written
/// beside and then renamed, so that no half-written file is seen.
/// @throws faiss::FaissException for a query assigner that is no
///         QueryClassifier, a key assigner that is not flat, two partitions or
///         plans of one head, a plan for a head without a partition, what
///         read_partitions would refuse (numbers that are not finite, texts that
///         are not UTF-8), or when the file cannot be written
void write_partitions(const PartitionSet& set, const std::string& path);

/// @throws faiss::FaissException naming the file and what is wrong with it:
///         truncated or corrupt, another kind of file, a later version of the
///         format, a shape that does not fit the metadata, a weight that is
///         not finite
PartitionSet read_partitions(const std::string& path);

} // namespace faiss_saap
