/// The threads of a block of decode()'s kernel. Device code.
#pragma once

namespace faiss_saap::gpu {

namespace {

/// That choose cells and attend to their keys, but for the last cells where others do that.
constexpr int kThreads = 256, kWarps = kThreads / 32;
/// That attend to sink and window meanwhile, and then choose the last cells and attend to
/// those, in blocks that have warps for that.
constexpr int kWindowWarps = 4;

/// A barrier of the first kThreads threads of a block.
__device__ __forceinline__ void sync_choosers() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

/// These let the `n` others go on, who wait for that. By all of both.
__device__ __forceinline__ void tell_others(int n) {
    asm volatile("bar.arrive 3, %0;" ::"r"(kThreads + n) : "memory");
}
__device__ __forceinline__ void await_choosers(int n) {
    asm volatile("bar.sync 3, %0;" ::"r"(kThreads + n) : "memory");
}

/// A barrier of all other threads, `n` of them.
__device__ __forceinline__ void sync_others(int n) {
    asm volatile("bar.sync 2, %0;" ::"r"(n) : "memory");
}

} // namespace

} // namespace faiss_saap::gpu
