/// Cells and codes in the metric of the queries.
///
/// What matters of a key is its inner product with queries: an error in a
/// direction in which queries never point costs nothing. With C the second
/// moment of the sequence's own queries so far (those of its first half), half
/// of it replaced by a multiple of the unit matrix, and C = L L', the vectors
/// k' = L' k and q' = L^-1 q have the same inner products, and distances between
/// keys k' are about the root mean square of the differences of their logits.
///
/// - `metric_cells`: k-means of k', a cell for every 16 keys, means as int8;
/// - `metric_codes`: two levels. Cells of 64 keys choose six times the keys that
///   may be read; these are ranked one by one by 4-bit product codes of what the
///   cell's mean leaves over (half a byte for every four components).
///
/// The map of queries is stored as int8 too.
///
/// What comes after the clustered prefix is clustered in segments of the window,
/// at most 1,024 tokens: where rotated keys move on, old cells do not fit them.
/// Where they do not, old cells are the better ones: each key goes to the nearest
/// of all. The metric and the codes stay those of the prefix.
#include <algorithm>
#include <cmath>
#include <numeric>

#include <faiss/IndexFlat.h>
#include <faiss/VectorTransform.h>
#include <faiss/impl/ProductQuantizer.h>

#include <faiss_saap/ProbePolicy.h>
#include <faiss_saap/QuantizerAssigner.h>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

/// Rounds a row to what int8 with a scale of its own holds.
void round_to_int8(int n, float* x) {
    float top = 1e-20f;
    for (int i = 0; i < n; i++) {
        top = std::max(top, std::abs(x[i]));
    }
    for (int i = 0; i < n; i++) {
        x[i] = std::round(x[i] / top * 127) * top / 127;
    }
}

/// Bytes of such a row.
double int8_bytes(int n) {
    return n + kNumberBytes;
}

/// The two linear maps, k -> k' and q -> q', to r components each.
struct QueryMetric {
    int d, r;
    std::vector<float> key, query; ///< size r * d

    explicit QueryMetric(const Setup& s)
            : d(s.data.d), r(s.data.d) {
        const auto L = cholesky(second_moment(s.data));
        // L' k of the clustered keys, and their principal components.
        std::vector<float> moved(s.clustered * d, 0.0f);
#pragma omp parallel for
        for (int64_t j = 0; j < s.clustered; j++) {
            const float* k = s.data.keys_post.data() + j * d;
            for (int a = 0; a < d; a++) {
                for (int b = 0; b <= a; b++) {
                    moved[j * d + b] += static_cast<float>(L[a * d + b]) * k[a];
                }
            }
        }
        faiss::PCAMatrix pca(d, r);
        pca.train(s.clustered, moved.data());
        key.assign(int64_t(r) * d, 0.0f);
        query.assign(int64_t(r) * d, 0.0f);
        for (int i = 0; i < r; i++) {
            // The i-th component and the i-th last one share a code, so that
            // codes have about as much to tell each.
            const int row = i % 2 == 0 ? i / 2 : r - 1 - i / 2;
            const float* v = pca.A.data() + int64_t(row) * d;
            // Row i of V L', and of V L^-1: x = L^-T v solves L' x = v.
            std::vector<double> x(v, v + d);
            for (int a = d - 1; a >= 0; a--) {
                for (int b = a + 1; b < d; b++) {
                    x[a] -= L[b * d + a] * x[b];
                }
                x[a] /= L[a * d + a];
            }
            for (int a = 0; a < d; a++) {
                for (int b = 0; b <= a; b++) {
                    key[i * d + a] += static_cast<float>(L[a * d + b]) * v[b];
                }
                query[i * d + a] = static_cast<float>(x[a]);
            }
            round_to_int8(d, query.data() + i * d);
        }
    }

    std::vector<float> map(const std::vector<float>& m, const float* x) const {
        std::vector<float> y(r, 0.0f);
        for (int i = 0; i < r; i++) {
            for (int a = 0; a < d; a++) {
                y[i] += m[i * d + a] * x[a];
            }
        }
        return y;
    }

    double bytes() const {
        return r * int8_bytes(d);
    }

   private:
    /// Of the queries of the first half, and as much of the unit matrix: rare
    /// queries, which point elsewhere, matter most on some heads.
    static std::vector<double> second_moment(const HeadData& data) {
        const int d = data.d;
        const int64_t n = data.tokens / 2 * data.group;
        std::vector<double> c(d * d, 0.0);
        double trace = 0;
        for (int64_t i = 0; i < n; i++) {
            const float* q = data.queries_post.data() + i * d;
            for (int a = 0; a < d; a++) {
                for (int b = 0; b <= a; b++) {
                    c[a * d + b] += double(q[a]) * q[b] / double(n);
                }
                trace += double(q[a]) * q[a] / double(n);
            }
        }
        for (int a = 0; a < d; a++) {
            c[a * d + a] += trace / d + 1e-20;
        }
        return c;
    }

