#include <faiss_saap/KvView.h>

#include <cinttypes>

#include "check.h"

namespace faiss_saap {

namespace {

/// The view whose rows follow each other token by token, unchecked.
KvView dense_rows(
        const void* k,
        const void* v,
        DType dtype,
        int64_t length,
        int heads,
        int d,
        int d_v) {
    KvView view;
    view.k = k;
    view.v = v;
    view.dtype = dtype;
    view.length = length;
    view.heads = heads;
    view.d = d;
    view.d_v = d_v;
    view.k_token_stride = int64_t(heads) * d;
    view.k_head_stride = d;
    view.v_token_stride = int64_t(heads) * d_v;
    view.v_head_stride = d_v;
    return view;
}

} // namespace

KvView KvView::token_major(
        const void* k,
        const void* v,
        DType dtype,
        int64_t length,
        int heads,
        int d,
        int d_v) {
    const KvView view = dense_rows(k, v, dtype, length, heads, d, d_v);
    view.check_shape();
    return view;
}

KvView KvView::head_major(
        const void* k,
        const void* v,
        DType dtype,
        int64_t length,
        int64_t capacity,
        int heads,
        int d,
        int d_v) {
    FAISS_THROW_IF_NOT_FMT(
            length <= capacity,
            "length = %" PRId64 " exceeds capacity = %" PRId64,
            length,
            capacity);
    KvView view = dense_rows(k, v, dtype, length, heads, d, d_v);
    view.k_token_stride = d;
    view.k_head_stride = capacity * d;
    view.v_token_stride = d_v;
    view.v_head_stride = capacity * d_v;
    view.check_shape();
    return view;
}

KvView KvView::paged(
        const void* k,
        const void* v,
        DType dtype,
        int64_t length,
        int64_t npages,
        int page_size,
        const int32_t* page_table,
        int heads,
        int d,
        int d_v) {
    FAISS_THROW_IF_NOT_MSG(page_table || length == 0, "page_table is null");
    KvView view = dense_rows(k, v, dtype, length, heads, d, d_v);
    view.page_table = page_table;
    view.page_size = page_size;
    view.npages = npages;
    view.k_page_stride = page_size * view.k_token_stride;
    view.v_page_stride = page_size * view.v_token_stride;
    view.check_shape();
    return view;
}

void KvView::check_shape() const {
    FAISS_THROW_IF_NOT_FMT(
            length >= 0 && length <= INT32_MAX,
            "kv.length = %" PRId64 " must be between 0 and 2^31 - 1",
            length);
    FAISS_THROW_IF_NOT_FMT(
            heads >= 1, "kv.heads = %d must be at least 1", heads);
    FAISS_THROW_IF_NOT_FMT(d >= 1, "kv.d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(d_v >= 1, "kv.d_v = %d must be at least 1", d_v);
    FAISS_THROW_IF_NOT_FMT(
            dtype == DType::float32 || dtype == DType::float16 ||
                    dtype == DType::bfloat16,
            "kv.dtype = %d is none of float32, float16 and bfloat16",
            static_cast<int>(dtype));
    if (length == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(k, "kv.k is null");
    FAISS_THROW_IF_NOT_MSG(v, "kv.v is null");
    FAISS_THROW_IF_NOT_MSG(
            length == 1 || (page_table && page_size == 1) ||
                    (k_token_stride != 0 && v_token_stride != 0),
            "kv.k_token_stride or kv.v_token_stride is 0: all tokens would be the same");
    if (!page_table) {
        return;
    }
    FAISS_THROW_IF_NOT_FMT(
            page_size >= 1,
            "kv.page_size = %d must be at least 1",
            page_size);
    FAISS_THROW_IF_NOT_MSG(
            length <= page_size || (k_page_stride != 0 && v_page_stride != 0),
            "kv.k_page_stride or kv.v_page_stride is 0: all pages would be the same");
}

void KvView::check() const {
    check_shape();
    if (!page_table || length == 0) {
        return;
    }
    const int64_t used = (length + page_size - 1) / page_size;
    for (int64_t i = 0; i < used; i++) {
        FAISS_THROW_IF_NOT_FMT(
                page_table[i] >= 0 && page_table[i] < npages,
                "kv.page_table[%" PRId64 "] = %d, there are %" PRId64 " pages",
                i,
                page_table[i],
                npages);
    }
}

} // namespace faiss_saap
