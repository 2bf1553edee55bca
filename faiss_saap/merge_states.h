/// Partial results of attention and their exact merge.
#pragma once

#include <cmath>
#include <cstdint>

#include <faiss_saap/host_device.h>

namespace faiss_saap {

/// Attention over a set of keys S is the pair of its normalised output
/// o = sum exp(s_i) v_i / sum exp(s_i) and LSE = ln sum exp(s_i), with
/// s_i = scale * q.k_i. Results over disjoint sets merge exactly (as in
/// FlashInfer and flash-decoding); the empty set is (o = 0, LSE = -infinity)
/// and merges as the identity. Its output is multiplied by 0, so it must be
/// finite.
struct MergeWeights {
    float a, b; ///< o = a * o_a + b * o_b
    float lse;  ///< of the union
};

/// Weights of two partial results in their union; no NaN for empty sets.
FAISS_SAAP_HOST_DEVICE inline MergeWeights merge_weights(
        float lse_a,
        float lse_b) {
    // Of an empty set and a NaN the NaN is the result.
    if (lse_a == -INFINITY) {
        return {0.0f, lse_b == -INFINITY ? 0.0f : 1.0f, lse_b};
    }
    if (lse_b == -INFINITY) {
        return {1.0f, 0.0f, lse_a};
    }
    const float larger = lse_a > lse_b ? lse_a : lse_b;
    const float ea = expf(lse_a - larger), eb = expf(lse_b - larger);
    const float sum = ea + eb;
    return {ea / sum, eb / sum, larger + logf(sum)};
}

/// Merges n partial results into n others.
/// @param output    in and out, size n * d_v
/// @param lse       in and out, size n
/// @param output_b  size n * d_v
/// @param lse_b     size n
inline void merge_states(
        int64_t n,
        int d_v,
        float* output,
        float* lse,
        const float* output_b,
        const float* lse_b) {
    for (int64_t i = 0; i < n; i++) {
        const MergeWeights w = merge_weights(lse[i], lse_b[i]);
        for (int j = 0; j < d_v; j++) {
            output[i * d_v + j] =
                    w.a * output[i * d_v + j] + w.b * output_b[i * d_v + j];
        }
        lse[i] = w.lse;
    }
}

} // namespace faiss_saap
