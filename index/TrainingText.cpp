#include <faiss_saap/TrainingText.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>

#include "blas.h"
#include "check.h"
#include "classifier_kernels.h"

namespace faiss_saap {

namespace {

/// Tokens whose scores are computed at a time: with 3 heads of 8,192 keys they
/// stay in the second cache or near it.
constexpr int64_t kBlock = 16;

} // namespace

TrainingText::TrainingText(
        const Trace& trace,
        int layer,
        int kv_head,
        int64_t sink_in,
        int64_t window_in)
        : name(trace.text),
          tokens(trace.tokens),
          d(trace.d),
          group(trace.group()),
          sink(sink_in),
          window(window_in),
          begin(sink_in + window_in),
          end(trace.tokens) {
    FAISS_THROW_IF_NOT_FMT(
            tokens > sink + window,
            "text '%s': %" PRId64 " tokens leave no far keys beyond a sink of "
            "%" PRId64 " and a window of %" PRId64,
            name.c_str(),
            tokens,
            sink,
            window);
    const int at = trace.kv_index(kv_head);
    keys_pre = trace.keys(layer, at);
    keys_post = keys_pre;
    std::vector<int64_t> position(tokens);
    std::iota(position.begin(), position.end(), 0);
    RotaryEmbedding(trace.rope).rotate(
            tokens, position.data(), keys_post.data());
    queries.resize(tokens * group * d);
    for (int g = 0; g < group; g++) {
        const auto q = trace.queries(layer, at * group + g);
        for (int64_t i = 0; i < tokens; i++) {
            std::copy_n(
                    q.data() + i * d,
                    d,
                    queries.data() + (i * group + g) * d);
        }
    }
}

void TrainingText::assign_cells(const CellAssigner& key) {
    cells.resize(tokens);
    RoutingInput input;
    input.n = tokens;
    input.d = d;
    input.pre_rope = keys_pre.data();
    key.assign(input, nullptr, 1, cells.data(), nullptr);
}

void TrainingText::targets(
        const RotaryEmbedding& rotary,
        float scale,
        int ncell,
        int64_t n,
        const int64_t* at,
        TargetBatch& b) const {
    b.x.resize(group * n * d);
    b.mass.resize(group * n * ncell);
    b.total.resize(group * n);
    b.log_count.resize(n * ncell);
    b.far.resize(n);
    b.counts.assign(ncell, 0);
    b.rotated.resize(kBlock * group * d);
    int64_t counted = sink;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t m = std::min(kBlock, n - first);
        const int64_t longest = at[first + m - 1] + 1;
        for (int64_t i = 0; i < m; i++) {
            const int64_t token = at[first + i];
            float* q = b.rotated.data() + i * group * d;
            std::copy_n(queries.data() + token * group * d, group * d, q);
            for (int g = 0; g < group; g++) {
                std::copy_n(
                        q + g * d, d, b.x.data() + (g * n + first + i) * d);
            }
            const std::vector<int64_t> position(group, token);
            rotary.rotate(group, position.data(), q);
        }
        b.scores.resize(m * group * longest);
        multiply_nt(
                m * group,
                longest,
                d,
                b.rotated.data(),
                d,
                keys_post.data(),
                d,
                0,
                b.scores.data(),
                longest);
        for (int64_t i = 0; i < m; i++) {
            const int64_t token = at[first + i];
            const int64_t far_end = token + 1 - window;
            for (; counted < far_end; counted++) {
                b.counts[cells[counted]]++;
            }
            b.far[first + i] = far_end - sink;
            float* log_count = b.log_count.data() + (first + i) * ncell;
            for (int c = 0; c < ncell; c++) {
                log_count[c] = b.counts[c]
                        ? std::log(static_cast<float>(b.counts[c]))
                        : -INFINITY;
            }
            for (int g = 0; g < group; g++) {
                const int64_t row = g * n + first + i;
                b.total[row] = sum_attention_per_cell(
                        token + 1,
                        scale,
                        b.scores.data() + (i * group + g) * longest,
                        cells.data(),
                        sink,
                        far_end,
                        ncell,
                        b.mass.data() + row * ncell);
            }
        }
    }
}

} // namespace faiss_saap
