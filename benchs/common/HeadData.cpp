#include "HeadData.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace faiss_saap::benchs {

HeadData::HeadData(const Trace& trace, int l, int h)
        : layer(l),
          kv_head(h),
          tokens(trace.tokens),
          d(trace.d),
          group(trace.group()),
          scale(1 / std::sqrt(static_cast<float>(trace.d))),
          rope(trace.rope),
          position(trace.tokens) {
    std::iota(position.begin(), position.end(), 0);
    const RotaryEmbedding rotary(rope);
    const int at = trace.kv_index(kv_head);
    keys_pre = trace.keys(layer, at);
    keys_post = keys_pre;
    rotary.rotate(tokens, position.data(), keys_post.data());
    values = trace.values(layer, at);
    queries_pre.resize(tokens * group * d);
    queries_post.resize(tokens * group * d);
    for (int g = 0; g < group; g++) {
        query_heads.push_back(kv_head * group + g);
        std::vector<float> q = trace.queries(layer, at * group + g);
        const auto scatter = [&](std::vector<float>& target) {
            for (int64_t i = 0; i < tokens; i++) {
                std::copy_n(
                        q.data() + i * d,
                        d,
                        target.data() + (i * group + g) * d);
            }
        };
        scatter(queries_pre);
        rotary.rotate(tokens, position.data(), q.data());
        scatter(queries_post);
    }
}

KvView HeadData::view(int64_t length) const {
    return KvView::token_major(
            keys_post.data(), values.data(), DType::float32, length, 1, d, d);
}

} // namespace faiss_saap::benchs
