#include <faiss_saap/attend_slots.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <vector>

#include "check.h"
#include "inner_product.h"

namespace faiss_saap {

namespace {

/// Keys per tile: one maximum and one rescaling per tile, and sums that stay
/// short enough for float32.
constexpr int kTile = 64;

/// An online softmax (Milakov and Gimelshein, arXiv 1805.02867) over tiles of
/// rows, for nq queries that read the same rows.
struct OnlineSoftmax {
    const KvView& kv;
    int nq;
    const float* queries;
    float scale;
    std::vector<float> maximum, sum, output; // nq, nq, nq * d_v
    std::vector<float> rows, weights, tile_output;

    OnlineSoftmax(const KvView& kv_in, int nq_in, const float* q, float s)
            : kv(kv_in),
              nq(nq_in),
              queries(q),
              scale(s),
              maximum(nq_in, -INFINITY),
              sum(nq_in, 0.0f),
              output(size_t(nq_in) * kv_in.d_v, 0.0f),
              rows(size_t(kTile) * std::max(kv_in.d, kv_in.d_v)),
              weights(size_t(nq_in) * kTile),
              tile_output(kv_in.d_v) {}

    /// Rows as float: in place where the cache is float32.
    template <class RowOf>
    void load(int n, int width, const RowOf& row_of, const float** row) {
        for (int i = 0; i < n; i++) {
            const void* source = row_of(i);
            if (kv.dtype == DType::float32) {
                row[i] = static_cast<const float*>(source);
            } else {
                float* target = rows.data() + int64_t(i) * width;
                to_float(kv.dtype, source, width, target);
                row[i] = target;
            }
        }
    }

    /// Rows of a chosen slot lie anywhere: asking for them a tile ahead hides
    /// the memory's latency.
    template <class SlotOf>
    void prefetch_tile(int kv_head, int n, const SlotOf& slot_of) const {
        constexpr size_t kLine = 64;
        const auto fetch = [](const void* row, size_t bytes) {
            for (size_t at = 0; at < bytes; at += kLine) {
                __builtin_prefetch(static_cast<const char*>(row) + at);
            }
        };
        const size_t element = element_size(kv.dtype);
        for (int i = 0; i < n; i++) {
            const int64_t slot = slot_of(i);
            fetch(kv.key(kv_head, slot), kv.d * element);
            fetch(kv.value(kv_head, slot), kv.d_v * element);
        }
    }

    template <class SlotOf>
    void add_tile(int kv_head, int n, const SlotOf& slot_of) {
        const float* row[kTile];
        load(n, kv.d, [&](int i) { return kv.key(kv_head, slot_of(i)); }, row);
        for (int h = 0; h < nq; h++) {
            float* w = weights.data() + h * kTile;
            for (int i = 0; i < n; i++) {
                w[i] = scale *
                        inner_product(queries + int64_t(h) * kv.d, row[i], kv.d);
            }
        }
        load(n,
             kv.d_v,
             [&](int i) { return kv.value(kv_head, slot_of(i)); },
             row);
        for (int h = 0; h < nq; h++) {
            float* w = weights.data() + h * kTile;
            const float new_maximum =
                    std::max(maximum[h], *std::max_element(w, w + n));
            if (new_maximum == -INFINITY) {
                continue; // exp(-inf - -inf) would be NaN
            }
            const float shrink = std::exp(maximum[h] - new_maximum);
            float tile_sum = 0;
            std::fill(tile_output.begin(), tile_output.end(), 0.0f);
            for (int i = 0; i < n; i++) {
                const float weight = std::exp(w[i] - new_maximum);
                tile_sum += weight;
                for (int j = 0; j < kv.d_v; j++) {
                    tile_output[j] += weight * row[i][j];
                }
            }
            maximum[h] = new_maximum;
            sum[h] = sum[h] * shrink + tile_sum;
            float* o = output.data() + int64_t(h) * kv.d_v;
            for (int j = 0; j < kv.d_v; j++) {
                o[j] = o[j] * shrink + tile_output[j];
            }
        }
    }

    void finish(float* out, float* lse) const {
        for (int h = 0; h < nq; h++) {
            const float norm = sum[h] > 0 ? 1 / sum[h] : 0.0f;
            for (int64_t j = int64_t(h) * kv.d_v; j < int64_t(h + 1) * kv.d_v;
                 j++) {
                out[j] = output[j] * norm;
            }
            lse[h] = sum[h] > 0 ? maximum[h] + std::log(sum[h]) : -INFINITY;
        }
    }
};

template <class SlotOf>
void attend(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        int64_t n,
        const SlotOf& slot_of,
        float* output,
        float* lse) {
    OnlineSoftmax state(kv, nq, queries, scale);
    const auto tile_at = [n](int64_t begin) {
        return static_cast<int>(std::clamp<int64_t>(n - begin, 0, kTile));
    };
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t next = begin + kTile;
        state.prefetch_tile(kv_head, tile_at(next), [&](int i) {
            return slot_of(next + i);
        });
        state.add_tile(kv_head, tile_at(begin), [&](int i) {
            return slot_of(begin + i);
        });
    }
    state.finish(output, lse);
}

void check_call(
        const KvView& kv,
        int kv_head,
        int nq,
        const float* queries,
        float scale,
        const float* output,
        const float* lse) {
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
    check_call(kv, kv_head, nq, queries, scale, output, lse);
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
    attend(
            kv,
            kv_head,
            nq,
            queries,
            scale,
            n,
            [slots](int64_t i) { return slots[i]; },
            output,
            lse);
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
    check_call(kv, kv_head, nq, queries, scale, output, lse);
    FAISS_THROW_IF_NOT_FMT(
            begin >= 0 && begin <= end && end <= kv.length,
            "slots %" PRId64 " .. %" PRId64
            " - 1 are outside the view, which has %" PRId64,
            begin,
            end,
            kv.length);
    attend(
            kv,
            kv_head,
            nq,
            queries,
            scale,
            end - begin,
            [begin](int64_t i) { return begin + i; },
            output,
            lse);
}

} // namespace faiss_saap
