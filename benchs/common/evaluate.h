/// What methods read of the attention of one KV head, query by query.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "methods/Method.h"

namespace faiss_saap::benchs {

/// Sums over the queries for one method, budget and query head.
struct Sums {
    double read = 0;    ///< mass of the far keys read
    double far = 0;     ///< mass of all far keys
    double ceiling = 0; ///< mass that the method's cells would allow
    double error = 0, seconds = 0, selectivity = 0, head_selectivity = 0;
    double index_bytes = 0; ///< of the whole group
    int64_t queries = 0;

    void add(const Sums& o);
};

struct Evaluation {
    std::vector<double> budgets; ///< shares of the far keys per query head
    int queries = 512;
    int64_t sink = 16, window = 256;
    bool decoding = false; ///< keys are listed as their turn comes; false: all
                           ///< at once
};

struct Figures {
    std::vector<Sums> sums; ///< size methods * budgets * group
    /// for each query head and query: the least share of the far keys that
    /// holds 95 % of their mass
    std::vector<std::vector<double>> keys_for_95;
};

/// Tokens whose queries are asked: N/2 + t * max(1, N/1024) for 512 queries.
std::vector<int64_t> query_tokens(int64_t tokens, int queries);

Figures evaluate(
        const HeadData& data,
        const Evaluation& evaluation,
        const std::vector<std::unique_ptr<Method>>& methods);

} // namespace faiss_saap::benchs
