/// The interface of everything that chooses far keys: build on keys, then
/// probe. docs/add-a-method.md shows how to add one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/GroundTruth.h"

namespace faiss_saap::benchs {

/// One decode step: the queries of a KV head's group at one token.
struct Step {
    const HeadData& data;
    int64_t token;
    FarRange far;
    /// of each query head; for oracles alone
    const std::vector<GroundTruth>& truth;
};

/// What a method answers to a step.
struct Selection {
    /// far keys to read, for each query head: ascending, each once
    std::vector<std::vector<int32_t>> slots;
    /// read in order to choose, all query heads together, by the rules of
    /// benchs/README.md
    double index_bytes = 0;

    /// Attention over the far keys where it is not the plain one over `slots`
    /// (sampling weights, estimates of what was not read): for each query head
    /// an output of size d and a log-sum-exp. Empty: the plain one.
    struct State {
        std::vector<float> output;
        float lse;
    };
    std::vector<State> attended;
};

/// A way to choose far keys. It sees the keys of one head in order and is asked
/// which of them the queries of a step should read.
struct Method {
    virtual ~Method() = default;

    /// Takes in the keys of slots up to end - 1 that it has not seen yet.
    virtual void build(const HeadData& data, int64_t end) = 0;

    /// Far keys for a step, at most `limit` for each query head. Thread-safe.
    virtual Selection probe(const Step& step, int64_t limit) const = 0;

    /// Mass of the far keys, for each query head, when the method's cells are
    /// taken by their true mass per key; NaN for methods without cells.
    virtual std::vector<double> ceiling(const Step& step, int64_t limit) const;

    /// Whether keys listed after a query's far keys would mislead it.
    virtual bool needs_newest_keys() const {
        return false;
    }
};

/// Bytes of one number of a key, a value or a representative: caches are of
/// two-byte types.
constexpr double kNumberBytes = 2;

/// The `limit` far keys with the best scores.
/// @param scores  of the keys far.begin .. far.end - 1
/// @return ascending
std::vector<int32_t> best_keys(
        const float* scores,
        FarRange far,
        int64_t limit);

/// best_keys for each query head, or one choice for all of them by the sum of
/// their masses per key.
/// @param scores  estimates of q.k, size group * far.size()
std::vector<std::vector<int32_t>> best_keys_of_group(
        const Step& step,
        const std::vector<float>& scores,
        bool share_group,
        int64_t limit);

} // namespace faiss_saap::benchs
