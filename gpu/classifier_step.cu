#include "classifier_step.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

void check(cublasStatus_t status, const char* call) {
    FAISS_THROW_IF_NOT_FMT(
            status == CUBLAS_STATUS_SUCCESS,
            "cuBLAS: %s: %s",
            call,
            cublasGetStatusString(status));
}

unsigned blocks_of(int64_t n) {
    return static_cast<unsigned>((n + kThreads - 1) / kThreads);
}

/// Rows of a layer's output: each of `networks`, by their biases, has `n` of a KV head's.
struct Rows {
    int networks, n, width;
    int64_t count; ///< parameters of a KV head
};

/// @param rows   of a KV head
/// @param count  parameters of one
Rows rows_of(const ClassifierLayer& layer, int rows, int64_t count) {
    return {layer.bias_networks, rows / layer.bias_networks, layer.rows, count};
}

/// y <- bias [+ add]
__global__ void start_with_bias(
        Rows rows,
        int64_t size,
        const float* bias,
        const float* add,
        float* y) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < size) {
        const int64_t row = i / rows.width;
        const int64_t network = row / rows.n;
        const int64_t head = network / rows.networks;
        y[i] = bias[head * rows.count + network % rows.networks * rows.width +
                    i % rows.width] +
                (add ? add[i] : 0.0f);
    }
}

__global__ void relu(int64_t size, float* y) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < size) {
        y[i] = y[i] < 0 ? 0.0f : y[i]; // NaN stays
    }
}

/// Gradient through a relu that gave y.
__global__ void through_relu(int64_t size, const float* y, float* dy) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < size && !(y[i] > 0)) {
        dy[i] = 0;
    }
}

constexpr int kSumColumns = 32, kSumRows = 32;

/// Sums over the rows of a network, in an order that depends on their number
/// alone. A block has kSumColumns columns.
__global__ void sum_rows(Rows rows, const float* dy, float* bias) {
    __shared__ float sums[kSumRows][kSumColumns + 1];
    const int64_t network = blockIdx.y;
    const int column = blockIdx.x * kSumColumns + threadIdx.x;
    float sum = 0;
    if (column < rows.width) {
        const float* from = dy + network * rows.n * rows.width + column;
        for (int i = threadIdx.y; i < rows.n; i += kSumRows) {
            sum += from[int64_t(i) * rows.width];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSumRows / 2; half; half /= 2) {
        if (threadIdx.y < half) {
            sums[threadIdx.y][threadIdx.x] +=
                    sums[threadIdx.y + half][threadIdx.x];
        }
        __syncthreads();
    }
    if (threadIdx.y == 0 && column < rows.width) {
        bias[network / rows.networks * rows.count +
             network % rows.networks * rows.width + column] =
                sums[0][threadIdx.x];
    }
}

/// The sum, or the largest, over a block.
template <bool kLargest, class T>
__device__ T over_block(T x) {
    __shared__ T of_warp[kThreads / 32];
    const auto both = [](T a, T b) { return kLargest ? max(a, b) : a + b; };
    for (int apart = 16; apart; apart /= 2) {
        x = both(x, __shfl_xor_sync(~0u, x, apart));
    }
    __syncthreads(); // what was there has been read
    if (threadIdx.x % 32 == 0) {
        of_warp[threadIdx.x / 32] = x;
    }
    __syncthreads();
    T all = of_warp[0];
    for (int w = 1; w < kThreads / 32; w++) {
        all = both(all, of_warp[w]);
    }
    return all;
}

/// Logits become their gradient; a block for each row.
__global__ void __launch_bounds__(kThreads) cross_entropy(
        DeviceClassifierBatch b,
        int group,
        int batch,
        int ncell,
        float* all_logits,
        float* loss) {
    const int64_t row = blockIdx.x;
    const int64_t head = row / batch; // query head, of all KV heads
    const float* mass = b.mass + row * ncell;
    const float* log_count =
            b.log_count + (head / group * batch + row % batch) * ncell;
    float* logits = all_logits + row * ncell;
    float total = 0, largest = -INFINITY;
    for (int c = threadIdx.x; c < ncell; c += kThreads) {
        total += mass[c];
        largest = fmaxf(largest, logits[c] + log_count[c]);
    }
    total = over_block<false>(total);
    const float of_head = b.far_mass[head];
    const float weight =
            (of_head > 0 ? powf(total / of_head, b.mass_power) : 1.0f) /
            static_cast<float>(batch * group);
    if (!(total > 0) || weight == 0) {
        for (int c = threadIdx.x; c < ncell; c += kThreads) {
            logits[c] = 0;
        }
        if (threadIdx.x == 0) {
            loss[row] = 0;
        }
        return;
    }
    largest = over_block<true>(largest);
    // sum of p * z: empty cells have no mass, and -infinity times it is NaN
    float sum = 0, product = 0;
    for (int c = threadIdx.x; c < ncell; c += kThreads) {
        const float z = logits[c] + log_count[c] - largest;
        if (z > -INFINITY) {
            product += mass[c] * z;
            sum += expf(z);
        }
    }
    sum = over_block<false>(sum);
    product = over_block<false>(product);
    for (int c = threadIdx.x; c < ncell; c += kThreads) {
        const float z = logits[c] + log_count[c] - largest;
        const float p = z > -INFINITY ? expf(z) / sum : 0.0f;
        logits[c] = weight * (p - mass[c] / total);
    }
    if (threadIdx.x == 0) {
        loss[row] = weight * (logf(sum) - product / total);
    }
}

/// A block for each KV head.
__global__ void __launch_bounds__(kThreads) sum_loss(
        int rows,
        const float* row_loss,
        double* loss) {
    double sum = 0;
    for (int i = threadIdx.x; i < rows; i += kThreads) {
        sum += row_loss[int64_t(blockIdx.x) * rows + i];
    }
    sum = over_block<false>(sum);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = sum;
    }
}

} // namespace

