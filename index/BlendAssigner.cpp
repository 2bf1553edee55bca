#include <faiss_saap/BlendAssigner.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "check.h"
#include "vector_kernels.h"

namespace faiss_saap {

namespace {

using Weights = std::array<double, kBlendFeatures>;
constexpr const char* kNames[kBlendFeatures] = {
        "classifier", "mean", "newest", "age", "count"};

std::array<float, kBlendFeatures> in_order(const BlendWeights& w) {
    return {w.classifier, w.mean, w.newest, w.age, w.count};
}

/// Loss of the weights, with its gradient and its second derivatives.
double loss_of(
        const std::vector<BlendExample>& examples,
        float scale,
        const Weights& w,
        Weights& gradient,
        std::array<Weights, kBlendFeatures>& hessian) {
    gradient = {};
    hessian = {};
    double loss = 0;
    std::vector<double> logit;
    for (const BlendExample& e : examples) {
        const size_t n = e.mass.size();
        double total = 0;
        for (float m : e.mass) {
            total += m;
        }
        if (!(total > 0) || e.weight == 0) {
            continue;
        }
        logit.assign(n, 0.0);
        double most = -INFINITY, expected = 0;
        for (size_t c = 0; c < n; c++) {
            for (int f = 0; f < kBlendFeatures; f++) {
                logit[c] += scale * w[f] * e.features[f * n + c];
            }
            expected += e.mass[c] / total * logit[c];
            logit[c] += std::log(static_cast<double>(e.count[c]));
            most = std::max(most, logit[c]);
        }
        double sum = 0;
        for (double& z : logit) {
            z = std::exp(z - most);
            sum += z;
        }
        Weights first{};
        std::array<Weights, kBlendFeatures> second{};
        for (size_t c = 0; c < n; c++) {
            const double p = logit[c] / sum;
            for (int f = 0; f < kBlendFeatures; f++) {
                const double x = scale * e.features[f * n + c];
                first[f] += p * x;
                gradient[f] -= e.weight * e.mass[c] / total * x;
                for (int g = 0; g <= f; g++) {
                    second[f][g] += p * x * scale * e.features[g * n + c];
                }
            }
        }
        loss += e.weight * (most + std::log(sum) - expected);
        for (int f = 0; f < kBlendFeatures; f++) {
            gradient[f] += e.weight * first[f];
            for (int g = 0; g <= f; g++) {
                hessian[f][g] +=
                        e.weight * (second[f][g] - first[f] * first[g]);
            }
        }
    }
    return loss;
}

/// Solves a symmetric positive definite system, given its lower half, by
/// Cholesky's decomposition.
Weights solve(std::array<Weights, kBlendFeatures> a, Weights b) {
    for (int i = 0; i < kBlendFeatures; i++) {
        for (int j = 0; j <= i; j++) {
            double x = a[i][j];
            for (int k = 0; k < j; k++) {
                x -= a[i][k] * a[j][k];
            }
            a[i][j] = i == j ? std::sqrt(x) : x / a[j][j];
        }
    }
    for (int i = 0; i < kBlendFeatures; i++) {
        for (int k = 0; k < i; k++) {
            b[i] -= a[i][k] * b[k];
        }
        b[i] /= a[i][i];
    }
    for (int i = kBlendFeatures - 1; i >= 0; i--) {
        for (int k = i + 1; k < kBlendFeatures; k++) {
            b[i] -= a[k][i] * b[k];
        }
        b[i] /= a[i][i];
    }
    return b;
}

} // namespace

bool BlendWeights::operator==(const BlendWeights& other) const {
    return in_order(*this) == in_order(other);
}

BlendAssigner::BlendAssigner(
        std::shared_ptr<const QueryClassifier> c,
        std::vector<BlendWeights> w,
        float s)
        : CellAssigner(
                  not_null(c, "blend: the classifier").d,
                  not_null(c, "blend: the classifier").ncell,
                  not_null(c, "blend: the classifier").needs | NEEDS_POST_ROPE |
                          NEEDS_POSITION | NEEDS_STATS | NEEDS_NEWEST_KEYS),
          classifier(std::move(c)),
          weights(std::move(w)),
          scale(s) {
    group = classifier->group;
    FAISS_THROW_IF_NOT_FMT(
            weights.size() == static_cast<size_t>(classifier->shape.group),
            "blend: weights of %zd query heads, the classifier has %d",
            weights.size(),
            classifier->shape.group);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(scale) && scale > 0,
            "blend: scale = %f must be positive",
            scale);
    for (size_t h = 0; h < weights.size(); h++) {
        const auto values = in_order(weights[h]);
        for (int f = 0; f < kBlendFeatures; f++) {
            FAISS_THROW_IF_NOT_FMT(
                    std::isfinite(values[f]),
                    "blend: weight '%s' of query head %zd is %f: weights must "
                    "be finite",
                    kNames[f],
                    h,
                    values[f]);
        }
    }
}

