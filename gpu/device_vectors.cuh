/// Reading vectors on the device: cache rows, weights, and the inverse rotation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sequence_state.h"

namespace faiss_saap::gpu {

__device__ inline void raise(FaultFlag* flag, Fault fault, int index) {
    *static_cast<volatile FaultFlag*>(flag) =
            static_cast<FaultFlag>(static_cast<uint32_t>(index)) << 32 |
            static_cast<uint32_t>(fault);
}

/// The row of a slot, or null where the page table has a hole.
__device__ inline const char* row_of(
        const char* base,
        int64_t token_stride,
        int64_t head_stride,
        int64_t page_stride,
        const DeviceView& kv,
        int head,
        int64_t slot) {
    if (!kv.page_table) {
        return base + head * head_stride + slot * token_stride;
    }
    const int64_t page = kv.page_table[slot / kv.page_size];
    if (page < 0 || page >= kv.npages) {
        return nullptr;
    }
    return base + head * head_stride + page * page_stride +
            slot % kv.page_size * token_stride;
}

__device__ inline const char* key_row(
        const DeviceView& kv,
        int head,
        int64_t slot) {
    return row_of(kv.k, kv.k_token, kv.k_head, kv.k_page, kv, head, slot);
}

__device__ inline const char* value_row(
        const DeviceView& kv,
        int head,
        int64_t slot) {
    return row_of(kv.v, kv.v_token, kv.v_head, kv.v_page, kv, head, slot);
}

__device__ inline float element(const char* row, int bf16, int j) {
    return bf16 ? __bfloat162float(
                          reinterpret_cast<const __nv_bfloat16*>(row)[j])
                : __half2float(reinterpret_cast<const __half*>(row)[j]);
}

/// Component j of a post-RoPE vector before its rotation. `x(i)` reads the
/// vector's component i. Angles are reduced in double precision: positions
/// reach 10^12.
template <class Read>
__device__ inline float derotated(
        const DeviceRotary& rotary,
        int d,
        int64_t position,
        int j,
        const Read& x) {
    if (!rotary.inverse_frequency) {
        return x(j);
    }
    const int half = d / 2;
    const int pair = rotary.interleaved ? j / 2 : j % half;
    const bool second = rotary.interleaved ? j % 2 : j >= half;
    const int a = rotary.interleaved ? 2 * pair : pair;
    const int b = rotary.interleaved ? 2 * pair + 1 : pair + half;
    constexpr double kTurn = 6.283185307179586476925;
    const double angle = position * rotary.inverse_frequency[pair];
    const auto reduced = static_cast<float>(angle - kTurn * rint(angle / kTurn));
    float s, c;
    sincosf(reduced, &s, &c);
    const float xa = x(a), xb = x(b);
    return rotary.shrink * (second ? xb * c - xa * s : xa * c + xb * s);
}

/// Inner product of a row of weights with x, by a whole warp; every lane has
/// the result. Rows are padded with zeros to a multiple of 8 elements and begin
/// at multiples of 16 bytes; so is x, in shared memory.
__device__ inline float warp_dot(
        const void* row,
        int bf16,
        int padded_cols,
        const float* x) {
    const int lane = threadIdx.x % 32;
    float sum = 0;
    if (bf16) {
        const auto* w = static_cast<const uint4*>(row);
        for (int c = lane; c < padded_cols / 8; c += 32) {
            const uint4 bits = w[c];
            const auto* pair = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = __bfloat1622float2(pair[i]);
                sum += f.x * x[8 * c + 2 * i] + f.y * x[8 * c + 2 * i + 1];
            }
        }
    } else {
        const auto* w = static_cast<const float4*>(row);
        for (int c = lane; c < padded_cols / 4; c += 32) {
            const float4 f = w[c];
            sum += f.x * x[4 * c] + f.y * x[4 * c + 1] + f.z * x[4 * c + 2] +
                    f.w * x[4 * c + 3];
        }
    }
    for (int step = 16; step; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    return sum;
}

/// Floats in the order of their values as unsigned integers.
__device__ inline uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

} // namespace faiss_saap::gpu
