/// A small C interface to the attention adapter on the device, for languages
/// that load a shared library and have device pointers. All else is in
/// gpu/GpuAttentionAdapter.h, whose words are used here.
///
/// Functions that return a pointer return null, and those that return an int
/// return 1, when they fail; `saap_last_error` then has the sentence, of the calling thread.
/// `stream` is a cudaStream_t. Rows of caches and queries begin at multiples of 16 bytes. What
/// is done with an adapter is done by one thread at a time.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct SaapAdapter SaapAdapter;
typedef struct SaapBatch SaapBatch;

typedef struct SaapAdapterParams {
    int32_t heads_q, heads_kv, d;
    int32_t ncell;
    int32_t device;
    int32_t share_group; /**< 0: a choice for each query head */
    int64_t sink, window;
    float scale; /**< 0: 1 / sqrt(d) */
    int32_t nprobe;
    double max_selectivity; /**< of the far keys, per KV head */
    /** of the centroids: 0: no RoPE is undone, else theta of the rotation, whose
     * halves turn together as in Hugging Face */
    double rope_theta;
} SaapAdapterParams;

/** One sequence: k and v of shape (length, heads_kv, d) with the given strides in
 * elements, or pages of page_size tokens that page_table names. */
typedef struct SaapSequenceInput {
    int64_t sequence, q_len;
    const void *k, *v;
    int32_t is_bfloat16; /**< else float16 */
    int64_t length;      /**< slots that can be read */
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    const int32_t* page_table; /**< null: no pages */
    int32_t page_size;
    int64_t npages, k_page_stride, v_page_stride;
} SaapSequenceInput;

/** The sentence of the last failure in this thread. */
const char* saap_last_error(void);

/** @param centroids  host memory, size heads_kv * ncell * d: keys go to the
 *                    nearest, queries to those of largest inner product */
SaapAdapter* saap_adapter_new(
        const SaapAdapterParams* params,
        const float* centroids);
void saap_adapter_free(SaapAdapter* adapter);

/** @return the sequence's number, or -1 */
int64_t saap_create(SaapAdapter* adapter, int64_t reserve, void* stream);
/** @return the copy's number, or -1 */
int64_t saap_fork(SaapAdapter* adapter, int64_t sequence, void* stream);
int saap_free(SaapAdapter* adapter, int64_t sequence, void* stream);
int saap_reset(SaapAdapter* adapter, int64_t sequence, void* stream);
int saap_reserve(
        SaapAdapter* adapter,
        int64_t sequence,
        int64_t tokens,
        void* stream);
/** @param input  the sequence and its view; q_len is not read */
int saap_truncate(
        SaapAdapter* adapter,
        int64_t length,
        const SaapSequenceInput* input,
        void* stream);
/** @return tokens seen so far, or -1; synchronises */
int64_t saap_length(SaapAdapter* adapter, int64_t sequence, void* stream);

SaapBatch* saap_plan(
        SaapAdapter* adapter,
        int32_t n,
        const SaapSequenceInput* inputs,
        void* stream);
void saap_batch_free(SaapBatch* batch);

int saap_append(SaapAdapter* adapter, const SaapBatch* batch, void* stream);
/** @param queries  device memory, of the caches' type, tokens * heads_q * d
 *  @param output   device memory, float32, likewise
 *  @param lse      device memory, float32, tokens * heads_q; may be null */
int saap_attend(
        SaapAdapter* adapter,
        const SaapBatch* batch,
        const void* queries,
        float* output,
        float* lse,
        void* stream);
/** saap_append, then saap_attend: a decode step, in one launch where it can be
 * (GpuAttentionAdapter::step). */
int saap_step(
        SaapAdapter* adapter,
        const SaapBatch* batch,
        const void* queries,
        float* output,
        float* lse,
        void* stream);
/** What kernels have raised; the caller synchronises first to hear of all. */
int saap_check(SaapAdapter* adapter);

#ifdef __cplusplus
}
#endif