/// Calls body(i, features) for each query of the input: features in
/// the order of BlendWeights, size ncell each. Queries go in blocks, so that
/// the statistics are read once for the heads of a token.
template <class Body>
void BlendAssigner::for_each_query(
        const RoutingInput& input,
        const CellStats* stats,
        const Body& body) const {
    check(input, stats);
    FAISS_THROW_IF_NOT_MSG(
            input.n == 0 || stats->mean_post_rope,
            "stats->mean_post_rope is null but the assigner needs it");
    if (input.n == 0) {
        return;
    }
    constexpr int64_t kBlock = 8;
    const int64_t most = std::min(kBlock, input.n) * ncell;
    std::vector<float> scratch(3 * (most + ncell));
    float *of_classifier = scratch.data(), *mean = of_classifier + most,
          *newest = mean + most, *age = newest + most, *count = age + ncell,
          *log_others = count + ncell;
    for (int c = 0; c < ncell; c++) {
        const auto n = static_cast<float>(stats->count[c]);
        count[c] = n > 0 ? std::log(n) : 0.0f;
        log_others[c] = n > 1 ? std::log(n - 1) : 0.0f;
    }
    for (int64_t first = 0; first < input.n; first += kBlock) {
        const int64_t m = std::min(kBlock, input.n - first);
        RoutingInput block = input;
        block.n = m;
        block.pre_rope += first * d;
        block.head += input.head ? first : 0;
        classifier->scores(block, nullptr, of_classifier);
        const float* q = input.post_rope + first * d;
        const int nq = static_cast<int>(m);
        inner_products(nq, d, q, ncell, stats->mean_post_rope, mean);
        inner_products(nq, d, q, ncell, stats->newest_post_rope, newest);
        for (int64_t i = 0; i < m; i++) {
            const int64_t position = input.position[first + i];
            const bool same = first + i > 0 &&
                    position == input.position[first + i - 1];
            for (int c = 0; c < ncell && !same; c++) {
                // A query inside a batch may be older than the newest key.
                age[c] = -std::log1p(static_cast<float>(
                        std::max<int64_t>(0, position - stats->newest[c])));
            }
            const float* mean_i = mean + i * ncell;
            float* newest_i = newest + i * ncell;
            for (int c = 0; c < ncell; c++) {
                const auto n = static_cast<float>(stats->count[c]);
                if (n <= 1) {
                    continue;
                }
                // Softmax of two, from the larger one.
                const float x = scale * newest_i[c];
                const float others = (n * mean_i[c] - newest_i[c]) / (n - 1);
                const float y = scale * others + log_others[c];
                newest_i[c] = (std::max(x, y) +
                               std::log1p(std::exp(-std::fabs(x - y))) -
                               count[c]) /
                        scale;
            }
            body(first + i,
                 std::array<const float*, kBlendFeatures>{
                         of_classifier + i * ncell,
                         mean_i,
                         newest_i,
                         age,
                         count});
        }
    }
}

void BlendAssigner::features(
        const RoutingInput& input,
        const CellStats* stats,
        float* out) const {
    for_each_query(input, stats, [&](int64_t i, const auto& features) {
        for (int f = 0; f < kBlendFeatures; f++) {
            float* to = out + (i * kBlendFeatures + f) * ncell;
            for (int c = 0; c < ncell; c++) {
                to[c] = stats->count[c] ? features[f][c] : 0.0f;
            }
        }
    });
}

