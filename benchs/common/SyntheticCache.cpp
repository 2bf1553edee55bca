#include "SyntheticCache.h"

#include <cmath>
#include <new>

#include <sys/mman.h>

namespace faiss_saap::benchs {

Buffer::Buffer(size_t bytes, bool huge_pages) : bytes_(bytes) {
    data_ = mmap(
            nullptr,
            bytes,
            PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            -1,
            0);
    if (data_ == MAP_FAILED) {
        throw std::bad_alloc();
    }
    // Without a hint the kernel may use either, and ratios would wander.
    madvise(data_, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

Buffer::~Buffer() {
    munmap(data_, bytes_);
}

namespace {

size_t bytes_of(const CacheShape& s) {
    return s.tokens * s.heads * s.d * element_size(s.dtype);
}

} // namespace

SyntheticCache::SyntheticCache(const CacheShape& s, std::mt19937& random)
        : k(bytes_of(s), s.huge_pages),
          v(s.values ? bytes_of(s) : 4096, s.huge_pages) {
    kv = KvView::token_major(
            k.data(),
            s.values ? v.data() : k.data(),
            s.dtype,
            s.tokens,
            s.heads,
            s.d,
            s.d);
    // Noise is drawn from a pool: drawing it anew would take longer than the
    // benchmark.
    std::normal_distribution<float> normal;
    std::vector<float> pool(1 << 16), row(s.d);
    for (float& f : pool) {
        f = normal(random);
    }
    for (int h = 0; h < s.heads; h++) {
        std::vector<float> centre(size_t(s.ncell) * s.d);
        for (float& f : centre) {
            f = normal(random);
        }
        std::vector<double> weight(s.ncell);
        for (double& w : weight) {
            w = std::exp(s.skew * normal(random));
        }
        std::discrete_distribution<int> cell(weight.begin(), weight.end());
        for (int64_t t = 0; t < s.tokens; t++) {
            const float* c = centre.data() + int64_t(cell(random)) * s.d;
            size_t at = random() % (pool.size() - s.d);
            for (int j = 0; j < s.d; j++) {
                row[j] = c[j] + 0.3f * pool[at + j];
            }
            from_float(
                    s.dtype, row.data(), s.d, const_cast<void*>(kv.key(h, t)));
            if (s.values) {
                at = random() % (pool.size() - s.d);
                from_float(
                        s.dtype,
                        pool.data() + at,
                        s.d,
                        const_cast<void*>(kv.value(h, t)));
            }
        }
        centres.push_back(std::move(centre));
    }
}

} // namespace faiss_saap::benchs
