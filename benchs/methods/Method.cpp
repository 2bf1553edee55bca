#include "Method.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <faiss_saap/ProbePolicy.h>

namespace faiss_saap::benchs {

std::vector<double> Method::ceiling(const Step& step, int64_t) const {
    return std::vector<double>(step.truth.size(), NAN);
}

std::vector<int32_t> best_keys(
        const float* scores,
        FarRange far,
        int64_t limit) {
    std::vector<int32_t> slots(far.size());
    std::iota(slots.begin(), slots.end(), static_cast<int32_t>(far.begin));
    const int64_t k = std::min<int64_t>(limit, far.size());
    std::nth_element(
            slots.begin(),
            slots.begin() + k,
            slots.end(),
            [&](int32_t a, int32_t b) {
                return scores[a - far.begin] > scores[b - far.begin];
            });
    slots.resize(k);
    std::sort(slots.begin(), slots.end());
    return slots;
}

std::vector<std::vector<int32_t>> best_keys_of_group(
        const Step& step,
        const std::vector<float>& scores,
        bool share_group,
        int64_t limit) {
    const int64_t n = step.far.size();
    const int group = step.data.group;
    std::vector<std::vector<int32_t>> chosen;
    if (share_group) {
        const std::vector<int64_t> ones(n, 1);
        std::vector<float> shared(n);
        share_scores(
                group,
                static_cast<int>(n),
                scores.data(),
                ones.data(),
                step.data.scale,
                shared.data());
        chosen.assign(group, best_keys(shared.data(), step.far, limit));
    } else {
        for (int h = 0; h < group; h++) {
            chosen.push_back(
                    best_keys(scores.data() + h * n, step.far, limit));
        }
    }
    return chosen;
}

} // namespace faiss_saap::benchs