void BlendAssigner::scores(
        const RoutingInput& input,
        const CellStats* stats,
        float* scores) const {
    const int group = classifier->shape.group;
    for_each_query(input, stats, [&](int64_t i, const auto& features) {
        const auto w = in_order(weights[group > 1 ? input.head[i] : 0]);
        float* s = scores + i * ncell;
        for (int c = 0; c < ncell; c++) {
            float sum = 0;
            for (int f = 0; f < kBlendFeatures; f++) {
                sum += w[f] * features[f][c];
            }
            s[c] = stats->count[c] ? sum : -INFINITY;
        }
    });
}

size_t BlendAssigner::bytes_read() const {
    return classifier->bytes_read() + weights.size() * sizeof(BlendWeights) +
            static_cast<size_t>(ncell) *
            (2 * d * sizeof(float) + sizeof(int32_t) + sizeof(int64_t));
}

BlendWeights fit_blend(const std::vector<BlendExample>& examples, float scale) {
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(scale) && scale > 0,
            "blend: scale = %f must be positive",
            scale);
    bool any = false;
    for (size_t i = 0; i < examples.size(); i++) {
        const BlendExample& e = examples[i];
        const size_t n = e.mass.size();
        FAISS_THROW_IF_NOT_FMT(
                e.count.size() == n && e.features.size() == kBlendFeatures * n,
                "blend: example %zd has %zd masses, %zd counts and %zd "
                "features",
                i,
                n,
                e.count.size(),
                e.features.size());
        bool good = std::isfinite(e.weight) && e.weight >= 0;
        double total = 0;
        for (size_t c = 0; c < n; c++) {
            good = good && e.count[c] >= 1 && std::isfinite(e.count[c]) &&
                    e.mass[c] >= 0 && std::isfinite(e.mass[c]);
            total += e.mass[c];
        }
        for (float x : e.features) {
            good = good && std::isfinite(x);
        }
        FAISS_THROW_IF_NOT_FMT(
                good,
                "blend: example %zd has a weight, mass, count or feature that "
                "is not finite, negative, or a cell without keys",
                i);
        any = any || (total > 0 && e.weight > 0);
    }
    if (!any) {
        return {};
    }
    constexpr int kMostSteps = 50;
    Weights w = {1, 0, 0, 0, 0}, gradient;
    std::array<Weights, kBlendFeatures> hessian;
    double loss = loss_of(examples, scale, w, gradient, hessian);
    for (int step = 0; step < kMostSteps; step++) {
        // A feature that never varies, or two alike, leave it singular.
        for (int f = 0; f < kBlendFeatures; f++) {
            hessian[f][f] += 1e-6 * hessian[f][f] + 1e-9;
        }
        const Weights direction = solve(hessian, gradient);
        double decrease = 0;
        for (int f = 0; f < kBlendFeatures; f++) {
            decrease += direction[f] * gradient[f];
        }
        if (!(decrease > 1e-10 * (1 + std::fabs(loss)))) {
            break;
        }
        double length = 1;
        for (; length > 1e-6; length /= 2) {
            Weights next = w, next_gradient;
            for (int f = 0; f < kBlendFeatures; f++) {
                next[f] -= length * direction[f];
            }
            std::array<Weights, kBlendFeatures> next_hessian;
            const double at = loss_of(
                    examples, scale, next, next_gradient, next_hessian);
            if (at <= loss - 1e-4 * length * decrease) {
                w = next;
                loss = at;
                gradient = next_gradient;
                hessian = next_hessian;
                break;
            }
        }
        if (length <= 1e-6) {
            break; // as near as doubles come
        }
    }
    BlendWeights result;
    result.classifier = static_cast<float>(w[0]);
    result.mean = static_cast<float>(w[1]);
    result.newest = static_cast<float>(w[2]);
    result.age = static_cast<float>(w[3]);
    result.count = static_cast<float>(w[4]);
    return result;
}

} // namespace faiss_saap
