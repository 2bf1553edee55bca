/// The inner loops of the query classifier and of its training. Compiled for
/// several instruction sets, as vector_kernels.h.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/AdamWParams.h>
#include <faiss_saap/dtype.h>

namespace faiss_saap {

/// y <- [y +] W x + bias for one vector.
/// @param type  of the weights: bfloat16 or float32
/// @param w     rows * cols, cols a multiple of 8, zeros in the padding
/// @param x     size cols
struct DenseLayerParams {
    DType type = DType::bfloat16;
    const void* w = nullptr;
    const float* bias = nullptr; ///< size rows
    int rows = 0, cols = 0;
    const float* x = nullptr;
    bool add = false;  ///< to what y holds
    bool relu = false; ///< max(0, .) of the result
    float* y = nullptr; ///< size rows
};

void dense_layer(const DenseLayerParams& params);

/// max(0, .) of each unit; NaN stays.
inline void rectify(std::vector<float>& units) {
    for (float& unit : units) {
        unit = unit < 0 ? 0.0f : unit;
    }
}

/// Attention weights of one query, summed per cell.
/// @param n         keys 0 .. n - 1 are attended
/// @param scores    q.k, size n; overwritten
/// @param cells     size n
/// @param begin,end the keys whose mass is summed
/// @param mass      output, size ncell: the share of each cell
/// @return the sum of `mass`
float sum_attention_per_cell(
        int64_t n,
        float scale,
        float* scores,
        const int32_t* cells,
        int64_t begin,
        int64_t end,
        int ncell,
        float* mass);

/// Soft-target cross-entropy between mass / sum(mass) and the softmax of
/// logits + log_count, and its gradient.
/// @param logits     size n; overwritten with the gradient
/// @param log_count  size n, -infinity for empty cells
/// @param total      sum of mass, above 0
/// @param weight     of this query: factor of loss and gradient
/// @return weight * cross-entropy
float cross_entropy(
        int n,
        float* logits,
        const float* log_count,
        const float* mass,
        float total,
        float weight);

/// One step of AdamW on n parameters.
void adamw_step(
        int64_t n,
        const AdamWParams& params,
        const float* gradient,
        float* parameters,
        float* first,
        float* second);

} // namespace faiss_saap
