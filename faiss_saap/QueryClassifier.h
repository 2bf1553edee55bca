/// A trained query assigner: a small network that scores the cells.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <faiss/utils/AlignedTable.h>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/dtype.h>

namespace faiss_saap {

/// Sizes of a query classifier, which serves the query heads of a KV head.
/// Layers may be shared by them: all heads ask for the same keys, so what they
/// would learn is one function of the query.
struct ClassifierShape {
    int d = 0;               ///< head dimension
    int group = 1;           ///< query heads of the KV head
    int ncell = 0;           ///< cells scored
    int width = 128;         ///< of the hidden layers, 1 to 1,024
    /// residual blocks, 0 to 16; without one the hidden layer is rectified: a
    /// perceptron of two layers, as in the paper
    int depth = 0;
    /// one matrix of the input layer for the group; biases remain each head's
    bool share_input = true;
    bool share_trunk = true; ///< one trunk and output layer for the group

    /// Networks behind the input layers: 1 or group.
    int networks() const {
        return share_trunk ? 1 : group;
    }
    bool operator==(const ClassifierShape& other) const;
    /// @throws faiss::FaissException naming the field that is out of range
    void check() const;
};

/// One layer of the network in a flat array of parameters: `networks` matrices
/// of rows * cols, row-major, and as many biases of `rows`, or more where heads
/// that share a matrix have biases of their own.
struct ClassifierLayer {
    std::string name; ///< "in", "block0.up", "block0.down", ..., "out"
    int networks = 0, bias_networks = 0, rows = 0, cols = 0;
    int64_t weight = 0; ///< where the weights begin
    int64_t bias = 0;   ///< where the biases begin

    int64_t weights() const { ///< how many
        return int64_t(networks) * rows * cols;
    }
    int64_t biases() const { ///< how many
        return int64_t(bias_networks) * rows;
    }
};

/// The layers in the order of computation. For query head g with input layer
/// i = share_input ? 0 : g and network t = share_trunk ? 0 : g,
///     h = in[i] x + bias[g], or relu(in[i] x + bias[g]) where depth = 0;
///     for each block: h += down[t] relu(up[t] h + bias) + bias;
///     scores = out[t] h + bias.
std::vector<ClassifierLayer> classifier_layers(const ClassifierShape& shape);

/// Size of the flat array.
int64_t parameter_count(const ClassifierShape& shape);

/// Scores the cells of a partition of de-rotated keys from the pre-RoPE query
/// alone, by a network that was trained on true attention weights.
/// Needs NEEDS_PRE_ROPE, and NEEDS_HEAD where group > 1.
///
/// Weights are kept as bfloat16 or float32, biases as float32. A row of weights
/// is padded with zeros to a multiple of 8 elements, so that every row begins
/// at a multiple of 16 bytes and a warp reads it in coalesced 16-byte loads.
/// One vector is scored without allocating memory; many go through BLAS.
struct QueryClassifier : CellAssigner {
    ClassifierShape shape;
    DType dtype; ///< of the weights

    /// @param parameters  size parameter_count(shape), finite
    /// @param dtype       DType::bfloat16 or DType::float32
    /// @throws faiss::FaissException when the shape is out of range or a
    ///         parameter is not finite
    QueryClassifier(
            const ClassifierShape& shape,
            const float* parameters,
            DType dtype = DType::bfloat16);

    /// @throws faiss::FaissException also for a head outside 0 .. group - 1
    void scores(const RoutingInput&, const CellStats*, float*) const override;
    void assign(const RoutingInput&, const CellStats*, int k, int32_t*, float*)
            const override;
    /// All query heads of the group together.
    size_t bytes_read() const override;

    /// The parameters as they are used: rounded to `dtype`.
    std::vector<float> parameters() const;

    /// A layer as it is stored.
    struct StoredLayer {
        ClassifierLayer layer;
        int padded_cols = 0;   ///< a multiple of 8
        size_t weight = 0;     ///< byte where it begins in `weights`
        size_t bias = 0;       ///< where it begins in `biases`
    };
    const std::vector<StoredLayer>& layers() const {
        return layers_;
    }
    /// Matrices of networks * rows * padded_cols, of `dtype`, aligned to 64
    /// bytes.
    const uint8_t* weights() const {
        return weights_.data();
    }
    const float* biases() const {
        return biases_.data();
    }

   private:
    void score_one(const float* x, int head, float* scores) const;
    void score_many(
            const RoutingInput& input,
            const std::vector<int64_t>& rows,
            int head,
            float* scores) const;
    /// What a query head is served by.
    const uint8_t* matrix(const StoredLayer& layer, int head) const;
    const float* bias(const StoredLayer& layer, int head) const;

    std::vector<StoredLayer> layers_;
    faiss::AlignedTableTightAlloc<uint8_t, 64> weights_;
    std::vector<float> biases_;
};

} // namespace faiss_saap
