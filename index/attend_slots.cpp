#include <faiss_saap/attend_slots.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <vector>

#include <omp.h>

#include "check.h"
#include "parallel_for.h"
#include "partial_results.h"
#include "vector_kernels.h"

namespace faiss_saap {

namespace {

/// Checks what both functions share and collects it.
AttendKernelParams checked_call(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        float* output,
        float* lse) {
    FAISS_THROW_IF_NOT_FMT(nq >= 0, "nq = %d must not be negative", nq);
    FAISS_THROW_IF_NOT_FMT(
            kv_head >= 0 && kv_head < kv.heads,
            "kv_head = %d, the view has %d heads",
            kv_head,
            kv.heads);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(scale), "scale = %f must be finite", double(scale));
    FAISS_THROW_IF_NOT_MSG(nq == 0 || queries, "queries is null");
    FAISS_THROW_IF_NOT_MSG(nq == 0 || output, "output is null");
    FAISS_THROW_IF_NOT_MSG(nq == 0 || lse, "lse is null");
    check_finite(queries, nq, kv.d, "queries");
    AttendKernelParams p;
    p.kv = &kv;
    p.kv_head = kv_head;
    p.nq = nq;
    p.queries = queries;
    p.scale = scale;
    p.output = output;
    p.lse = lse;
    return p;
}

void check_range(const KvView& kv, int64_t begin, int64_t end) {
    FAISS_THROW_IF_NOT_FMT(
            begin >= 0 && begin <= end && end <= kv.length,
            "slots %" PRId64 " .. %" PRId64
            " - 1 are outside the view, which has %" PRId64,
            begin,
            end,
            kv.length);
}

/// Long stretches, because the first rows of each are read without a prefetch,
/// but some for every thread.
int64_t stretch_length(int64_t tokens) {
    const int64_t shares = int64_t(4) * omp_get_max_threads();
    return std::clamp<int64_t>(tokens / shares / 512 * 512, 512, 4096);
}

} // namespace

void attend_slots(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        int64_t n,
        const int32_t* slots,
        float* output,
        float* lse) {
    AttendKernelParams p =
            checked_call(kv, kv_head, nq, queries, scale, output, lse);
    FAISS_THROW_IF_NOT_FMT(n >= 0, "n = %" PRId64 " must not be negative", n);
    FAISS_THROW_IF_NOT_MSG(n == 0 || slots, "slots is null");
    for (int64_t i = 0; i < n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                slots[i] >= 0 && slots[i] < kv.length,
                "slots[%" PRId64 "] = %d, the view has %" PRId64 " slots",
                i,
                slots[i],
                kv.length);
    }
    const SlotList list = {kv_head, slots, n};
    p.lists = &list;
    attend_kernel(p);
}

void attend_range(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        int64_t begin,
        int64_t end,
        float* output,
        float* lse) {
    AttendKernelParams p =
            checked_call(kv, kv_head, nq, queries, scale, output, lse);
    check_range(kv, begin, end);
    p.begin = begin;
    p.end = end;
    attend_kernel(p);
}

void attend_dense(
        const KvView& kv,
        int heads_q,
        const float* queries,
        float scale,
        int64_t begin,
        int64_t end,
        float* output,
        float* lse) {
    kv.check();
    FAISS_THROW_IF_NOT_FMT(
            heads_q >= 0 && heads_q % kv.heads == 0,
            "heads_q = %d must be a multiple of the view's %d heads",
            heads_q,
            kv.heads);
    const int group = heads_q / kv.heads;
    AttendKernelParams whole =
            checked_call(kv, 0, group, queries, scale, output, lse);
    check_finite(queries, heads_q, kv.d, "queries");
    check_range(kv, begin, end);
    whole.heads = kv.heads;
    const int64_t stretch = stretch_length(end - begin);
    const int64_t stretches =
            std::max<int64_t>(1, (end - begin + stretch - 1) / stretch);
    if (stretches == 1) {
        whole.begin = begin;
        whole.end = end;
        attend_kernel(whole);
        return;
    }
    PartialResults parts(stretches, heads_q, kv.d_v);
    parallel_for(stretches, [&](int64_t i) {
        AttendKernelParams p = whole;
        p.begin = begin + i * stretch;
        p.end = std::min(p.begin + stretch, end);
        p.output = parts.output(i);
        p.lse = parts.lse(i);
        attend_kernel(p);
    });
    parallel_for(heads_q, [&](int64_t h) {
        lse[h] = parts.merge(0, stretches, h, output + h * kv.d_v, -INFINITY);
    });
}

} // namespace faiss_saap
