/// Reading vectors on the device: cache rows, weights, and the inverse rotation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "sequence_state.h"
#include "shared_address.cuh"

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

/// Cosine and sine of a pair's angle. It is reduced in double precision: positions
/// reach 10^12.
__device__ inline float2 rotation(double inverse_frequency, int64_t position) {
    constexpr double kTurn = 6.283185307179586476925;
    const double angle = position * inverse_frequency;
    const auto reduced =
            static_cast<float>(angle - kTurn * rint(angle * (1 / kTurn)));
    float s, c;
    __sincosf(reduced, &s, &c); // within 5e-7, as |reduced| <= pi
    return make_float2(c, s);
}
__device__ inline float2 rotation(
        const DeviceRotary& rotary,
        int64_t position,
        int pair) {
    return rotation(rotary.inverse_frequency[pair], position);
}

/// The components that are rotated together, of which there are d / 2 pairs.
__device__ inline int2 rotary_pair(const DeviceRotary& rotary, int d, int pair) {
    return rotary.interleaved ? make_int2(2 * pair, 2 * pair + 1)
                              : make_int2(pair, pair + d / 2);
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& x) {
    sum.x += weight * x.x;
    sum.y += weight * x.y;
    sum.z += weight * x.z;
    sum.w += weight * x.w;
}

/// A row as floats, before its rotation if `derotates`; by threads that take every
/// `step`-th pair from `first` on. A null row is 0. A step's kernels run once and
/// wait for their code as for data: what they use in several places is not inlined.
static __device__ __noinline__ void load_vector(
        const DeviceRotary& rotary,
        int d,
        int64_t position,
        bool derotates,
        const char* row,
        int bf16,
        int first,
        int step,
        float* to) {
    for (int pair = first; pair < d / 2; pair += step) {
        const int2 at = rotary_pair(rotary, d, pair);
        const float a = row ? element(row, bf16, at.x) : 0.0f;
        const float b = row ? element(row, bf16, at.y) : 0.0f;
        if (derotates && rotary.inverse_frequency) {
            const float2 r = rotation(rotary, position, pair);
            to[at.x] = rotary.shrink * (a * r.x + b * r.y);
            to[at.y] = rotary.shrink * (b * r.x - a * r.y);
        } else {
            to[at.x] = a;
            to[at.y] = b;
        }
    }
}

/// exp(x) is exp2(kLog2E * x).
constexpr float kLog2E = 1.44269504088896340736f;

enum class RowType { float32, bfloat16, float16 };

__device__ __forceinline__ float4 load_shared(uint32_t at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(at));
    return x;
}

/// 16 bytes of a row times as many components of a vector, which lies at an address
/// of shared memory.
template <RowType Type>
__device__ __forceinline__ float product_of_piece(const uint4& bits, uint32_t x) {
    float4 y[2];
    y[0] = load_shared(x);
    if constexpr (Type == RowType::float32) {
        const auto* w = reinterpret_cast<const float*>(&bits);
        return w[0] * y[0].x + w[1] * y[0].y + w[2] * y[0].z + w[3] * y[0].w;
    } else {
        y[1] = load_shared(x + 16);
        const auto* halves = reinterpret_cast<const uint32_t*>(&bits);
        float2 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (Type == RowType::bfloat16) {
                w[j] = __bfloat1622float2(
                        *reinterpret_cast<const __nv_bfloat162*>(halves + j));
            } else {
                w[j] = __half22float2(*reinterpret_cast<const __half2*>(halves + j));
            }
        }
        return w[0].x * y[0].x + w[0].y * y[0].y + w[1].x * y[0].z +
                w[1].y * y[0].w + w[2].x * y[1].x + w[2].y * y[1].y +
                w[3].x * y[1].z + w[3].y * y[1].w;
    }
}

