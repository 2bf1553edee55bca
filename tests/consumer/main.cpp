// A project that knows the installed package alone.
#include <cstdio>
#include <vector>

#include <faiss_saap/index_factory.h>
#include <faiss_saap/version.h>

int main() {
    std::vector<float> x(100 * 4);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = static_cast<float>(i % 17);
    }
    auto index = faiss_saap::index_factory(4, "AIVF5,Flat");
    index->train(100, x.data());
    index->add(100, x.data());
    index->nprobe = 5;
    float distance;
    faiss_saap::idx_t label;
    index->search(1, x.data() + 40 * 4, 1, &distance, &label);
    std::printf("faiss_saap %s\n", FAISS_SAAP_VERSION);
    return distance == 0 ? 0 : 1;
}