/// c <- a b + beta c for the KV heads, in the column order of cuBLAS.
struct ClassifierStep::Product {
    bool a_transposed, b_transposed;
    int m, n, k;
    const float* a;
    int lda;
    int64_t a_stride; ///< from KV head to KV head
    const float* b;
    int ldb;
    int64_t b_stride;
    float beta;
    float* c;
    int ldc;
    int64_t c_stride;
};

ClassifierStep::ClassifierStep(
        const ClassifierShape& shape,
        int nhead,
        int batch,
        bool tf32,
        cudaStream_t stream)
        : shape_(shape),
          layers_(classifier_layers(shape)),
          count_(parameter_count(shape)),
          nhead_(nhead),
          batch_(batch),
          stream_(stream),
          hidden_(shape.depth + 1),
          up_(shape.depth) {
    const int64_t rows = int64_t(nhead) * shape.group * batch;
    const auto lay = [&](char* base) {
        Layout layout(base);
        for (auto* all : {&hidden_, &up_}) {
            for (float*& matrix : *all) {
                matrix = layout.take<float>(rows * shape.width);
            }
        }
        gradient_h_ = layout.take<float>(rows * shape.width);
        gradient_u_ = layout.take<float>(rows * shape.width);
        logits_ = layout.take<float>(rows * shape.ncell);
        row_loss_ = layout.take<float>(rows);
        return layout.size();
    };
    memory_ = DeviceBuffer(lay(nullptr), stream);
    lay(memory_.data());
    check(cublasCreate(&blas_), "cublasCreate");
    check(cublasSetStream(blas_, stream), "cublasSetStream");
    check(cublasSetMathMode(
                  blas_,
                  tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH),
          "cublasSetMathMode");
}

ClassifierStep::~ClassifierStep() {
    cublasDestroy(blas_);
}

void ClassifierStep::multiply(const Product& p) {
    const float one = 1;
    check(cublasSgemmStridedBatched(
                  blas_,
                  p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                  p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                  p.m,
                  p.n,
                  p.k,
                  &one,
                  p.a,
                  p.lda,
                  p.a_stride,
                  p.b,
                  p.ldb,
                  p.b_stride,
                  &p.beta,
                  p.c,
                  p.ldc,
                  p.c_stride,
                  nhead_),
          "cublasSgemmStridedBatched");
}

/// y <- W x + bias [+ add]
void ClassifierStep::forward(
        const ClassifierLayer& layer,
        const float* parameters,
        const float* x,
        const float* add,
        float* y) {
    const int all = shape_.group * batch_; // rows of a KV head
    const int n = all / layer.networks;
    const int64_t size = int64_t(nhead_) * all * layer.rows;
    start_with_bias<<<blocks_of(size), kThreads, 0, stream_>>>(
            rows_of(layer, all, count_),
            size,
            parameters + layer.bias,
            add,
            y);
    for (int t = 0; t < layer.networks; t++) {
        Product p;
        p.a_transposed = true;
        p.b_transposed = false;
        p.m = layer.rows;
        p.n = n;
        p.k = layer.cols;
        p.a = parameters + layer.weight + int64_t(t) * layer.rows * layer.cols;
        p.lda = layer.cols;
        p.a_stride = count_;
        p.b = x + int64_t(t) * n * layer.cols;
        p.ldb = layer.cols;
        p.b_stride = int64_t(all) * layer.cols;
        p.beta = 1;
        p.c = y + int64_t(t) * n * layer.rows;
        p.ldc = layer.rows;
        p.c_stride = int64_t(all) * layer.rows;
        multiply(p);
    }
}

