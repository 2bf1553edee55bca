#include <faiss_saap/QueryClassifier.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blas.h"
#include "check.h"
#include "classifier_kernels.h"
#include "top_cells.h"

namespace faiss_saap {

namespace {

constexpr int kMaxWidth = 1024, kMaxD = 1024, kMaxDepth = 16;
/// Fewer vectors of one head than this are scored one by one: BLAS wants the
/// weights as float, and converting them costs as much as some queries.
constexpr size_t kBatch = 16;
/// Vectors of a batch at a time, so that memory does not grow with it.
constexpr size_t kBlock = 256;

int padded(int cols) {
    return (cols + 7) / 8 * 8;
}

/// Checked before the base is made from it.
const ClassifierShape& checked(const ClassifierShape& shape) {
    shape.check();
    return shape;
}

} // namespace

bool ClassifierShape::operator==(const ClassifierShape& o) const {
    return d == o.d && group == o.group && ncell == o.ncell &&
            width == o.width && depth == o.depth &&
            share_input == o.share_input && share_trunk == o.share_trunk;
}

void ClassifierShape::check() const {
    const auto range = [](const char* name, int value, int least, int most) {
        FAISS_THROW_IF_NOT_FMT(
                value >= least && value <= most,
                "classifier: %s = %d must be between %d and %d",
                name,
                value,
                least,
                most);
    };
    range("d", d, 1, kMaxD);
    range("group", group, 1, 1024);
    range("ncell", ncell, 1, 65536);
    range("width", width, 1, kMaxWidth);
    range("depth", depth, 0, kMaxDepth);
}

std::vector<ClassifierLayer> classifier_layers(const ClassifierShape& s) {
    s.check();
    std::vector<ClassifierLayer> layers;
    const int nets = s.networks();
    int64_t at = 0;
    const auto add = [&](const std::string& name,
                         int nets,
                         int bias_nets,
                         int rows,
                         int cols) {
        ClassifierLayer layer;
        layer.name = name;
        layer.networks = nets;
        layer.bias_networks = bias_nets;
        layer.rows = rows;
        layer.cols = cols;
        layer.weight = at;
        at += layer.weights();
        layer.bias = at;
        at += layer.biases();
        layers.push_back(layer);
    };
    add("in", s.share_input ? 1 : s.group, s.group, s.width, s.d);
    for (int b = 0; b < s.depth; b++) {
        const std::string block = "block" + std::to_string(b);
        add(block + ".up", nets, nets, s.width, s.width);
        add(block + ".down", nets, nets, s.width, s.width);
    }
    add("out", nets, nets, s.ncell, s.width);
    return layers;
}

int64_t parameter_count(const ClassifierShape& shape) {
    const ClassifierLayer last = classifier_layers(shape).back();
    return last.bias + last.biases();
}

QueryClassifier::QueryClassifier(
        const ClassifierShape& s,
        const float* parameters,
        DType type)
        : CellAssigner(
                  checked(s).d,
                  s.ncell,
                  NEEDS_PRE_ROPE | (s.group > 1 ? NEEDS_HEAD : 0u)),
          shape(s),
          dtype(type) {
    group = shape.group > 1 ? shape.group : 0;
    FAISS_THROW_IF_NOT_FMT(
            dtype == DType::bfloat16 || dtype == DType::float32,
            "classifier: weights of type %s, there are float32 and bfloat16",
            name(dtype));
    FAISS_THROW_IF_NOT_MSG(parameters, "parameters is null");
    size_t bytes = 0, biases = 0;
    for (const ClassifierLayer& layer : classifier_layers(shape)) {
        StoredLayer stored;
        stored.layer = layer;
        stored.padded_cols = padded(layer.cols);
        stored.weight = bytes;
        stored.bias = biases;
        bytes += size_t(layer.networks) * layer.rows * stored.padded_cols *
                element_size(dtype);
        biases += layer.biases();
        layers_.push_back(stored);
        check_finite(
                parameters + layer.weight,
                1,
                layer.weights() + layer.biases(),
                ("classifier: layer '" + layer.name + "'").c_str());
    }
    weights_.resize(bytes);
    weights_.clear(); // zeros in the padding
    biases_.resize(biases);
    for (const StoredLayer& stored : layers_) {
        const ClassifierLayer& layer = stored.layer;
        const int64_t rows = int64_t(layer.networks) * layer.rows;
        for (int64_t r = 0; r < rows; r++) {
            from_float(
                    dtype,
                    parameters + layer.weight + r * layer.cols,
                    layer.cols,
                    weights_.data() + stored.weight +
                            r * stored.padded_cols * element_size(dtype));
        }
        std::copy_n(
                parameters + layer.bias,
                layer.biases(),
                biases_.data() + stored.bias);
    }
}

const uint8_t* QueryClassifier::matrix(const StoredLayer& stored, int head)
        const {
    const int network = stored.layer.networks > 1 ? head : 0;
    return weights_.data() + stored.weight +
            size_t(network) * stored.layer.rows * stored.padded_cols *
            element_size(dtype);
}

const float* QueryClassifier::bias(const StoredLayer& stored, int head) const {
    const int network = stored.layer.bias_networks > 1 ? head : 0;
    return biases_.data() + stored.bias + size_t(network) * stored.layer.rows;
}

std::vector<float> QueryClassifier::parameters() const {
    std::vector<float> all(parameter_count(shape));
    for (const StoredLayer& stored : layers_) {
        const ClassifierLayer& layer = stored.layer;
        const int64_t rows = int64_t(layer.networks) * layer.rows;
        for (int64_t r = 0; r < rows; r++) {
            to_float(
                    dtype,
                    weights_.data() + stored.weight +
                            r * stored.padded_cols * element_size(dtype),
                    layer.cols,
                    all.data() + layer.weight + r * layer.cols);
        }
        std::copy_n(
                biases_.data() + stored.bias,
                layer.biases(),
                all.data() + layer.bias);
    }
    return all;
}

void QueryClassifier::score_one(const float* x, int head, float* scores)
        const {
    alignas(64) float h[kMaxWidth], u[kMaxWidth], padded_x[kMaxD];
    std::copy_n(x, d, padded_x);
    std::fill(padded_x + d, padded_x + padded(d), 0.0f);
    // Rows beyond the width are never written, and read as padding.
    std::fill(h + shape.width, h + padded(shape.width), 0.0f);
    std::fill(u + shape.width, u + padded(shape.width), 0.0f);
    DenseLayerParams p;
    p.type = dtype;
    const auto run = [&](const StoredLayer& stored, const float* from, float* to) {
        p.w = matrix(stored, head);
        p.bias = bias(stored, head);
        p.rows = stored.layer.rows;
        p.cols = stored.padded_cols;
        p.x = from;
        p.y = to;
        dense_layer(p);
    };
    p.relu = shape.depth == 0;
    run(layers_.front(), padded_x, h);
    p.relu = false;
    for (int b = 0; b < shape.depth; b++) {
        p.relu = true;
        run(layers_[1 + 2 * b], h, u);
        p.relu = false;
        p.add = true;
        run(layers_[2 + 2 * b], u, h);
        p.add = false;
    }
    run(layers_.back(), h, scores);
}

void QueryClassifier::score_many(
        const RoutingInput& input,
        const std::vector<int64_t>& rows,
        int head,
        float* scores) const {
    const int w = shape.width;
    // The weights as float, once for all rows.
    std::vector<std::vector<float>> wide;
    for (const StoredLayer& stored : layers_) {
        const int64_t size =
                int64_t(stored.layer.rows) * stored.padded_cols;
        wide.emplace_back(size);
        to_float(dtype, matrix(stored, head), size, wide.back().data());
    }
    const size_t block = std::min(kBlock, rows.size());
    std::vector<float> x(block * d), h(block * w), u(block * w);
    std::vector<float> out(block * ncell);
    for (size_t begin = 0; begin < rows.size(); begin += block) {
        const size_t n = std::min(block, rows.size() - begin);
        const auto run = [&](size_t l, const float* from, float* to) {
            const StoredLayer& stored = layers_[l];
            const int m = stored.layer.rows;
            const float* start = bias(stored, head);
            for (size_t i = 0; i < n; i++) {
                for (int r = 0; r < m; r++) {
                    float& y = to[i * m + r];
                    y = start[r] + (to == h.data() && l > 0 ? y : 0.0f);
                }
            }
            multiply_nt(
                    n,
                    m,
                    stored.layer.cols,
                    from,
                    stored.layer.cols,
                    wide[l].data(),
                    stored.padded_cols,
                    1,
                    to,
                    m);
        };
        for (size_t i = 0; i < n; i++) {
            std::copy_n(
                    input.pre_rope + rows[begin + i] * d, d, x.data() + i * d);
        }
        run(0, x.data(), h.data());
        if (shape.depth == 0) {
            rectify(h);
        }
        for (int b = 0; b < shape.depth; b++) {
            run(1 + 2 * b, h.data(), u.data());
            rectify(u);
            run(2 + 2 * b, u.data(), h.data());
        }
        run(layers_.size() - 1, h.data(), out.data());
        for (size_t i = 0; i < n; i++) {
            std::copy_n(
                    out.data() + i * ncell,
                    ncell,
                    scores + rows[begin + i] * ncell);
        }
    }
}

void QueryClassifier::scores(
        const RoutingInput& input,
        const CellStats* stats,
        float* scores) const {
    check(input, stats);
    const auto head_of = [&](int64_t i) {
        return shape.group > 1 ? input.head[i] : 0;
    };
    for (int64_t i = 0; i < input.n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                head_of(i) >= 0 && head_of(i) < shape.group,
                "input.head[%lld] = %d, the classifier has %d query heads",
                static_cast<long long>(i),
                head_of(i),
                shape.group);
    }
    if (input.n < static_cast<int64_t>(kBatch)) {
        for (int64_t i = 0; i < input.n; i++) {
            score_one(input.pre_rope + i * d, head_of(i), scores + i * ncell);
        }
        return;
    }
    for (int g = 0; g < shape.group; g++) {
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < input.n; i++) {
            if (head_of(i) == g) {
                rows.push_back(i);
            }
        }
        if (rows.size() >= kBatch) {
            score_many(input, rows, g, scores);
            continue;
        }
        for (int64_t i : rows) {
            score_one(input.pre_rope + i * d, g, scores + i * ncell);
        }
    }
}

void QueryClassifier::assign(
        const RoutingInput& input,
        const CellStats* stats,
        int k,
        int32_t* cells,
        float* best_scores) const {
    if (input.n != 1) {
        CellAssigner::assign(input, stats, k, cells, best_scores);
        return;
    }
    check_k(k);
    // One query at a time is how decoding asks: scratch is kept by the thread.
    thread_local std::vector<float> all;
    thread_local std::vector<int32_t> order;
    if (all.size() < static_cast<size_t>(ncell)) {
        all.resize(ncell);
        order.resize(ncell);
    }
    scores(input, stats, all.data());
    top_cells(ncell, all.data(), k, order.data(), cells, best_scores);
}

size_t QueryClassifier::bytes_read() const {
    return weights_.nbytes() + biases_.size() * sizeof(float);
}

} // namespace faiss_saap
