/// Training texts where kernels can read them.
#pragma once

#include <memory>
#include <vector>

#include <faiss_saap/HeadTraining.h>

#include "DeviceBuffer.h"
#include "attention_targets.h"

namespace faiss_saap::gpu {

/// Memory of the host that the device reads.
class PinnedBuffer {
   public:
    PinnedBuffer() = default;
    /// @throws faiss::FaissException when the host has no room
    explicit PinnedBuffer(size_t bytes);
    ~PinnedBuffer();
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;
    char* data() const {
        return static_cast<char*>(data_);
    }

   private:
    void* data_ = nullptr;
};

/// The training texts of some KV heads of a layer: keys sorted by cell, and
/// queries. On the device as far as they may, keys of all texts first; the others
/// in pinned memory.
class DeviceTexts {
   public:
    /// @param heads   trainings on the same texts, whose keys have cells
    /// @param nsplit  shares of a text's keys
    /// @param most    bytes on the device
    DeviceTexts(
            const std::vector<std::unique_ptr<HeadTraining>>& heads,
            int nsplit,
            size_t most,
            cudaStream_t stream);

    /// Of each KV head the training texts, on the device.
    const DeviceText* texts() const {
        return reinterpret_cast<const DeviceText*>(table_.data());
    }

   private:
    DeviceBuffer device_, table_;
    std::unique_ptr<PinnedBuffer> host_;
};

} // namespace faiss_saap::gpu