/// Gradient of weights and biases.
/// @param dx   null, or output: gradient of x
/// @param add  to what dx holds
void ClassifierStep::backward(
        const ClassifierLayer& layer,
        const float* parameters,
        const float* x,
        const float* dy,
        float* gradient,
        float* dx,
        bool add) {
    const int all = shape_.group * batch_;
    const int n = all / layer.networks;
    sum_rows<<<
            dim3((layer.rows + kSumColumns - 1) / kSumColumns,
                 nhead_ * layer.bias_networks),
            dim3(kSumColumns, kSumRows),
            0,
            stream_>>>(
            rows_of(layer, all, count_),
            dy,
            gradient + layer.bias);
    for (int t = 0; t < layer.networks; t++) {
        const int64_t matrix =
                layer.weight + int64_t(t) * layer.rows * layer.cols;
        const float* rows = dy + int64_t(t) * n * layer.rows;
        Product p;
        p.a_transposed = false;
        p.b_transposed = true;
        p.m = layer.cols;
        p.n = layer.rows;
        p.k = n;
        p.a = x + int64_t(t) * n * layer.cols;
        p.lda = layer.cols;
        p.a_stride = int64_t(all) * layer.cols;
        p.b = rows;
        p.ldb = layer.rows;
        p.b_stride = int64_t(all) * layer.rows;
        p.beta = 0;
        p.c = gradient + matrix;
        p.ldc = layer.cols;
        p.c_stride = count_;
        multiply(p);
        if (dx) {
            p.b_transposed = false;
            p.n = n;
            p.k = layer.rows;
            p.a = parameters + matrix;
            p.a_stride = count_;
            p.beta = add ? 1 : 0;
            p.c = dx + int64_t(t) * n * layer.cols;
            p.c_stride = int64_t(all) * layer.cols;
            multiply(p);
        }
    }
}

void ClassifierStep::gradient(
        const DeviceClassifierBatch& batch,
        const float* parameters,
        float* gradient,
        double* loss) {
    const int depth = shape_.depth;
    const int64_t rows = int64_t(nhead_) * shape_.group * batch_;
    const int64_t size = rows * shape_.width;
    forward(layers_[0], parameters, batch.x, nullptr, hidden_[0]);
    if (depth == 0) {
        relu<<<blocks_of(size), kThreads, 0, stream_>>>(size, hidden_[0]);
    }
    for (int b = 0; b < depth; b++) {
        forward(layers_[1 + 2 * b], parameters, hidden_[b], nullptr, up_[b]);
        relu<<<blocks_of(size), kThreads, 0, stream_>>>(size, up_[b]);
        forward(layers_[2 + 2 * b],
                parameters,
                up_[b],
                hidden_[b],
                hidden_[b + 1]);
    }
    const ClassifierLayer& last = layers_.back();
    forward(last, parameters, hidden_[depth], nullptr, logits_);

    cross_entropy<<<static_cast<unsigned>(rows), kThreads, 0, stream_>>>(
            batch, shape_.group, batch_, shape_.ncell, logits_, row_loss_);
    sum_loss<<<nhead_, kThreads, 0, stream_>>>(
            shape_.group * batch_, row_loss_, loss);

    float *dh = gradient_h_, *du = gradient_u_;
    backward(last, parameters, hidden_[depth], logits_, gradient, dh, false);
    for (int b = depth - 1; b >= 0; b--) {
        backward(layers_[2 + 2 * b], parameters, up_[b], dh, gradient, du, false);
        through_relu<<<blocks_of(size), kThreads, 0, stream_>>>(
                size, up_[b], du);
        // The gradient through the block is added to the one that passes by.
        backward(layers_[1 + 2 * b], parameters, hidden_[b], du, gradient, dh, true);
    }
    if (depth == 0) {
        through_relu<<<blocks_of(size), kThreads, 0, stream_>>>(
                size, hidden_[0], dh);
    }
    backward(layers_[0], parameters, batch.x, dh, gradient, nullptr, false);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
