/// Tensor-core products of 16-bit matrices, a warp at a time, and the copies
/// that feed them.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "shared_address.cuh"

namespace faiss_saap::gpu {

/// From global to shared memory, without waiting: up to 16 bytes, then zeros.
__device__ __forceinline__ void copy_up_to_16_bytes(
        uint32_t at,
        const void* from,
        int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(at),
                 "l"(from),
                 "r"(bytes));
}
__device__ __forceinline__ void copy_up_to_16_bytes(
        void* to,
        const void* from,
        int bytes) {
    copy_up_to_16_bytes(shared_address(to), from, bytes);
}

/// The same of 16 bytes; zeros where nothing is there.
__device__ __forceinline__ void copy_16_bytes(
        uint32_t at,
        const void* from,
        bool there) {
    copy_up_to_16_bytes(at, from, there ? 16 : 0);
}
__device__ __forceinline__ void copy_16_bytes(
        void* to,
        const void* from,
        bool there) {
    copy_16_bytes(shared_address(to), from, there);
}

/// The same of what is read once in a step, such as keys and values: it leaves the second
/// cache before weights, lists and code, which the next steps want.
__device__ __forceinline__ void stream_16_bytes(
        uint32_t at,
        const void* from,
        bool there) {
    uint64_t policy; // a constant, once it is compiled
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
            "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::
                    "r"(at),
            "l"(from),
            "r"(there ? 16 : 0),
            "l"(policy));
}

__device__ __forceinline__ void copy_4_bytes(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(to)),
                 "l"(from));
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/// Waits until at most kLeft groups of copies are on their way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

/// Four matrices of 8 * 8, each lane naming one of their 32 rows.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t at) {
    asm volatile(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
            : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
            : "r"(at)
            : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t at) {
    asm volatile(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, "
            "[%4];\n"
            : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
            : "r"(at)
            : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
    load_matrices(m, shared_address(row));
}
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], const void* row) {
    load_transposed(m, shared_address(row));
}

/// A float as the sum of two bfloat16 numbers, within 2^-17 of it.
struct SplitFloat {
    __nv_bfloat16 high, low;

    __device__ __forceinline__ explicit SplitFloat(float x)
            : high(__float2bfloat16_rn(x)),
              low(__float2bfloat16_rn(x - __bfloat162float(high))) {}
};

/// The transpose of an 8 * 8 matrix of 16-bit elements, in a warp's registers.
__device__ __forceinline__ uint32_t transpose(uint32_t m) {
    uint32_t t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(m));
    return t;
}

/// c <- c + a b of 16 * 16 and 16 * 8.
template <class T>
__device__ __forceinline__ void multiply_add(
        float (&c)[4],
        const uint32_t (&a)[4],
        uint32_t b0,
        uint32_t b1) {
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
        asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 h = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&h);
    } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&h);
    }
}

} // namespace faiss_saap::gpu
