/// MagicPIG (arXiv 2410.16179): sampling by locality-sensitive hashing. Keys
/// less their mean are hashed by the signs of K random projections into each of
/// L tables; a key is sampled when it shares the query's bucket in at least two
/// tables. Its weight is divided by the probability of that, which the angle
/// between query and key tells, so that the estimate of attention is (nearly)
/// unbiased.
///
/// The paper fixes K and L; a budget is kept here by opening as many tables as
/// it allows. K = 8 for some thousand keys (the paper: 8 to 11). The entries with
/// two numbers have the paper's K and L: with a budget of all keys they read what
/// the paper's method reads.
#include <algorithm>
#include <cmath>
#include <random>

#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

struct MagicPig : Method {
    int bits, tables_made;
    std::vector<float> planes; ///< size tables_made * bits * d
    std::vector<double> centre; ///< of the clustered keys
    int64_t first, seen;
    /// slots of each bucket of each table, ascending
    std::vector<std::vector<int32_t>> buckets;

    MagicPig(const Setup& s, int k, int l)
            : bits(k),
              tables_made(l),
              planes(int64_t(l) * k * s.data.d),
              centre(s.data.d, 0.0),
              first(s.sink),
              seen(s.sink),
              buckets(size_t(l) << k) {
        std::mt19937 random(s.seed);
        std::normal_distribution<float> normal;
        for (float& f : planes) {
            f = normal(random);
        }
        const int64_t n = s.clustered * s.data.d;
        for (int64_t i = 0; i < n; i++) {
            centre[i % s.data.d] +=
                    s.data.keys_post[i] / static_cast<double>(s.clustered);
        }
    }

    /// The bucket of a vector in a table.
    int hash(int table, const float* x, int d) const {
        int bucket = 0;
        for (int b = 0; b < bits; b++) {
            const float* plane =
                    planes.data() + (int64_t(table) * bits + b) * d;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int i = 0; i < d; i++) {
                dot += plane[i] * x[i];
            }
            bucket = 2 * bucket + (dot > 0);
        }
        return bucket;
    }

    std::vector<float> centred(const HeadData& data, int64_t slot) const {
        std::vector<float> x(data.d);
        for (int i = 0; i < data.d; i++) {
            x[i] = data.keys_post[slot * data.d + i] -
                    static_cast<float>(centre[i]);
        }
        return x;
    }

    void build(const HeadData& data, int64_t end) override {
        const int64_t begin = seen;
        seen = std::max(seen, end);
#pragma omp parallel for
        for (int t = 0; t < tables_made; t++) {
            for (int64_t j = begin; j < end; j++) {
                const auto x = centred(data, j);
                buckets[(size_t(t) << bits) + hash(t, x.data(), data.d)]
                        .push_back(static_cast<int32_t>(j));
            }
        }
    }

    Selection probe(const Step& step, int64_t limit) const override {
        Selection selection;
        for (int h = 0; h < step.data.group; h++) {
            probe_head(step, h, limit, selection);
        }
        return selection;
    }

    void probe_head(
            const Step& step,
            int head,
            int64_t limit,
            Selection& selection) const {
        const HeadData& data = step.data;
        const int d = data.d;
        const float* q = data.query_post(step.token, head);
        std::vector<uint16_t> hits(step.far.size(), 0);
        std::vector<int32_t> sampled;
        int tables = 0;
        for (; tables < tables_made; tables++) {
            const auto& bucket =
                    buckets[(size_t(tables) << bits) + hash(tables, q, d)];
            const size_t before = sampled.size();
            for (int32_t j : bucket) {
                if (j < step.far.end && ++hits[j - step.far.begin] == 2) {
                    sampled.push_back(j);
                }
            }
            // A bucket's slots are read, 4 bytes each.
            selection.index_bytes += 4.0 * static_cast<double>(bucket.size());
            if (static_cast<int64_t>(sampled.size()) > limit) {
                sampled.resize(before); // this table is one too many
                break;
            }
        }
        std::sort(sampled.begin(), sampled.end());
        selection.attended.push_back(attend(step, q, sampled, tables));
        selection.slots.push_back(std::move(sampled));
    }

    /// Softmax over the sampled keys, each weight divided by the probability
    /// that it was sampled.
    Selection::State attend(
            const Step& step,
            const float* q,
            const std::vector<int32_t>& sampled,
            int tables) const {
        const HeadData& data = step.data;
        const int d = data.d;
        double query_norm = 0;
        for (int i = 0; i < d; i++) {
            query_norm += double(q[i]) * q[i];
        }
        std::vector<double> logits;
        for (int32_t j : sampled) {
            const auto x = centred(data, j);
            double dot = 0, centred_dot = 0, key_norm = 0;
            for (int i = 0; i < d; i++) {
                dot += double(q[i]) * data.keys_post[int64_t(j) * d + i];
                centred_dot += double(q[i]) * x[i];
                key_norm += double(x[i]) * x[i];
            }
            const double cosine = std::clamp(
                    centred_dot / std::sqrt(query_norm * key_norm + 1e-30),
                    -1.0,
                    1.0);
            logits.push_back(
                    data.scale * dot -
                    std::log(sampling_probability(cosine, tables)));
        }
        Selection::State state{std::vector<float>(d, 0.0f), -INFINITY};
        if (sampled.empty()) {
            return state;
        }
        const double top = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        std::vector<double> output(d, 0.0);
        for (size_t s = 0; s < sampled.size(); s++) {
            const double w = std::exp(logits[s] - top);
            sum += w;
            for (int i = 0; i < d; i++) {
                output[i] += w * data.values[int64_t(sampled[s]) * d + i];
            }
        }
        for (int i = 0; i < d; i++) {
            state.output[i] = static_cast<float>(output[i] / sum);
        }
        state.lse = static_cast<float>(top + std::log(sum));
        return state;
    }

    /// Of a key at this cosine: at least two of the tables.
    double sampling_probability(double cosine, int tables) const {
        const double hit = std::pow(1 - std::acos(cosine) / M_PI, bits);
        const double none = std::pow(1 - hit, tables);
        const double one = tables * hit * std::pow(1 - hit, tables - 1);
        return std::max(1 - none - one, 1e-12);
    }
};

MethodEntry entry(const std::string& name, int bits, int tables) {
    MethodEntry e;
    e.name = name;
    e.make = [=](const Setup& s, bool) {
        return std::make_unique<MagicPig>(s, bits, tables);
    };
    e.has_group = false;
    return e;
}

} // namespace

MethodEntries magicpig_methods() {
    return {entry("magicpig", 8, 300),
            entry("magicpig_8x75", 8, 75),
            entry("magicpig_9x120", 9, 120),
            entry("magicpig_10x150", 10, 150)};
}

} // namespace faiss_saap::benchs
