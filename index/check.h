/// Checks of arguments that several files share.
#pragma once

#include <cmath>
#include <cstdint>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap {

/// Index of the first value that is NaN or infinite, or -1.
inline int64_t first_not_finite(const float* x, int64_t n) {
    // A sum of x * 0 is NaN exactly when a value is not finite: one pass
    // without branches, as this runs on every query.
    constexpr int64_t block = 4096;
    for (int64_t begin = 0; begin < n; begin += block) {
        const int64_t end = begin + block < n ? begin + block : n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; i++) {
            sum += x[i] * 0.0f;
        }
        if (!(sum == 0.0f)) {
            for (int64_t i = begin; i < end; i++) {
                if (!std::isfinite(x[i])) {
                    return i;
                }
            }
        }
    }
    return -1;
}

/// @throws faiss::FaissException when a component of the n * d matrix x is not
///         finite
inline void check_finite(
        const float* x,
        int64_t n,
        int64_t d,
        const char* name) {
    const int64_t at = first_not_finite(x, n * d);
    FAISS_THROW_IF_NOT_FMT(
            at < 0,
            "%s[%lld] (vector %lld, component %lld) is %f: values must be "
            "finite",
            name,
            static_cast<long long>(at),
            static_cast<long long>(at / d),
            static_cast<long long>(at % d),
            static_cast<double>(x[at]));
}

} // namespace faiss_saap
