/// Rows to select from, for every implementation of it.
#pragma once

#include <algorithm>
#include <numeric>
#include <ostream>
#include <utility>

#include <faiss_saap/gpu/select_k.h>

#include "device_test.h"

namespace faiss_saap::tests {

struct SelectCase {
    int rows, len, k;
    bool largest;
};

inline std::ostream& operator<<(std::ostream& os, const SelectCase& c) {
    return os << c.rows << " rows of " << c.len << ", k " << c.k
              << (c.largest ? ", largest" : ", smallest");
}

inline std::vector<SelectCase> select_cases() {
    return {{1, 1, 1, true},        {8, 1024, 32, true},
            {256, 1024, 32, false}, {3, 100, 100, true},
            {2, 5000, 256, false},  {2, 5000, 257, true},
            {2, 70001, 2048, true}, {5, 65536, 10, false}};
}

/// Best first, of equal scores the lower id; NaN and the worst infinity never.
inline std::vector<std::pair<float, int>> select_on_host(
        const float* scores,
        int len,
        int k,
        bool largest) {
    std::vector<std::pair<float, int>> all;
    for (int i = 0; i < len; i++) {
        if (!std::isnan(scores[i]) && scores[i] != (largest ? -INFINITY : INFINITY)) {
            all.push_back({scores[i], i});
        }
    }
    std::stable_sort(all.begin(), all.end(), [&](const auto& a, const auto& b) {
        return largest ? a.first > b.first : a.first < b.first;
    });
    all.resize(std::min<size_t>(all.size(), k));
    all.resize(k, {largest ? -INFINITY : INFINITY, -1});
    return all;
}

} // namespace faiss_saap::tests
