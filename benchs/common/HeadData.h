/// One KV head of a trace and its group of query heads, ready to be searched.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/KvView.h>
#include <faiss_saap/Trace.h>

namespace faiss_saap::benchs {

struct HeadData {
    int layer = 0, kv_head = 0; ///< the model's numbers
    int64_t tokens = 0;
    int d = 0;
    int group = 0; ///< query heads
    float scale = 0;
    RopeParams rope;
    std::vector<int> query_heads;              ///< the model's numbers
    std::vector<int64_t> position;             ///< 0 .. tokens - 1
    std::vector<float> keys_pre, keys_post;    ///< tokens * d
    std::vector<float> values;                 ///< tokens * d
    std::vector<float> queries_pre, queries_post; ///< tokens * group * d

    HeadData(const Trace& trace, int layer, int kv_head);

    const float* query_pre(int64_t token, int head) const {
        return queries_pre.data() + (token * group + head) * d;
    }
    const float* query_post(int64_t token, int head) const {
        return queries_post.data() + (token * group + head) * d;
    }
    /// The first `length` tokens as a cache.
    KvView view(int64_t length) const;
};

} // namespace faiss_saap::benchs
