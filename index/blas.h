/// Matrix products of row-major matrices through BLAS.
#pragma once

#include <cstdint>

namespace faiss_saap {

/// c <- a b' + beta c; a is m * k, b is n * k, c is m * n with rows of ldc.
void multiply_nt(
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        int64_t lda,
        const float* b,
        int64_t ldb,
        float beta,
        float* c,
        int64_t ldc);

/// c <- a b + beta c; a is m * k, b is k * n, c is m * n.
void multiply_nn(
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        const float* b,
        float beta,
        float* c);

/// c <- a' b + beta c; a is k * m, b is k * n, c is m * n.
void multiply_tn(
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        const float* b,
        float beta,
        float* c);

/// While one of these lives, OpenBLAS computes each product on the thread that
/// asks for it: callers that are parallel themselves would otherwise wait for
/// each other, and sums would depend on the number of threads. Other BLAS
/// libraries are left as they are.
class BlasOnOneThread {
   public:
    BlasOnOneThread();
    ~BlasOnOneThread();
    BlasOnOneThread(const BlasOnOneThread&) = delete;
    BlasOnOneThread& operator=(const BlasOnOneThread&) = delete;
};

} // namespace faiss_saap