    /// L of the lower triangle of a positive definite matrix.
    std::vector<double> cholesky(std::vector<double> c) const {
        for (int a = 0; a < d; a++) {
            for (int b = 0; b <= a; b++) {
                double sum = c[a * d + b];
                for (int i = 0; i < b; i++) {
                    sum -= c[a * d + i] * c[b * d + i];
                }
                c[a * d + b] = a == b ? std::sqrt(sum) : sum / c[b * d + b];
            }
        }
        return c;
    }
};

struct MetricCells : CellMethod {
    QueryMetric metric;
    KMeansParams kmeans;
    int64_t clustered, sink, tokens, segment;
    int keys_per_cell;
    std::vector<float> means; ///< as int8 with a scale holds them, ncell * r
    int made = 0;             ///< cells so far
    std::vector<int32_t> cells; ///< of the keys of slots sink .., so far

    MetricCells(const Setup& s, int per_cell, bool share)
            : CellMethod(
                      CellLists(count(s, per_cell), s.data.d, s.sink, false),
                      s.sink,
                      share),
              metric(s),
              clustered(std::max(s.clustered, s.sink + 1)),
              sink(s.sink),
              tokens(s.data.tokens),
              segment(segment_of(s)),
              keys_per_cell(per_cell) {
        kmeans.niter = s.niter;
        kmeans.seed = s.seed;
        means.assign(int64_t(lists.ncell()) * metric.r, 0.0f);
        cluster(s.data, clustered);
    }

    static int64_t segment_of(const Setup& s) {
        return std::clamp<int64_t>(s.window, 64, 1024);
    }
    static int cells_for(int64_t keys, int per_cell) {
        return static_cast<int>(std::max<int64_t>(1, keys / per_cell));
    }
    static int count(const Setup& s, int per_cell) {
        int n = cells_for(s.clustered - s.sink, per_cell);
        for (int64_t at = s.clustered; at < s.data.tokens; at += segment_of(s)) {
            n += cells_for(
                    std::min(segment_of(s), s.data.tokens - at), per_cell);
        }
        return n;
    }

    /// k' of slots begin .. end - 1, size (end - begin) * r.
    std::vector<float> mapped(const HeadData& data, int64_t begin, int64_t end)
            const {
        std::vector<float> all;
        all.reserve((end - begin) * metric.r);
        for (int64_t j = begin; j < end; j++) {
            const auto y =
                    metric.map(metric.key, data.keys_post.data() + j * data.d);
            all.insert(all.end(), y.begin(), y.end());
        }
        return all;
    }

    /// Cells of their own for the keys up to `end`.
    void cluster(const HeadData& data, int64_t end) {
        const int64_t begin = sink + static_cast<int64_t>(cells.size());
        const int64_t n = end - begin;
        const int r = metric.r, ncell = cells_for(n, keys_per_cell);
        const auto keys = mapped(data, begin, end);
        const Partition p = kmeans_partition(
                n, r, keys.data(), ncell, NEEDS_POST_ROPE, kmeans);
        RoutingInput input;
        input.n = n;
        input.d = r;
        input.post_rope = keys.data();
        std::vector<int32_t> own(n);
        p.key->assign(input, nullptr, 1, own.data(), nullptr);
        float* first = means.data() + int64_t(made) * r;
        cell_means(n, r, keys.data(), own.data(), ncell, first);
        for (int c = 0; c < ncell; c++) {
            round_to_int8(r, first + int64_t(c) * r);
        }
        for (int32_t& c : own) {
            c += made;
        }
        made += ncell;
        if (begin > sink) {
            own = nearest_cells(keys);
        }
        cells.insert(cells.end(), own.begin(), own.end());
    }

    /// Of all cells so far, old ones too.
    std::vector<int32_t> nearest_cells(const std::vector<float>& keys) const {
        auto all = std::make_shared<faiss::IndexFlatL2>(metric.r);
        all->add(made, means.data());
        RoutingInput input;
        input.n = static_cast<int64_t>(keys.size()) / metric.r;
        input.d = metric.r;
        input.post_rope = keys.data();
        std::vector<int32_t> nearest(input.n);
        QuantizerAssigner(all, NEEDS_POST_ROPE)
                .assign(input, nullptr, 1, nearest.data(), nullptr);
        return nearest;
    }

    void assign(const HeadData& data, int64_t begin, int64_t end, int32_t* out)
            override {
        while (sink + static_cast<int64_t>(cells.size()) < end) {
            cluster(data,
                    std::min(
                            sink + static_cast<int64_t>(cells.size()) + segment,
                            tokens));
        }
        const std::vector<int32_t> of_keys(
                cells.begin() + (begin - sink), cells.begin() + (end - sink));
        std::copy(of_keys.begin(), of_keys.end(), out);
        encode(mapped(data, begin, end), of_keys);
    }

