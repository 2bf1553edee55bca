/// The gradient of a mini-batch, for the classifiers of all KV heads of a layer at
/// once.
#pragma once

#include <cublas_v2.h>

#include <faiss_saap/QueryClassifier.h>

#include "DeviceBuffer.h"

namespace faiss_saap::gpu {

/// Queries and targets, as attention_targets() makes them: matrices have a row for
/// each KV head, query head of its group and token, in this order.
struct DeviceClassifierBatch {
    const float* x = nullptr;         ///< rows of d
    const float* mass = nullptr;      ///< rows of ncell
    const float* log_count = nullptr; ///< a row of ncell for each token
    /// by which far mass is divided before it is a weight, size nhead * group
    const float* far_mass = nullptr;
    float mass_power = 1;
};

/// classifier_loss() on the device: the same network and loss, each layer one
/// batched product of all KV heads. The same input gives the same bits.
class ClassifierStep {
   public:
    /// @param nhead   KV heads, each with parameter_count(shape) parameters
    /// @param batch   tokens of a mini-batch
    /// @param tf32    factors of products are rounded to 11 bits, sums are float32
    /// @throws faiss::FaissException when the device has no room
    ClassifierStep(
            const ClassifierShape& shape,
            int nhead,
            int batch,
            bool tf32,
            cudaStream_t stream);
    ~ClassifierStep();
    ClassifierStep(const ClassifierStep&) = delete;
    ClassifierStep& operator=(const ClassifierStep&) = delete;

    /// @param parameters  size nhead * parameter_count(shape)
    /// @param gradient    output, likewise
    /// @param loss        output, size nhead: of the batch
    void gradient(
            const DeviceClassifierBatch& batch,
            const float* parameters,
            float* gradient,
            double* loss);

   private:
    struct Product;
    void multiply(const Product& product);
    void forward(
            const ClassifierLayer& layer,
            const float* parameters,
            const float* x,
            const float* add,
            float* y);
    void backward(
            const ClassifierLayer& layer,
            const float* parameters,
            const float* x,
            const float* dy,
            float* gradient,
            float* dx,
            bool add);

    ClassifierShape shape_;
    std::vector<ClassifierLayer> layers_;
    int64_t count_; ///< parameters of a KV head
    int nhead_, batch_;
    cudaStream_t stream_;
    cublasHandle_t blas_ = nullptr;
    DeviceBuffer memory_;
    std::vector<float*> hidden_, up_;
    float *logits_ = nullptr, *gradient_h_ = nullptr, *gradient_u_ = nullptr;
    float* row_loss_ = nullptr;
};

} // namespace faiss_saap::gpu
