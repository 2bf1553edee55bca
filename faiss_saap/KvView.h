/// A read-only view of the keys and values of one layer and one sequence.
#pragma once

#include <cstdint>

#include <faiss_saap/dtype.h>

namespace faiss_saap {

/// Where the caller's KV cache lies. The library never owns keys or values and
/// never copies them: it reads rows through this view. A row is the key (or
/// value) of one slot and one KV head; its components are contiguous, all else
/// has a stride. A *slot* is the logical index of a token in its sequence; with
/// a page table it is translated when it is read, so pages may move between
/// calls.
///
/// Strides count elements, not bytes.
struct KvView {
    const void* k = nullptr;
    const void* v = nullptr;
    DType dtype = DType::float32; ///< of both
    int64_t length = 0;           ///< slots 0 .. length - 1 are readable
    int heads = 0;                ///< KV heads
    int d = 0;                    ///< components of a key
    int d_v = 0;                  ///< components of a value

    int64_t k_token_stride = 0, k_head_stride = 0;
    int64_t v_token_stride = 0, v_head_stride = 0;

    /// Page of each block of page_size slots; null where the cache has no
    /// pages. Size ceil(length / page_size); entries 0 .. npages - 1.
    const int32_t* page_table = nullptr;
    int page_size = 0;
    int64_t npages = 0; ///< pages that the buffers hold
    int64_t k_page_stride = 0, v_page_stride = 0;

    /// Tensors of shape (tokens, heads, d) and (tokens, heads, d_v).
    static KvView token_major(
            const void* k,
            const void* v,
            DType dtype,
            int64_t length,
            int heads,
            int d,
            int d_v);

    /// Tensors of shape (heads, capacity, d) and (heads, capacity, d_v), of
    /// which the first `length` tokens are filled.
    static KvView head_major(
            const void* k,
            const void* v,
            DType dtype,
            int64_t length,
            int64_t capacity,
            int heads,
            int d,
            int d_v);

    /// Tensors of shape (npages, page_size, heads, d) and (…, d_v).
    static KvView paged(
            const void* k,
            const void* v,
            DType dtype,
            int64_t length,
            int64_t npages,
            int page_size,
            const int32_t* page_table,
            int heads,
            int d,
            int d_v);

    /// First component of a key or value. Not checked: call `check` once.
    const void* key(int head, int64_t slot) const {
        return row(k, k_page_stride, k_token_stride, k_head_stride, head, slot);
    }
    const void* value(int head, int64_t slot) const {
        return row(v, v_page_stride, v_token_stride, v_head_stride, head, slot);
    }

    /// @throws faiss::FaissException when a pointer is null or a size is not
    ///         positive. Reads no memory: a view may be of a device's.
    void check_shape() const;
    /// `check_shape`, and every page is there.
    /// @throws faiss::FaissException also when the page table points outside the
    ///         buffers
    void check() const;

   private:
    const void* row(
            const void* base,
            int64_t page_stride,
            int64_t token_stride,
            int64_t head_stride,
            int head,
            int64_t slot) const {
        int64_t at = head * head_stride;
        if (page_table) {
            at += page_table[slot / page_size] * page_stride +
                    slot % page_size * token_stride;
        } else {
            at += slot * token_stride;
        }
        return static_cast<const char*>(base) +
                at * static_cast<int64_t>(element_size(dtype));
    }
};

} // namespace faiss_saap
