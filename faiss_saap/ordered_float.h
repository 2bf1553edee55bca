/// Floats as unsigned integers that order alike, and keys made of them.
#pragma once

#include <cstdint>
#include <cstring>

#include <faiss_saap/host_device.h>

namespace faiss_saap {

/// a < b exactly if ordered_bits(a) < ordered_bits(b); both zeros are equal.
/// @param f  not NaN
FAISS_SAAP_HOST_DEVICE inline uint32_t ordered_bits(float f) {
    f += 0.0f; // -0 becomes 0
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FAISS_SAAP_HOST_DEVICE inline float from_ordered_bits(uint32_t bits) {
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

/// A score and an id in one integer: smaller keys are better, and of equal
/// scores the one with the lower id is.
struct SelectionKey {
    /// Larger than every key.
    static constexpr uint64_t kNone = ~uint64_t(0);

    FAISS_SAAP_HOST_DEVICE static uint64_t make(
            float score,
            uint32_t id,
            bool largest) {
        const uint32_t bits = ordered_bits(score);
        return uint64_t(largest ? ~bits : bits) << 32 | id;
    }
    FAISS_SAAP_HOST_DEVICE static float score(uint64_t key, bool largest) {
        const auto bits = static_cast<uint32_t>(key >> 32);
        return from_ordered_bits(largest ? ~bits : bits);
    }
    FAISS_SAAP_HOST_DEVICE static uint32_t id(uint64_t key) {
        return static_cast<uint32_t>(key);
    }
};

} // namespace faiss_saap
