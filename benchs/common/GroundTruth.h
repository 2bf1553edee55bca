/// Dense attention of one query, in double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "HeadData.h"

namespace faiss_saap::benchs {

/// Far keys of the query at token i: sink <= j <= i - window.
struct FarRange {
    int64_t begin = 0, end = 0;
    int64_t size() const {
        return end - begin;
    }
};
FarRange far_range(int64_t token, int64_t sink, int64_t window);
/// Throws unless the first token that asks has far keys.
void check_far_keys(int64_t token, int64_t sink, int64_t window);

/// What attention does at one token for one query head.
struct GroundTruth {
    std::vector<double> mass;   ///< of each key j <= token; sums to 1
    std::vector<double> output; ///< size d
    double lse = 0;

    GroundTruth(const HeadData& data, int64_t token, int head);

    /// Mass of slots begin .. end - 1.
    double mass_of(int64_t begin, int64_t end) const;
    double mass_of(const std::vector<int32_t>& slots) const;
    /// |o - o*| / |o*|
    double error_of(const float* o) const;
};

} // namespace faiss_saap::benchs
