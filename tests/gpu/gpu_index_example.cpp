#include <cstdio>
#include <random>
#include <vector>

#include <faiss_saap/gpu/GpuIndexAsymmetricIVF.h>

using namespace faiss_saap;

int main() {
    if (gpu::device_count() == 0) return std::puts("no CUDA device here") < 0;
    const int n = 100000, d = 128, ncell = 256, queries = 64, k = 10;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(n * d), q(queries * d), distances(queries * k);
    for (auto* v : {&x, &q})
        for (float& f : *v) f = normal(random);
    std::vector<faiss::Index::idx_t> ids(queries * k);

    gpu::GpuIndexAsymmetricIVF index(d, ncell, faiss::METRIC_INNER_PRODUCT);
    index.train(n, x.data()); // cells by k-means, queries by the metric with means
    index.add(n, x.data());   // host or device pointers
    index.nprobe = 16;
    index.search(queries, q.data(), k, distances.data(), ids.data());
    std::printf("best of query 0: vector %lld, %.2f; lists hold %.0f MB\n",
                static_cast<long long>(ids[0]), distances[0], index.memory() / 1e6);
}
