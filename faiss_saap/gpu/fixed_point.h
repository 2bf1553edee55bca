/// Sums of floats as integers, which are exact and so have no order.
#pragma once

#include <cmath>
#include <cstdint>

#include <faiss_saap/host_device.h>

namespace faiss_saap::gpu {

/// The power of two that n terms are multiplied by so that their sum, rounded
/// to integers term by term, stays below 2^63.
/// @param largest  of |term|, finite
/// @param n        1 to 2^31
FAISS_SAAP_HOST_DEVICE inline int fixed_point_exponent(
        float largest,
        int64_t n) {
    int bits = 0; // n <= 2^bits
    while ((int64_t(1) << bits) < n) {
        bits++;
    }
    // largest < 2^(ilogb + 1), in double also where it is denormal.
    return largest > 0 ? 61 - bits - ilogb(double(largest)) : 0;
}

} // namespace faiss_saap::gpu
