/// Attention of a few queries over chosen slots of a KV cache.
#pragma once

#include <cstdint>

#include <faiss_saap/KvView.h>

namespace faiss_saap {

/// Attention of nq queries of one KV head over n slots: every query attends
/// to every slot. Stateless and single-threaded; call it from several threads
/// for several heads or splits and merge with `merge_states`.
///
/// Accumulates in float32, tile by tile, so that rounding stays near 1e-6 up to a
/// million slots. Slots in increasing order read fastest.
///
/// @param kv       checked by the caller (`KvView::check`)
/// @param queries  size nq * kv.d, in the space of the cached keys
/// @param scale    multiplies q.k, usually 1 / sqrt(d)
/// @param slots    size n, each in 0 .. kv.length - 1; a slot that occurs twice
///                 counts twice
/// @param output   size nq * kv.d_v; zero for n = 0
/// @param lse      size nq, natural logarithm; -infinity for n = 0
/// A key that makes a logit NaN or infinite makes output and LSE NaN.
/// @throws faiss::FaissException for a null pointer, a head outside the view,
///         a negative size, a slot outside the view or a query that is not
///         finite; outputs are untouched
void attend_slots(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        int64_t n,
        const int32_t* slots,
        float* output,
        float* lse);

/// The same over the slots begin .. end - 1: the dense zones, or a whole
/// sequence.
void attend_range(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        int64_t begin,
        int64_t end,
        float* output,
        float* lse);

/// Dense attention of one token: all query heads over the slots begin ..
/// end - 1. Parallel inside (OpenMP, over stretches of tokens that all heads
/// share), so that one long sequence occupies all cores.
///
/// @param kv       checked here
/// @param heads_q  query heads, a multiple of kv.heads
/// @param queries  size heads_q * kv.d
/// @param output   size heads_q * kv.d_v
/// @param lse      size heads_q
void attend_dense(
        const KvView& kv,
        int heads_q,
        const float* queries,
        float scale,
        int64_t begin,
        int64_t end,
        float* output,
        float* lse);

} // namespace faiss_saap
