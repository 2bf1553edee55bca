#include <faiss_saap/classifier_loss.h>

#include <algorithm>

#include "blas.h"
#include "classifier_kernels.h"

namespace faiss_saap {

namespace {

/// A layer over all queries: rows of one head follow each other, so that a
/// network of one head is a block of rows and a shared one is all of them.
struct LayerPass {
    const ClassifierLayer& layer;
    int64_t rows; ///< of all heads
    const float* parameters;

    int64_t rows_per_network() const {
        return rows / layer.networks;
    }
    /// Calls body(begin, end, where the biases of these rows lie).
    template <class Body>
    void for_each_bias(const Body& body) const {
        const int64_t n = rows / layer.bias_networks;
        for (int t = 0; t < layer.bias_networks; t++) {
            body(t * n, (t + 1) * n, layer.bias + int64_t(t) * layer.rows);
        }
    }

    const float* weight(int t) const {
        return parameters + layer.weight + int64_t(t) * layer.rows * layer.cols;
    }

    /// y <- [y +] W x + bias
    void forward(const float* x, bool add, float* y) const {
        const int64_t n = rows_per_network();
        for_each_bias([&](int64_t begin, int64_t end, int64_t at) {
            const float* bias = parameters + at;
            for (int64_t i = begin; i < end; i++) {
                float* row = y + i * layer.rows;
                for (int r = 0; r < layer.rows; r++) {
                    row[r] = bias[r] + (add ? row[r] : 0.0f);
                }
            }
        });
        for (int t = 0; t < layer.networks; t++) {
            float* to = y + t * n * layer.rows;
            multiply_nt(
                    n,
                    layer.rows,
                    layer.cols,
                    x + t * n * layer.cols,
                    layer.cols,
                    weight(t),
                    layer.cols,
                    1,
                    to,
                    layer.rows);
        }
    }

    /// Adds to the gradient of weights and biases.
    /// @param dx  null, or output: gradient of x
    void backward(const float* x, const float* dy, float* gradient, float* dx)
            const {
        const int64_t n = rows_per_network();
        for_each_bias([&](int64_t begin, int64_t end, int64_t at) {
            float* bias = gradient + at;
            for (int64_t i = begin; i < end; i++) {
                for (int r = 0; r < layer.rows; r++) {
                    bias[r] += dy[i * layer.rows + r];
                }
            }
        });
        for (int t = 0; t < layer.networks; t++) {
            const float* from = dy + t * n * layer.rows;
            multiply_tn(
                    layer.rows,
                    layer.cols,
                    n,
                    from,
                    x + t * n * layer.cols,
                    1,
                    gradient + layer.weight +
                            int64_t(t) * layer.rows * layer.cols);
            if (dx) {
                multiply_nn(
                        n,
                        layer.cols,
                        layer.rows,
                        from,
                        weight(t),
                        0,
                        dx + t * n * layer.cols);
            }
        }
    }
};

/// Gradient through a rectifier that gave y.
void through_rectifier(const std::vector<float>& y, float* dy) {
    for (size_t i = 0; i < y.size(); i++) {
        dy[i] = y[i] > 0 ? dy[i] : 0.0f;
    }
}

} // namespace

double classifier_loss(
        const ClassifierShape& shape,
        const float* parameters,
        const ClassifierBatch& batch,
        float* gradient,
        ClassifierWorkspace& w) {
    const auto layers = classifier_layers(shape);
    const int64_t rows = shape.group * batch.n;
    const int depth = shape.depth, ncell = shape.ncell;
    const auto pass = [&](size_t l) {
        return LayerPass{layers[l], rows, parameters};
    };
    w.hidden.resize(depth + 1);
    w.up.resize(depth);
    for (auto* all : {&w.hidden, &w.up}) {
        for (auto& matrix : *all) {
            matrix.resize(rows * shape.width);
        }
    }
    w.logits.resize(rows * ncell);
    w.gradient_h.resize(rows * shape.width);
    w.gradient_u.resize(rows * shape.width);

    pass(0).forward(batch.x, false, w.hidden[0].data());
    if (depth == 0) {
        rectify(w.hidden[0]);
    }
    for (int b = 0; b < depth; b++) {
        pass(1 + 2 * b).forward(w.hidden[b].data(), false, w.up[b].data());
        rectify(w.up[b]);
        w.hidden[b + 1] = w.hidden[b];
        pass(2 + 2 * b).forward(w.up[b].data(), true, w.hidden[b + 1].data());
    }
    const size_t last = layers.size() - 1;
    pass(last).forward(w.hidden[depth].data(), false, w.logits.data());

    double loss = 0;
    for (int64_t i = 0; i < rows; i++) {
        float* logits = w.logits.data() + i * ncell;
        if (batch.weight[i] == 0 || batch.total[i] <= 0) {
            std::fill(logits, logits + ncell, 0.0f);
            continue;
        }
        loss += cross_entropy(
                ncell,
                logits,
                batch.log_count + i % batch.n * ncell,
                batch.mass + i * ncell,
                batch.total[i],
                batch.weight[i]);
    }

    float* dh = w.gradient_h.data();
    pass(last).backward(w.hidden[depth].data(), w.logits.data(), gradient, dh);
    for (int b = depth - 1; b >= 0; b--) {
        float* du = w.gradient_u.data();
        pass(2 + 2 * b).backward(w.up[b].data(), dh, gradient, du);
        through_rectifier(w.up[b], du);
        // The gradient through the block is added to the one that passes by.
        const LayerPass up = pass(1 + 2 * b);
        up.backward(w.hidden[b].data(), du, gradient, nullptr);
        for (int t = 0; t < up.layer.networks; t++) {
            const int64_t at = t * up.rows_per_network() * shape.width;
            multiply_nn(
                    up.rows_per_network(),
                    shape.width,
                    shape.width,
                    du + at,
                    up.weight(t),
                    1,
                    dh + at);
        }
    }
    if (depth == 0) {
        through_rectifier(w.hidden[0], dh);
    }
    pass(0).backward(batch.x, dh, gradient, nullptr);
    return loss;
}

} // namespace faiss_saap
