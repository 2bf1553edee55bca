/// A trace in which it is known where attention goes.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <faiss_saap/SafetensorsFile.h>
#include <faiss_saap/Trace.h>

#include "common.h"

namespace faiss_saap::tests {

/// Keys lie around kTopics centres. All components turn at the same rate, half
/// a turn over the distance between a query and its far keys: a query that
/// points away from a centre attends to the keys around it, and symmetric
/// assignment sends it to every other cell first.
struct PlantedTrace {
    static constexpr int kTopics = 16, d = 24, group = 2, layer = 4;
    static constexpr int64_t tokens = 3072, sink = 4, window = 2048;

    std::vector<float> q, k; ///< (group, tokens, d) and (tokens, d)
    std::vector<int> topic;  ///< of each key
    std::vector<int> wanted; ///< topic of each query, size group * tokens
    std::map<std::string, std::string> metadata = {
            {"layers", "4"},
            {"kv_heads", "6"},
            {"model", "planted"},
            {"text", "planted"},
            {"rope_theta", "1.001"},
            {"rope_scaling", "linear:815"},
            {"rope_layout", "half"},
            {"rope_applied", "no"}};

    /// @param centres  size kTopics * d, those of all texts of a model
    PlantedTrace(Random& random, const std::vector<float>& centres)
            : q(group * tokens * d), k(random.normal(tokens * d, .05f)) {
        for (int64_t i = 0; i < tokens; i++) {
            topic.push_back(static_cast<int>(random.below(kTopics)));
            for (int j = 0; j < d; j++) {
                k[i * d + j] += centres[topic.back() * d + j];
            }
        }
        for (int64_t i = 0; i < group * tokens; i++) {
            wanted.push_back(static_cast<int>(random.below(kTopics)));
            const auto noise = random.normal(d, .3f);
            for (int j = 0; j < d; j++) {
                q[i * d + j] =
                        -80 * centres[wanted.back() * d + j] + noise[j];
            }
        }
    }

    /// Orthogonal centres of length 1.
    static std::vector<float> centres() {
        std::vector<float> x(kTopics * d);
        for (int c = 0; c < kTopics; c++) {
            x[c * d + c] = 1;
        }
        return x;
    }

    Trace read() const {
        const TemporaryFile file;
        const auto view = [](const std::vector<float>& x, int64_t heads) {
            TensorView t;
            t.dtype = "F32";
            t.shape = {heads, static_cast<int64_t>(x.size()) / heads / d, d};
            t.data = x.data();
            t.bytes = x.size() * sizeof(float);
            return t;
        };
        write_safetensors(
                file.path,
                {{"layer.4.q", view(q, group)},
                 {"layer.4.k", view(k, 1)},
                 {"layer.4.v", view(k, 1)}},
                metadata);
        return Trace(file.path); // the mapping outlives the name
    }
};

/// n texts of one planted model.
inline std::vector<Trace> planted_texts(Random& random, int n) {
    std::vector<Trace> texts;
    for (int i = 0; i < n; i++) {
        PlantedTrace trace(random, PlantedTrace::centres());
        trace.metadata["text"] = "planted " + std::to_string(i);
        texts.push_back(trace.read());
    }
    return texts;
}

} // namespace faiss_saap::tests
