#include "TraceReplay.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::benchs {

namespace {

std::vector<double> mean_of(int d, const std::vector<float>& x) {
    std::vector<double> mean(d, 0.0);
    const auto n = static_cast<double>(x.size() / d);
    for (size_t i = 0; i < x.size(); i++) {
        mean[i % d] += x[i] / n;
    }
    return mean;
}

float squared_distance(int d, const float* a, const float* b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < d; i++) {
        sum += (a[i] - b[i]) * (a[i] - b[i]);
    }
    return sum;
}

} // namespace

ReplayPath::ReplayPath(
        const std::vector<int64_t>& lengths,
        int64_t tokens,
        double run,
        uint64_t seed)
        : rows(tokens) {
    std::vector<int64_t> begins = {0};
    for (int64_t n : lengths) {
        FAISS_THROW_IF_NOT_FMT(
                n > kSink,
                "a text of %lld tokens is too short to be replayed",
                static_cast<long long>(n));
        begins.push_back(begins.back() + n);
    }
    for (int64_t t = 0; t < std::min(kSink, tokens); t++) {
        rows[t] = {t, t};
    }
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<double> uniform(0, 1);
    std::uniform_int_distribution<int64_t> anywhere(0, begins.back() - 1);
    for (int walk = 0; walk < 2; walk++) {
        int64_t at = 0, end = 0; // where the text that is walked through ends
        for (int64_t t = kSink; t < tokens; t++) {
            at++;
            if (at >= end || uniform(random) * run < 1) {
                const int64_t place = anywhere(random);
                const auto next = std::upper_bound(
                        begins.begin(), begins.end(), place);
                at = std::max(place, next[-1] + kSink);
                end = *next;
            }
            rows[t][walk] = at;
        }
    }
}

std::vector<float> ReplayPath::replay(
        int d,
        const std::vector<float>& x,
        double share) const {
    const auto mean = mean_of(d, x);
    const auto a = static_cast<float>(std::sqrt(1 - share));
    const auto b = static_cast<float>(std::sqrt(share));
    std::vector<float> rest(d); // of the mean
    for (int c = 0; c < d; c++) {
        rest[c] = static_cast<float>((1 - a - b) * mean[c]);
    }
    const auto tokens = static_cast<int64_t>(rows.size());
    std::vector<float> y(tokens * d);
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float* xi = x.data() + rows[t][0] * d;
        const float* xj = x.data() + rows[t][1] * d;
        for (int c = 0; c < d; c++) {
            y[t * d + c] =
                    t < kSink ? xi[c] : rest[c] + a * xi[c] + b * xj[c];
        }
    }
    return y;
}

double novelty(
        int d,
        const std::vector<float>& x,
        const std::vector<int64_t>& lengths) {
    const auto mean = mean_of(d, x);
    double variance = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const double difference = x[i] - mean[i % d];
        variance += difference * difference / double(x.size() / d);
    }
    std::vector<int64_t> asked, known;
    int64_t begin = 0;
    for (int64_t n : lengths) {
        const int64_t half = n / 2;
        for (int64_t j = 0; j < half; j++) {
            known.push_back(begin + j);
        }
        for (int64_t j = half; j < n; j += std::max<int64_t>(1, half / 256)) {
            asked.push_back(begin + j);
        }
        begin += n;
    }
    double sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (size_t i = 0; i < asked.size(); i++) {
        float nearest = std::numeric_limits<float>::max();
        for (int64_t j : known) {
            nearest = std::min(
                    nearest,
                    squared_distance(
                            d, x.data() + asked[i] * d, x.data() + j * d));
        }
        sum += nearest;
    }
    const double random_pair = 2 * variance;
    return std::min(
            .5, sum / static_cast<double>(asked.size()) / std::max(random_pair, 1e-20));
}

} // namespace faiss_saap::benchs
