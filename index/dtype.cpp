#include <faiss_saap/dtype.h>

#include <cmath>
#include <vector>

#include <faiss/utils/fp16.h>

namespace faiss_saap {

namespace {

/// faiss::encode_fp16 rounds ties away from zero where it is compiled for a
/// processor without the instruction.
uint16_t to_float16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00; // NaN stays NaN
    }
    if (bits >= 0x477ff000) {
        return sign | 0x7c00; // half a unit above the largest: infinite
    }
    if (bits < 0x38800000) {
        // Below 2^-14 the unit is that of 0.5: the addition rounds.
        constexpr uint32_t kHalf = 0x3f000000;
        const float sum = std::abs(x) + 0.5f;
        std::memcpy(&bits, &sum, sizeof(bits));
        return static_cast<uint16_t>(sign | (bits - kHalf));
    }
    bits -= 112 << 23; // the exponents' bias
    bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
    return static_cast<uint16_t>(sign | bits);
}

float from_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return static_cast<uint16_t>(bits >> 16 | 0x40); // NaN stays NaN
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

} // namespace

const char* name(DType t) {
    switch (t) {
        case DType::float32:
            return "float32";
        case DType::float16:
            return "float16";
        case DType::bfloat16:
            return "bfloat16";
    }
    return "unknown";
}

void to_float(DType type, const void* source, int64_t n, float* target) {
    if (n == 0) {
        return; // of nothing, the pointers may be null
    }
    if (type == DType::float32) {
        std::memcpy(target, source, n * sizeof(float));
        return;
    }
    // Files do not align their tensors.
    const char* bytes = static_cast<const char*>(source);
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits;
        std::memcpy(&bits, bytes + 2 * i, sizeof(bits));
        target[i] = type == DType::float16 ? faiss::decode_fp16(bits)
                                           : from_bfloat16(bits);
    }
}

void from_float(DType type, const float* source, int64_t n, void* target) {
    if (n == 0) {
        return;
    }
    if (type == DType::float32) {
        std::memcpy(target, source, n * sizeof(float));
        return;
    }
    char* bytes = static_cast<char*>(target);
    for (int64_t i = 0; i < n; i++) {
        const uint16_t bits = type == DType::float16
                ? to_float16(source[i])
                : to_bfloat16(source[i]);
        std::memcpy(bytes + 2 * i, &bits, sizeof(bits));
    }
}

void round_to(DType type, int64_t n, float* x) {
    std::vector<char> held(n * element_size(type));
    from_float(type, x, n, held.data());
    to_float(type, held.data(), n, x);
}

} // namespace faiss_saap