/// Inner products of 8 rows with N = 1 or 4 vectors in shared memory, by a warp:
/// four lanes share a row, and lane l gets the product of row l / 4 and vector
/// l % N. `row` is that of the lane, null for one that is not there, which gives 0.
/// Rows begin at multiples of 16 bytes, their length `cols` is a multiple of 8;
/// vectors are x_stride floats apart and likewise aligned. Not inlined, as
/// load_vector is not.
template <RowType Type, int N>
static __device__ __noinline__ float warp_products(
        const void* row,
        int cols,
        const float* x,
        int x_stride) {
    static_assert(N == 1 || N == 4);
    constexpr int kPiece = Type == RowType::float32 ? 4 : 8; // elements of 16 bytes
    constexpr int kAtOnce = 4; // on their way: memory answers after 700 cycles
    const uint32_t vectors = shared_address(x);
    const int part = threadIdx.x % 4;
    const int pieces = cols / kPiece;
    float sum[N] = {};
#pragma unroll 1
    for (int first = part; first < pieces; first += 4 * kAtOnce) {
        uint4 bits[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int piece = first + 4 * i;
            bits[i] = row && piece < pieces
                    ? static_cast<const uint4*>(row)[piece]
                    : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int piece = first + 4 * i;
            if (piece < pieces) {
#pragma unroll
                for (int v = 0; v < N; v++) {
                    sum[v] += product_of_piece<Type>(
                            bits[i], vectors + 4 * (v * x_stride + piece * kPiece));
                }
            }
        }
    }
    if constexpr (N == 1) {
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
        return sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 1);
    } else {
        // Two rounds of exchanges leave each lane with the sum of one vector.
        const bool upper = part & 2, odd = part & 1;
        float a = upper ? sum[2] : sum[0], b = upper ? sum[3] : sum[1];
        a += __shfl_xor_sync(0xffffffffu, upper ? sum[0] : sum[2], 2);
        b += __shfl_xor_sync(0xffffffffu, upper ? sum[1] : sum[3], 2);
        return (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    }
}

/// The same for weights.
template <int N>
__device__ inline float warp_products_of_weights(
        const void* row,
        int bf16,
        int cols,
        const float* x,
        int x_stride) {
    return bf16 ? warp_products<RowType::bfloat16, N>(row, cols, x, x_stride)
                : warp_products<RowType::float32, N>(row, cols, x, x_stride);
}

/// Floats in the order of their values as unsigned integers.
__device__ inline uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The inverse of `ordered`.
__device__ inline float of_ordered(uint32_t x) {
    return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

/// A cell in the order of its score; of equal scores the lower cell's is larger.
__device__ inline unsigned long long scored_cell(float score, int cell) {
    return static_cast<unsigned long long>(ordered(score)) << 32 |
            ~static_cast<uint32_t>(cell);
}
__device__ inline int cell_of_scored(unsigned long long scored) {
    return static_cast<int>(~static_cast<uint32_t>(scored));
}

// Over the lanes of a warp, all of which call them and get the result.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}
__device__ __forceinline__ float most_of_warp(float x) {
    return of_ordered(__reduce_max_sync(0xffffffffu, ordered(x)));
}
__device__ inline unsigned long long largest_of_warp(unsigned long long x) {
    const auto high = static_cast<uint32_t>(x >> 32);
    const uint32_t most = __reduce_max_sync(0xffffffffu, high);
    const uint32_t low = __reduce_max_sync(
            0xffffffffu, high == most ? static_cast<uint32_t>(x) : 0u);
    return static_cast<unsigned long long>(most) << 32 | low;
}

/// The same over kWarps warps of a block, from its kFirstWarp-th one on.
/// @param room   in shared memory; its halves take turns, so that the next call need not
///               wait until all have read this one's
/// @param round  of the call
/// @param sync   a barrier of these warps
template <int kFirstWarp, int kWarps, int kRoom, class Sync>
__device__ __forceinline__ unsigned long long largest_of_warps(
        unsigned long long (&room)[2][kRoom],
        unsigned long long x,
        int round,
        const Sync& sync) {
    static_assert(kWarps <= kRoom);
    const int warp = threadIdx.x / 32 - kFirstWarp, lane = threadIdx.x % 32;
    x = largest_of_warp(x);
    if (lane == 0) {
        room[round & 1][warp] = x;
    }
    sync();
    return largest_of_warp(lane < kWarps ? room[round & 1][lane] : 0ull);
}

/// Brings memory nearer, by `threads` threads.
__device__ __forceinline__ void prefetch_bytes(
        const char* from,
        int bytes,
        int thread,
        int threads) {
#pragma unroll 1
    for (int i = 128 * thread; i < bytes; i += 128 * threads) {
        prefetch(from + i);
    }
}

/// Copies between memories, by a block; few words by fewer threads of it, from the first
/// on.
template <class T>
__device__ __forceinline__ void copy_words(T* to, const T* from) {
    static_assert(sizeof(T) % 4 == 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < int(sizeof(T) / 4); i += blockDim.x) {
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
}

} // namespace faiss_saap::gpu
