/// Attention of some queries over pieces of the keys, each by a thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "vector_kernels.h"

namespace faiss_saap {

class PartialResults {
   public:
    PartialResults(int64_t pieces, int64_t queries, int d_v)
            : queries_(queries),
              d_v_(d_v),
              output_(new float[pieces * queries * d_v]),
              lse_(pieces * queries) {}

    /// Of a piece, size queries * d_v.
    float* output(int64_t piece) {
        return output_.get() + piece * queries_ * d_v_;
    }
    /// Likewise, size queries.
    float* lse(int64_t piece) {
        return lse_.data() + piece * queries_;
    }
    /// Merges what pieces begin .. end - 1 say of a query into another result of it.
    /// @param output  in and out; where `lse` is -infinity it does not matter what is there
    /// @return        LSE of all
    float merge(int64_t begin, int64_t end, int64_t query, float* output, float lse) const {
        const int64_t first = begin * queries_ + query;
        return merge_parts(
                end - begin,
                queries_,
                d_v_,
                output_.get() + first * d_v_,
                lse_.data() + first,
                output,
                lse);
    }

   private:
    int64_t queries_;
    int d_v_;
    std::unique_ptr<float[]> output_; ///< not a vector, which would fill it with zeros first
    std::vector<float> lse_;
};

} // namespace faiss_saap
