/// A scan of compressed keys: product quantization (faiss::IndexPQ) of the keys
/// as they are cached, an inner product with every code, the best keys one by
/// one. `pq_scan` has a byte for every 8 components, `pq_scan_4bit` half of it;
/// `pqcache` has the codes of PQCache (arXiv 2407.12820).
#include <faiss/IndexPQ.h>

#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

/// Of one key: so many, of so many bits each.
struct Codes {
    int count, bits;
};

struct PqScan : Method {
    faiss::IndexPQ index;
    int64_t first;
    bool share_group;

    PqScan(const Setup& s, Codes codes, bool share)
            : index(s.data.d,
                    codes.count,
                    codes.bits,
                    faiss::METRIC_INNER_PRODUCT),
              first(s.sink),
              share_group(share) {
        index.pq.cp.niter = s.niter;
        index.pq.cp.seed = s.seed;
        index.pq.cp.min_points_per_centroid = 1; // no warnings
        index.train(s.clustered, s.data.keys_post.data());
    }

    void build(const HeadData& data, int64_t end) override {
        const int64_t begin = first + index.ntotal;
        if (begin < end) {
            index.add(end - begin, data.keys_post.data() + begin * data.d);
        }
    }

    Selection probe(const Step& step, int64_t limit) const override {
        const faiss::ProductQuantizer& pq = index.pq;
        const int64_t n = step.far.size();
        std::vector<float> scores, table(pq.M * pq.ksub);
        scores.reserve(n * step.data.group);
        // Codes are unpacked once for all heads.
        std::vector<uint16_t> codes(n * pq.M);
        for (int64_t j = 0; j < n; j++) {
            faiss::PQDecoderGeneric decoder(
                    index.codes.data() + j * pq.code_size,
                    static_cast<int>(pq.nbits));
            for (size_t m = 0; m < pq.M; m++) {
                codes[j * pq.M + m] = static_cast<uint16_t>(decoder.decode());
            }
        }
        for (int h = 0; h < step.data.group; h++) {
            pq.compute_inner_prod_table(
                    step.data.query_post(step.token, h), table.data());
            for (int64_t j = 0; j < n; j++) {
                float dot = 0;
                for (size_t m = 0; m < pq.M; m++) {
                    dot += table[m * pq.ksub + codes[j * pq.M + m]];
                }
                scores.push_back(dot);
            }
        }
        Selection selection;
        selection.slots = best_keys_of_group(step, scores, share_group, limit);
        // Codes of all keys, to the bit, and the codebooks.
        selection.index_bytes =
                static_cast<double>(pq.M * pq.nbits) / 8 * step.data.tokens +
                kNumberBytes * static_cast<double>(pq.ksub * pq.d);
        return selection;
    }
};

/// A key of PQCache has more codes where there are more keys to tell apart
/// (RetroInfer, arXiv 2505.02922, section 5.1).
Codes of_pqcache(const Setup& s) {
    return s.data.tokens <= 16384 ? Codes{2, 6} : Codes{4, 8};
}

MethodEntry entry(
        const std::string& name,
        const std::function<Codes(const Setup&)>& codes) {
    return {name, [=](const Setup& s, bool share) {
                return std::make_unique<PqScan>(s, codes(s), share);
            }};
}

} // namespace

MethodEntries pq_scan_methods() {
    const auto eighths = [](int bits) {
        return [=](const Setup& s) { return Codes{s.data.d / 8, bits}; };
    };
    return {entry("pq_scan", eighths(8)),
            entry("pq_scan_4bit", eighths(4)),
            entry("pqcache", of_pqcache)};
}

} // namespace faiss_saap::benchs
