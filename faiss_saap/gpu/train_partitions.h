/// Training the partitions of a layer on the device. Compiles without CUDA.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include <faiss_saap/train_partition.h>

namespace faiss_saap::gpu {

/// Where partitions are trained.
struct TrainingDevice {
    int device = 0;
    /// Bytes of the device's memory that texts may take; 0: three quarters of
    /// what is free. What does not fit stays in host memory, from where kernels
    /// read what a mini-batch asks for: the same result, later.
    size_t text_bytes = 0;
    /// Products of the classifiers take their factors as TF32 (11 bits); false:
    /// as float32, which takes longer.
    bool tf32 = true;
};

/// Called after every evaluation, with the state of each KV head. What it throws
/// ends the training.
using LayerCallback = std::function<void(const std::vector<TrainingState>&)>;

/// train_partition() for several KV heads of a layer at once, on the device: k-means,
/// targets, mini-batches and optimiser; draws, held-out recall and weights of a
/// blend are the host's, by the same code. The same tokens are drawn as there and
/// targets are as exact (scores to 2^-16 of |q| |k|), but k-means begins elsewhere
/// and gradients are rounded more: partitions are as good and not the same.
///
/// The same texts, parameters and seed give the same result on the same kind of
/// device. Memory: on the host as train_partition() for each KV head, on the
/// device also some 4 * heads * batch * ncell floats, heads being the query heads of
/// all.
///
/// @param kv_heads  the model's numbers, each once
/// @param states    null, or where to go on, one per KV head or none at all; holds
///                  the last states afterwards
/// @param callback  may be empty
/// @return a partition for each KV head, in their order
/// @throws faiss::FaissException as train_partition(), for states of different
///         steps, and when the device has no room
std::vector<TrainedPartition> train_partitions(
        const std::vector<Trace>& texts,
        int layer,
        const std::vector<int>& kv_heads,
        const TrainingParams& params = {},
        std::vector<TrainingState>* states = nullptr,
        const LayerCallback& callback = {},
        const TrainingDevice& device = {});

} // namespace faiss_saap::gpu