    /// Notes the next keys, where there are codes.
    virtual void encode(const std::vector<float>&, const std::vector<int32_t>&) {}

    void score(const Step& step, float* scores) const override {
        for (int h = 0; h < step.data.group; h++) {
            const auto q = metric.map(
                    metric.query, step.data.query_post(step.token, h));
            for (int c = 0; c < lists.ncell(); c++) {
                const float* m = means.data() + int64_t(c) * metric.r;
                *scores++ = std::inner_product(q.begin(), q.end(), m, 0.0f);
            }
        }
    }

    double scoring_bytes(const HeadData&) const override {
        return lists.ncell() * int8_bytes(metric.r) + metric.bytes();
    }
};

struct MetricCodes : MetricCells {
    static constexpr int kCandidates = 6; ///< for each key that may be read
    faiss::ProductQuantizer pq;
    std::vector<uint8_t> codes; ///< one a byte here, half of one on the bus

    MetricCodes(const Setup& s, bool share)
            : MetricCells(s, 64, share), pq(metric.r, metric.r / 4, 4) {
        pq.cp.seed = s.seed;
        pq.cp.min_points_per_centroid = 1;
        const auto left = residuals(mapped(s.data, sink, clustered), cells);
        pq.train(clustered - sink, left.data());
    }

    std::vector<float> residuals(
            std::vector<float> keys,
            const std::vector<int32_t>& of_keys) const {
        const int r = metric.r;
        for (size_t i = 0; i < keys.size(); i++) {
            keys[i] -= means[int64_t(of_keys[i / r]) * r + i % r];
        }
        return keys;
    }

    void encode(
            const std::vector<float>& keys,
            const std::vector<int32_t>& of_keys) override {
        const auto left = residuals(keys, of_keys);
        std::vector<uint8_t> packed(of_keys.size() * pq.code_size);
        pq.compute_codes(left.data(), packed.data(), of_keys.size());
        for (size_t i = 0; i < of_keys.size(); i++) {
            faiss::PQDecoderGeneric decoder(&packed[i * pq.code_size], 4);
            for (size_t m = 0; m < pq.M; m++) {
                codes.push_back(static_cast<uint8_t>(decoder.decode()));
            }
        }
    }

    Selection probe(const Step& step, int64_t limit) const override {
        const int group = step.data.group, ncell = lists.ncell();
        const int64_t first = step.far.begin;
        std::vector<float> scores(size_t(group) * ncell);
        score(step, scores.data());
        // Cells for all heads: all of them look at the same candidates.
        const auto counts = far_counts(step.far);
        std::vector<float> shared(ncell);
        share_scores(
                group,
                ncell,
                scores.data(),
                counts.data(),
                step.data.scale,
                shared.data());
        const auto candidates = slots_of(
                take_cells(
                        ncell,
                        shared.data(),
                        counts.data(),
                        ncell,
                        std::min(kCandidates * limit, step.far.size()),
                        /*at_least_one=*/false),
                counts);
        const auto n = static_cast<int64_t>(candidates.size());
        Selection selection;
        selection.index_bytes = scoring_bytes(step.data) +
                ncell * sizeof(int32_t) + n * static_cast<double>(pq.M) / 2 +
                kNumberBytes * static_cast<double>(pq.ksub * pq.d);
        if (n == 0) {
            selection.slots.resize(group);
            return selection;
        }
        std::vector<float> of_key(group * n), table(pq.M * pq.ksub);
        for (int h = 0; h < group; h++) {
            const auto q = metric.map(
                    metric.query, step.data.query_post(step.token, h));
            pq.compute_inner_prod_table(q.data(), table.data());
            for (int64_t i = 0; i < n; i++) {
                const int32_t j = candidates[i];
                float dot = scores[int64_t(h) * ncell + lists.cell_of(j)];
                const uint8_t* code = &codes[(j - first) * pq.M];
                for (size_t m = 0; m < pq.M; m++) {
                    dot += table[m * pq.ksub + code[m]];
                }
                of_key[h * n + i] = dot;
            }
        }
        // Candidates are numbered 0 .. n - 1 while the best are looked for.
        const FarRange numbers{0, n};
        const Step among{step.data, step.token, numbers, step.truth};
        selection.slots =
                best_keys_of_group(among, of_key, share_group, limit);
        for (auto& slots : selection.slots) {
            for (int32_t& j : slots) {
                j = candidates[j];
            }
        }
        return selection;
    }
};

} // namespace

MethodEntries query_metric_methods() {
    MethodEntry cells, codes;
    cells.name = "metric_cells";
    cells.make = [](const Setup& s, bool share) {
        return std::make_unique<MetricCells>(s, 16, share);
    };
    codes.name = "metric_codes";
    codes.make = [](const Setup& s, bool share) {
        return std::make_unique<MetricCodes>(s, share);
    };
    cells.ours = codes.ours = true;
    return {cells, codes};
}

} // namespace faiss_saap::benchs
