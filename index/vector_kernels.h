/// The inner loops on the CPU. Compiled for several instruction sets; the best
/// one that the processor has is chosen at run time (Highway).
#pragma once

#include <cstdint>

#include <faiss_saap/KvView.h>

namespace faiss_saap {

/// nq queries of each of some KV heads over n rows of the cache, all of them
/// checked.
struct AttendKernelParams {
    const KvView* kv = nullptr;
    int kv_head = 0; ///< the first one
    int heads = 1;   ///< KV heads; all read the same slots
    int nq = 0;      ///< queries of each head
    const float* queries = nullptr; ///< size heads * nq * kv->d
    float scale = 0;
    int64_t n = 0;
    const int32_t* slots = nullptr; ///< size n; null: begin, begin + 1, ...
    int64_t begin = 0;
    float* output = nullptr; ///< size heads * nq * kv->d_v
    float* lse = nullptr;    ///< size heads * nq
};

void attend_kernel(const AttendKernelParams& params);

/// Inner products of nq queries with n rows.
/// @param q     size nq * d
/// @param rows  size n * d
/// @param out   output, size nq * n
void inner_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const float* rows,
        float* out);

/// Codes of KeyCodes: components of a block, and its bytes (base and step as
/// bfloat16, then component i in the low half of byte i and i + 16 in its high
/// half).
constexpr int kCodeBlock = 32, kCodeBlockBytes = 4 + kCodeBlock / 2;

/// Inner products of nq queries with the keys that n codes stand for.
/// @param q      size nq * d
/// @param codes  size n, each the code of a key of d components
/// @param out    output, size nq * n
void code_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const uint8_t* const* codes,
        float* out);

/// See share_scores in ProbePolicy.h.
/// @param counts  size ncell
void share_scores_kernel(
        int nhead,
        int ncell,
        const float* scores,
        const float* counts,
        float scale,
        float* shared);

} // namespace faiss_saap
