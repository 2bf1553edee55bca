/// Inner product of two float vectors.
#pragma once

namespace faiss_saap {

/// Eight partial sums, so that compilers vectorise it without -ffast-math and
/// rounding stays small.
inline float inner_product(const float* a, const float* b, int d) {
    float sum[8] = {};
    int i = 0;
    for (; i + 8 <= d; i += 8) {
        for (int j = 0; j < 8; j++) {
            sum[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < d; i++) {
        sum[0] += a[i] * b[i];
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) +
            ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

} // namespace faiss_saap
