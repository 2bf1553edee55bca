/// Rotary position embedding: parameters, rotation and its exact inverse.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace faiss_saap {

/// Which two components of a vector turn together.
enum class RopeLayout {
    half,        ///< (i, i + d/2), as in Hugging Face
    interleaved, ///< (2i, 2i + 1), as in GGUF and the original Llama
};

/// How the frequencies are changed for contexts beyond the training length.
enum class RopeScaling {
    none,
    linear, ///< positions divided by `factor`
    ntk,    ///< theta multiplied by factor^(d / (d - 2))
    llama3, ///< low frequencies divided by `factor`, smooth in between
    yarn,   ///< a ramp between both, and vectors scaled (arXiv 2309.00071)
};

/// Parameters of one model's rotary embedding. Field names and defaults are
/// those of Hugging Face's `rope_scaling`.
struct RopeParams {
    int d = 0; ///< head dimension, even; 0: no rotation at all
    double theta = 10000;
    RopeLayout layout = RopeLayout::half;
    RopeScaling scaling = RopeScaling::none;
    double factor = 1;
    double original_max_position_embeddings = 8192; ///< llama3, yarn
    double low_freq_factor = 1;                     ///< llama3
    double high_freq_factor = 4;                    ///< llama3
    double beta_fast = 32;                          ///< yarn
    double beta_slow = 1;                           ///< yarn
    double attention_factor = 0; ///< yarn; 0: from the factor, as the paper
    bool truncate = true;        ///< yarn: round the ramp's ends outwards

    bool operator==(const RopeParams& other) const;
    bool operator!=(const RopeParams& other) const {
        return !(*this == other);
    }

    /// @throws faiss::FaissException when d is odd or not positive, or a parameter is out
    ///         of range; the sentence names it
    void check() const;
    /// Sets `scaling` and its fields from the text a trace carries: empty,
    /// "linear:2", "ntk:4", "llama3:{json}" or "yarn:{json}", the json with
    /// the keys of Hugging Face's `rope_scaling`, of which those that name the kind
    /// or theta count for nothing here.
    /// @throws faiss::FaissException when the text has another form or a key
    ///         that is not known
    void set_scaling(const std::string& text);
    /// The text that `set_scaling` reads.
    std::string scaling_text() const;
};

/// Rotates vectors by their positions and back. Frequencies, sines and cosines
/// are computed in double precision. Immutable; safe to share between threads.
struct RotaryEmbedding {
    RopeParams params;
    std::vector<double> inverse_frequency; ///< radians per token, size d / 2
    double magnitude = 1; ///< rotated vectors are this much longer (YaRN)

    /// @throws faiss::FaissException when d is odd or a parameter is out of
    ///         range; the sentence names it
    explicit RotaryEmbedding(const RopeParams& params);

    /// @param position  size n, in tokens
    /// @param x         size n * d, changed in place
    void rotate(int64_t n, const int64_t* position, float* x) const;
    /// The inverse of `rotate`: pre-RoPE vectors from post-RoPE ones.
    void derotate(int64_t n, const int64_t* position, float* x) const;
};

} // namespace faiss_saap
