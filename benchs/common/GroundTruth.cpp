#include "GroundTruth.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::benchs {

FarRange far_range(int64_t token, int64_t sink, int64_t window) {
    FarRange far;
    far.begin = std::min(sink, token + 1);
    far.end = std::max(far.begin, token + 1 - window);
    return far;
}

void check_far_keys(int64_t token, int64_t sink, int64_t window) {
    FAISS_THROW_IF_NOT_FMT(
            far_range(token, sink, window).size() > 0,
            "sink = %" PRId64 " and window = %" PRId64
            " leave no far keys to token %" PRId64 ", the first that asks",
            sink,
            window,
            token);
}

GroundTruth::GroundTruth(const HeadData& data, int64_t token, int head)
        : mass(token + 1), output(data.d, 0.0) {
    const float* q = data.query_post(token, head);
    const int d = data.d;
    double maximum = -INFINITY;
    for (int64_t j = 0; j <= token; j++) {
        const float* k = data.keys_post.data() + j * d;
        double dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < d; i++) {
            dot += static_cast<double>(q[i]) * k[i];
        }
        mass[j] = data.scale * dot;
        maximum = std::max(maximum, mass[j]);
    }
    double sum = 0;
    for (double& m : mass) {
        m = std::exp(m - maximum);
        sum += m;
    }
    lse = maximum + std::log(sum);
    for (int64_t j = 0; j <= token; j++) {
        mass[j] /= sum;
        const float* v = data.values.data() + j * d;
        for (int i = 0; i < d; i++) {
            output[i] += mass[j] * v[i];
        }
    }
}

double GroundTruth::mass_of(int64_t begin, int64_t end) const {
    double sum = 0;
    for (int64_t j = begin; j < end; j++) {
        sum += mass[j];
    }
    return sum;
}

double GroundTruth::mass_of(const std::vector<int32_t>& slots) const {
    double sum = 0;
    for (int32_t j : slots) {
        sum += mass[j];
    }
    return sum;
}

double GroundTruth::error_of(const float* o) const {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < output.size(); i++) {
        difference += (o[i] - output[i]) * (o[i] - output[i]);
        norm += output[i] * output[i];
    }
    return std::sqrt(difference / norm);
}

} // namespace faiss_saap::benchs
