/// The inner loops on the CPU. Compiled for several instruction sets; the best
/// one that the processor has is chosen at run time (Highway).
#pragma once

#include <cstdint>

#include <faiss_saap/KvView.h>
#include <faiss_saap/dtype.h>

namespace faiss_saap {

/// Slots of a KV head, ascending where that is possible: they are read in
/// turns with those of other heads, the lowest first.
struct SlotList {
    int kv_head = 0;
    const int32_t* slots = nullptr; ///< size n
    int64_t n = 0;
};

/// nq queries of each of some heads over rows of the cache, all of them
/// checked: lists of slots, or slots begin .. end - 1 of KV heads that follow
/// each other.
struct AttendKernelParams {
    const KvView* kv = nullptr;
    int heads = 1; ///< KV heads, or lists
    int nq = 0;    ///< queries of each of them
    const float* queries = nullptr; ///< size heads * nq * kv->d
    float scale = 0;
    const SlotList* lists = nullptr; ///< size heads, or null
    int kv_head = 0;                 ///< without lists, the first one
    int64_t begin = 0, end = 0;
    float* output = nullptr; ///< size heads * nq * kv->d_v
    float* lse = nullptr;    ///< size heads * nq
};

void attend_kernel(const AttendKernelParams& params);

/// Rows that follow each other: float32 or bfloat16.
struct VectorRows {
    const void* data = nullptr;
    DType type = DType::float32;

    VectorRows(const float* data) : data(data) {}
    VectorRows(const void* data, DType type) : data(data), type(type) {}
};

/// Inner products of nq queries with n rows.
/// @param q     size nq * d
/// @param rows  size n * d
/// @param out   output, size nq * n
void inner_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const VectorRows& rows,
        float* out);

/// Merges partial results of a query (merge_states.h) in one pass.
/// @param n         parts, `stride` queries apart
/// @param part      output of the first one; finite
/// @param part_lse  likewise
/// @param output    in and out, size d_v: merged with the parts; where `lse` is -infinity
///                  it does not matter what is there
/// @return          LSE of all
float merge_parts(
        int64_t n,
        int64_t stride,
        int d_v,
        const float* part,
        const float* part_lse,
        float* output,
        float lse);

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

/// How many bits of each of n words are set.
void count_bits(int64_t n, const uint64_t* words, uint8_t* counts);

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
