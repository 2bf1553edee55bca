/// Element types of caches and files, and their conversion to float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace faiss_saap {

enum class DType : uint8_t { float32, float16, bfloat16 };

/// The largest number that float16 holds.
constexpr float kLargestFloat16 = 65504;

/// Bytes of one element.
inline size_t element_size(DType t) {
    return t == DType::float32 ? 4 : 2;
}

const char* name(DType t);

/// Converts n consecutive elements to float (exactly: every value of the
/// smaller types is a float).
void to_float(DType type, const void* source, int64_t n, float* target);

/// Converts n floats, rounding to nearest even.
void from_float(DType type, const float* source, int64_t n, void* target);

/// Rounds n floats to what the type holds, in place.
void round_to(DType type, int64_t n, float* x);

} // namespace faiss_saap
