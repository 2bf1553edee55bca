#include "CellScorer.h"

#include <cuda_bf16.h>

#include <faiss_saap/gpu/assign_cells.h>

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

__global__ void relu_kernel(int64_t size, float* x) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size && x[i] < 0) {
        x[i] = 0.0f;
    }
}

__global__ void add_kernel(int64_t size, const float* y, float* x) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size) {
        x[i] += y[i];
    }
}

template <class T>
__global__ void unpack_kernel(
        int64_t size,
        int ncol,
        int padded_cols,
        const T* from,
        float* to) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size) {
        to[i] = static_cast<float>(from[i / ncol * padded_cols + i % ncol]);
    }
}

unsigned blocks(int64_t size) {
    return static_cast<unsigned>((size + kThreads - 1) / kThreads);
}

} // namespace

CellScorer::CellScorer(const DeviceAssigner& a, const StreamMemory& memory)
        : memory_(memory) {
    FAISS_THROW_IF_NOT_MSG(
            !a.blend,
            "the query assigner reads statistics of a sequence's cells, an index "
            "keeps none");
    int cols = a.d;
    if (a.input == RowInput::hidden) {
        for (int l = 0; l <= 2 * a.depth; l++) {
            layers_.push_back(unpack(
                    a.layer[l],
                    a.layer_bias[l],
                    a.bf16,
                    a.width,
                    cols,
                    l == 0 ? a.padded_d : a.padded_width));
            cols = a.width;
        }
    }
    layers_.push_back(unpack(a.rows, a.bias, a.bf16, a.ncell, cols, a.padded_cols));
}

CellScorer::Layer CellScorer::unpack(
        const void* rows,
        const float* bias,
        bool bf16,
        int nrow,
        int ncol,
        int padded_cols) const {
    Layer layer;
    layer.rows = nrow;
    layer.cols = ncol;
    const int64_t size = int64_t(nrow) * ncol;
    layer.weights = StreamBuffer<float>(memory_, size);
    const auto run = [&](auto kernel, const auto* from) {
        kernel<<<blocks(size), kThreads, 0, memory_.stream>>>(
                size, ncol, padded_cols, from, layer.weights.get());
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    };
    if (bf16) {
        run(unpack_kernel<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(rows));
    } else {
        run(unpack_kernel<float>, static_cast<const float*>(rows));
    }
    if (bias) {
        layer.bias = StreamBuffer<float>(memory_, nrow);
        copy_async(layer.bias.get(), bias, nrow, memory_.stream);
    }
    return layer;
}

void CellScorer::apply(const Layer& layer, int64_t n, const float* x, float* y)
        const {
    ScoreCellsParams p;
    p.n = n, p.d = layer.cols, p.ncell = layer.rows;
    p.x = x, p.x_row_stride = layer.cols;
    p.centroids = layer.weights.get();
    p.bias = layer.bias.get();
    p.scores = y, p.scores_row_stride = layer.rows;
    score_cells(p, memory_.stream);
}

void CellScorer::assign(int64_t n, const float* x, int32_t* cells) const {
    const Layer& layer = layers_.back();
    AssignCellsParams p;
    p.n = n, p.d = layer.cols, p.ncell = layer.rows;
    p.x = x, p.x_row_stride = layer.cols;
    p.centroids = layer.weights.get();
    p.bias = layer.bias.get();
    p.cells = cells;
    assign_cells(p, memory_.stream);
}

void CellScorer::scores(int64_t n, const float* x, float* scores) const {
    if (layers_.size() == 1) {
        apply(layers_.back(), n, x, scores);
        return;
    }
    const int64_t size = n * layers_.front().rows;
    const StreamBuffer<float> h(memory_, size), u(memory_, size), v(memory_, size);
    const auto rectify = [&](float* y) {
        if (size > 0) {
            relu_kernel<<<blocks(size), kThreads, 0, memory_.stream>>>(size, y);
            FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
        }
    };
    apply(layers_.front(), n, x, h.get());
    if (layers_.size() == 2) {
        rectify(h.get());
    }
    for (size_t l = 1; l + 1 < layers_.size() && n > 0; l += 2) {
        apply(layers_[l], n, h.get(), u.get());
        rectify(u.get());
        apply(layers_[l + 1], n, u.get(), v.get());
        add_kernel<<<blocks(size), kThreads, 0, memory_.stream>>>(
                size, v.get(), h.get());
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    }
    apply(layers_.back(), n, h.get(), scores);
}

int CellScorer::temporary_floats() const {
    return layers_.size() == 1 ? 0 : 3 * layers_.front().rows;
}

} // namespace faiss_saap::gpu
