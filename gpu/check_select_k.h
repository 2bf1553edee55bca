/// What every selection asks of its arguments.
#pragma once

#include <climits>

#include <faiss/impl/FaissAssert.h>
#include <faiss_saap/gpu/select_k.h>

namespace faiss_saap::gpu {

inline void check_select_k(const SelectKParams& p) {
    FAISS_THROW_IF_NOT_FMT(
            p.rows >= 0 && p.rows <= INT_MAX,
            "rows = %lld must be between 0 and 2147483647",
            static_cast<long long>(p.rows));
    FAISS_THROW_IF_NOT_FMT(
            p.len >= 0 && p.len <= INT_MAX,
            "len = %lld must be between 0 and 2147483647",
            static_cast<long long>(p.len));
    FAISS_THROW_IF_NOT_FMT(
            p.k >= 1 && p.k <= kMaxSelectK,
            "k = %d must be between 1 and %d",
            p.k,
            kMaxSelectK);
    FAISS_THROW_IF_NOT_MSG(
            p.rows == 0 || p.len == 0 || p.scores, "scores is null");
    FAISS_THROW_IF_NOT_MSG(p.rows == 0 || p.ids, "ids is null");
}

} // namespace faiss_saap::gpu
