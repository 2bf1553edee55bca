#include "LoweredAssigner.h"

#include <algorithm>
#include <typeinfo>

#include <faiss/IndexFlat.h>

#include <faiss_saap/QuantizerAssigner.h>
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

unsigned blocks(int64_t size) {
    return static_cast<unsigned>((size + kThreads - 1) / kThreads);
}

const faiss::IndexFlat& flat(const QuantizerAssigner& assigner) {
    const auto* index =
            dynamic_cast<const faiss::IndexFlat*>(assigner.quantizer.get());
    FAISS_THROW_IF_NOT_FMT(
            index,
            "the assigner's quantizer is a %s: on the GPU it must be a "
            "faiss::IndexFlat",
            typeid(*assigner.quantizer).name());
    return *index;
}

} // namespace

LoweredAssigner::LoweredAssigner(
        const CellAssigner& assigner,
        const StreamMemory& memory)
        : memory_(memory), d_(assigner.d), ncell_(assigner.ncell) {
    const auto upload = [&](const float* from, size_t size) {
        weights_ = StreamBuffer<float>(memory_, size);
        copy_async(weights_.get(), from, size, memory_.stream);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory_.stream));
    };
    if (const auto* q = dynamic_cast<const QuantizerAssigner*>(&assigner)) {
        const faiss::IndexFlat& index = flat(*q);
        upload(index.get_xb(), size_t(ncell_) * d_);
        l2_ = index.metric_type == faiss::METRIC_L2;
        if (l2_) {
            bias_ = StreamBuffer<float>(memory_, ncell_);
            half_norms({ncell_, d_, weights_.get(), bias_.get()}, memory_.stream);
        }
    } else if (const auto* c = dynamic_cast<const QueryClassifier*>(&assigner)) {
        FAISS_THROW_IF_NOT_FMT(
                c->shape.group == 1,
                "the classifier has %d query heads, an index knows none",
                c->shape.group);
        layers_ = classifier_layers(c->shape);
        const std::vector<float> parameters = c->parameters();
        upload(parameters.data(), parameters.size());
    } else {
        FAISS_THROW_FMT(
                "the assigner is a %s: on the GPU there are QuantizerAssigner "
                "and QueryClassifier",
                typeid(assigner).name());
    }
}

void LoweredAssigner::multiply(
        int64_t n,
        const float* x,
        int cols,
        const float* rows,
        const float* bias,
        int nrow,
        float* y) const {
    ScoreCellsParams p;
    p.n = n, p.d = cols, p.ncell = nrow;
    p.x = x, p.x_row_stride = cols;
    p.centroids = rows;
    p.bias = bias;
    p.scores = y, p.scores_row_stride = nrow;
    score_cells(p, memory_.stream);
}

void LoweredAssigner::assign(int64_t n, const float* x, int32_t* cells) const {
    AssignCellsParams p;
    p.n = n, p.d = d_, p.ncell = ncell_;
    p.x = x, p.x_row_stride = d_;
    p.centroids = weights_.get();
    p.bias = bias_.get();
    p.cells = cells;
    assign_cells(p, memory_.stream);
}

void LoweredAssigner::scores(int64_t n, const float* x, float* scores) const {
    if (layers_.empty()) {
        multiply(n, x, d_, weights_.get(), bias_.get(), ncell_, scores);
        return;
    }
    const auto run = [&](const ClassifierLayer& layer, const float* from, float* to) {
        multiply(
                n,
                from,
                layer.cols,
                weights_.get() + layer.weight,
                weights_.get() + layer.bias,
                layer.rows,
                to);
    };
    const int width = layers_.front().rows;
    const int64_t size = n * width;
    const StreamBuffer<float> h(memory_, size), u(memory_, size), v(memory_, size);
    run(layers_.front(), x, h.get());
    for (size_t l = 1; l + 1 < layers_.size() && n > 0; l += 2) {
        run(layers_[l], h.get(), u.get());
        relu_kernel<<<blocks(size), kThreads, 0, memory_.stream>>>(size, u.get());
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
        run(layers_[l + 1], u.get(), v.get());
        add_kernel<<<blocks(size), kThreads, 0, memory_.stream>>>(
                size, v.get(), h.get());
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    }
    run(layers_.back(), h.get(), scores);
}

int LoweredAssigner::temporary_floats() const {
    return layers_.empty() ? 0 : 3 * layers_.front().rows;
}

} // namespace faiss_saap::gpu
