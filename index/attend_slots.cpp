#include <faiss_saap/attend_slots.h>

#include <cinttypes>
#include <cmath>

#include "vector_kernels.h"
#include "check.h"

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
    p.n = n;
    p.slots = slots;
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
    FAISS_THROW_IF_NOT_FMT(
            begin >= 0 && begin <= end && end <= kv.length,
            "slots %" PRId64 " .. %" PRId64
            " - 1 are outside the view, which has %" PRId64,
            begin,
            end,
            kv.length);
    p.n = end - begin;
    p.begin = begin;
    attend_kernel(p);
}

} // namespace faiss_saap
