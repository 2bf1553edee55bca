#include "blas.h"

#include <mutex>

extern "C" {
int sgemm_(
        const char* transa,
        const char* transb,
        const int* m,
        const int* n,
        const int* k,
        const float* alpha,
        const float* a,
        const int* lda,
        const float* b,
        const int* ldb,
        const float* beta,
        float* c,
        const int* ldc);
// Null where the BLAS is another one.
void openblas_set_num_threads(int) __attribute__((weak));
int openblas_get_num_threads() __attribute__((weak));
}

namespace faiss_saap {

namespace {

/// BLAS counts in columns: a row-major matrix is the transpose of what it
/// sees, so b and a trade places.
void gemm(
        char transa,
        char transb,
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        int64_t lda,
        const float* b,
        int64_t ldb,
        float beta,
        float* c,
        int64_t ldc) {
    if (m == 0 || n == 0) {
        return;
    }
    const int mi = static_cast<int>(n), ni = static_cast<int>(m);
    const int ki = static_cast<int>(k), la = static_cast<int>(ldb);
    const int lb = static_cast<int>(lda), lc = static_cast<int>(ldc);
    const float one = 1;
    sgemm_(&transb, &transa, &mi, &ni, &ki, &one, b, &la, a, &lb, &beta, c, &lc);
}

std::mutex one_thread_mutex;
int one_thread_users = 0, threads_before = 0;

} // namespace

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
        int64_t ldc) {
    gemm('N', 'T', m, n, k, a, lda, b, ldb, beta, c, ldc);
}

void multiply_nn(
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        const float* b,
        float beta,
        float* c) {
    gemm('N', 'N', m, n, k, a, k, b, n, beta, c, n);
}

void multiply_tn(
        int64_t m,
        int64_t n,
        int64_t k,
        const float* a,
        const float* b,
        float beta,
        float* c) {
    gemm('T', 'N', m, n, k, a, m, b, n, beta, c, n);
}

BlasOnOneThread::BlasOnOneThread() {
    if (openblas_set_num_threads && openblas_get_num_threads) {
        const std::lock_guard<std::mutex> lock(one_thread_mutex);
        if (one_thread_users++ == 0) {
            threads_before = openblas_get_num_threads();
            openblas_set_num_threads(1);
        }
    }
}

BlasOnOneThread::~BlasOnOneThread() {
    if (openblas_set_num_threads && openblas_get_num_threads) {
        const std::lock_guard<std::mutex> lock(one_thread_mutex);
        if (--one_thread_users == 0) {
            openblas_set_num_threads(threads_before);
        }
    }
}

} // namespace faiss_saap
