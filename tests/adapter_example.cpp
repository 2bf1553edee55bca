#include <cstdio>
#include <random>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>

using namespace faiss_saap;

int main() {
    const int n = 6000, d = 64, heads_q = 8, heads_kv = 2;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> k(n * heads_kv * d), v(k.size()), q(heads_q * d), out(q.size()), lse(heads_q);
    for (auto* x : {&k, &v, &q})
        for (float& f : *x) f = normal(random);
    // The cache of your engine; it grows, the view tells how far it is filled.
    auto view = [&](int64_t tokens) {
        return KvView::token_major(k.data(), v.data(), DType::float32, tokens, heads_kv, d, d);
    };

    AdapterParams params;
    params.heads_q = heads_q, params.heads_kv = heads_kv, params.d = d;
    params.policy.max_selectivity = 0.05; // of the far keys, per KV head
    AttentionAdapter adapter(params); // partitions learnt offline would go here

    // Prefill: cells from this prompt's own keys, then all of its tokens.
    const int64_t prompt = 4000;
    const int64_t a = adapter.create(sequence_partitions(view(prompt), params.sink, prompt, 64));
    adapter.append(a, view(prompt));

    // Decode: note the new token, then attend. A batch may hold many sequences.
    for (int64_t tokens = prompt + 1; tokens <= 4100; tokens++) {
        adapter.append(a, view(tokens));
        adapter.attend({{a, view(tokens)}}, q.data(), {out.data(), lse.data()});
    }

    // Speculate: three tokens ahead, all asked at once; the last two rejected.
    std::vector<float> q3(3 * q.size(), 0.1f), out3(q3.size());
    adapter.append(a, view(4103));
    adapter.attend({{a, view(4103), 3}}, q3.data(), {out3.data()});
    adapter.truncate(a, 4101, view(4103));

    // Two continuations of one text share its lists.
    const int64_t b = adapter.fork(a);
    adapter.append(b, view(6000));
    std::printf("%lld and %lld tokens in %.2f MB\n", static_cast<long long>(adapter.length(a)),
                static_cast<long long>(adapter.length(b)), adapter.bytes_used() / 1e6);
    adapter.free(a);
}
