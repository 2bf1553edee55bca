/// Checks of arguments that several files share.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap {

/// What a pointer leads to. Arguments of a base's constructor are evaluated in any order:
/// each of them checks the pointer.
/// @throws faiss::FaissException when it is null
template <class Pointer>
const auto& not_null(const Pointer& pointer, const char* name) {
    FAISS_THROW_IF_NOT_FMT(pointer, "%s is null", name);
    return *pointer;
}

/// @throws faiss::FaissException for what names another file, or none, to the system
inline void check_path(const std::string& path) {
    FAISS_THROW_IF_NOT_FMT(
            !path.empty() && path.find('\0') == std::string::npos,
            "path '%s' is empty or holds a NUL",
            path.c_str());
}

/// Whether all components are finite and so is the squared norm: then every
/// inner product of checked vectors is finite, too.
inline bool finite_norm(const float* x, int64_t d) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; j++) {
        sum += x[j] * x[j];
    }
    return std::isfinite(sum);
}

/// @throws faiss::FaissException when a vector of the n * d matrix x has a
///         component or a squared norm that is not finite
inline void check_finite(
        const float* x,
        int64_t n,
        int64_t d,
        const char* name) {
    for (int64_t i = 0; i < n; i++) {
        if (finite_norm(x + i * d, d)) {
            continue;
        }
        for (int64_t j = 0; j < d; j++) {
            FAISS_THROW_IF_NOT_FMT(
                    std::isfinite(x[i * d + j]),
                    "%s[%lld] (vector %lld, component %lld) is %f: values must "
                    "be finite",
                    name,
                    static_cast<long long>(i * d + j),
                    static_cast<long long>(i),
                    static_cast<long long>(j),
                    static_cast<double>(x[i * d + j]));
        }
        FAISS_THROW_FMT(
                "%s: the squared norm of vector %lld is too large for a float",
                name,
                static_cast<long long>(i));
    }
}

} // namespace faiss_saap
