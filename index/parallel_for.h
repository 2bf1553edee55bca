/// Parallel loops whose body may throw.
#pragma once

#include <cstdint>
#include <exception>

namespace faiss_saap {

/// Runs fn(i) for i in 0 .. n - 1 on OpenMP threads and throws again, on the
/// calling thread, the first exception that any of them threw (an exception
/// must not leave an OpenMP region).
template <class Fn>
void parallel_for(int64_t n, const Fn& fn) {
    if (n == 1) { // a parallel region costs more than many a body
        fn(0);
        return;
    }
    std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        try {
            fn(i);
        } catch (...) {
#pragma omp critical(faiss_saap_parallel_for)
            if (!error) {
                error = std::current_exception();
            }
        }
    }
    if (error) {
        std::rethrow_exception(error);
    }
}

} // namespace faiss_saap
