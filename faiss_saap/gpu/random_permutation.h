/// Draws without replacement that need no memory and no order.
#pragma once

#include <cstdint>

#include <faiss_saap/host_device.h>

namespace faiss_saap::gpu {

/// A well-mixed function of 64 bits (the finaliser of SplitMix64).
FAISS_SAAP_HOST_DEVICE inline uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/// Where element i of 0 .. n - 1 goes in the permutation that `key` chooses: a
/// Feistel network over the next even power of two, repeated until it lands
/// below n, which takes less than four rounds on average.
/// @param i  below n
/// @param n  1 to 2^32
FAISS_SAAP_HOST_DEVICE inline uint64_t random_permutation(
        uint64_t i,
        uint64_t n,
        uint64_t key) {
    int half = 1; // bits of each half
    while (half < 16 && (uint64_t(1) << (2 * half)) < n) {
        half++;
    }
    const uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 6; round++) {
            const uint64_t next =
                    left ^ (mix(key ^ mix(right + (round << 32))) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

} // namespace faiss_saap::gpu
