/// Checks of arguments that lie on the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "StreamBuffer.h"

namespace faiss_saap::gpu {

/// @param x      device memory, size n * d
/// @param first  number of the first of these vectors among the caller's
/// @param largest  that a component may be: the largest number of float16 where
///                 vectors are stored as such
/// @throws faiss::FaissException when a component or a squared norm is not
///         finite, or a component too large; the sentence is that of the CPU
void check_finite(
        const float* x,
        int64_t n,
        int d,
        int64_t first,
        const char* name,
        const StreamMemory& memory,
        float largest = INFINITY);

/// @param ids  device memory, size n
/// @throws faiss::FaissException when an id is negative
void check_ids(const int64_t* ids, int64_t n, const StreamMemory& memory);

} // namespace faiss_saap::gpu
