#include <cstdio>
#include <random>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/attend_slots.h>

using namespace faiss_saap;

int main() {
    const int n = 4096, d = 64, heads_q = 3; // one KV head, a group of three
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> k(n * d), v(n * d), q(heads_q * d), out(heads_q * d), lse(heads_q);
    for (auto* x : {&k, &v, &q})
        for (float& f : *x) f = normal(random);

    // A partition of the keys (your engine's cache, post-RoPE) into 256 cells:
    // k-means for keys, inner product with the cells' means for queries.
    Partition partition = kmeans_partition(n, d, k.data(), 256, NEEDS_POST_ROPE);

    AdapterParams params;
    params.heads_q = heads_q, params.heads_kv = 1, params.d = d;
    params.policy.max_selectivity = 0.05; // read 5 % of the far keys
    AttentionAdapter adapter(params, {partition});

    KvView kv = KvView::token_major(k.data(), v.data(), DType::float32, n, 1, d, d);
    const int64_t sequence = adapter.create();
    adapter.append(sequence, kv); // again after every new token: O(1) each
    std::vector<AttendStats> stats(heads_q);
    adapter.attend({{sequence, kv}}, q.data(), {out.data(), lse.data(), stats.data()});
    std::printf("read %.1f %% of %lld far keys, LSE %.3f\n", 100 * stats[0].selectivity(),
                static_cast<long long>(stats[0].far_keys), lse[0]);
}
