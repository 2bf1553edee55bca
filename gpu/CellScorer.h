/// Cells of many vectors at once, for an index.
#pragma once

#include <cstdint>
#include <vector>

#include "StreamBuffer.h"
#include "sequence_state.h"

namespace faiss_saap::gpu {

/// A lowered assigner that reads the vector alone: a flat quantizer, or a
/// classifier of one query head. A classifier's layers are scores too, of the
/// rows of its matrices with its biases, so that there is one kernel for all.
class CellScorer {
   public:
    /// @param assigner  its arrays are copied, as float32 without padding
    /// @throws faiss::FaissException for an assigner that reads statistics of
    ///         cells, or when memory is short
    CellScorer(const DeviceAssigner& assigner, const StreamMemory& memory);

    /// Best cell of each vector. Needs a quantizer.
    /// @param x      device memory, size n * d
    /// @param cells  output, device memory, size n
    void assign(int64_t n, const float* x, int32_t* cells) const;

    /// @param scores  output, device memory, size n * ncell
    void scores(int64_t n, const float* x, float* scores) const;
    /// Floats of temporary memory per vector that `scores` takes.
    int temporary_floats() const;

   private:
    /// y = rows x + bias
    struct Layer {
        int rows = 0, cols = 0;
        StreamBuffer<float> weights, bias;
    };
    Layer unpack(
            const void* rows,
            const float* bias,
            bool bf16,
            int nrow,
            int ncol,
            int padded_cols) const;
    void apply(const Layer& layer, int64_t n, const float* x, float* y) const;

    StreamMemory memory_;
    std::vector<Layer> layers_; ///< the last one scores the cells
};

} // namespace faiss_saap::gpu
