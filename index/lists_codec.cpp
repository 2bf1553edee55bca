#include "lists_codec.h"

#include <cinttypes>
#include <cmath>
#include <memory>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexScalarQuantizer.h>
#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/dtype.h>
#include <faiss_saap/exactly.h>
#include <faiss_saap/faiss_compat.h>

namespace faiss_saap {

namespace {

using faiss::IndexIVFFlat;
using faiss::IndexIVFPQ;
using faiss::IndexIVFScalarQuantizer;

} // namespace

void adopt_storage(faiss::IndexIVF& lists) {
    bool by_residual = false;
    if (const auto* sq = exactly<IndexIVFScalarQuantizer>(lists)) {
        by_residual = sq->by_residual;
    } else if (const auto* pq = exactly<IndexIVFPQ>(lists)) {
        by_residual = pq->by_residual;
    } else {
        FAISS_THROW_IF_NOT_FMT(
                exactly<IndexIVFFlat>(lists),
                "lists is a %s: storage must be faiss::IndexIVFFlat, "
                "IndexIVFScalarQuantizer or IndexIVFPQ",
                typeid(lists).name());
    }
    FAISS_THROW_IF_NOT_MSG(
            !by_residual,
            "lists->by_residual is true: residual codecs need distances to the "
            "cells' centroids, which a query assigner's scores are not");
    FAISS_THROW_IF_NOT_FMT(
            lists.metric_type == faiss::METRIC_L2 ||
                    lists.metric_type == faiss::METRIC_INNER_PRODUCT,
            "lists->metric_type = %d must be METRIC_L2 or "
            "METRIC_INNER_PRODUCT",
            static_cast<int>(lists.metric_type));
    FAISS_THROW_IF_NOT_FMT(
            lists.d <= kMostDimensions,
            "lists->d = %d must be at most %d",
            lists.d,
            kMostDimensions);
    for_each_id(lists, [](idx_t id, size_t cell, size_t) {
        FAISS_THROW_IF_NOT_FMT(
                id >= 0,
                "lists hold a vector with id %" PRId64
                " in cell %zd: ids must not be negative",
                id,
                cell);
    });
    // Never asked again, but written with the lists: it must live as long.
    auto empty =
            std::make_unique<faiss::IndexFlat>(lists.d, lists.metric_type);
    if (lists.own_fields) {
        delete lists.quantizer;
    }
    lists.quantizer = empty.release();
    lists.own_fields = true;
    if (lists.direct_map.type == faiss::DirectMap::Array) {
        lists.set_direct_map_type(faiss::DirectMap::Hashtable);
    }
}

size_t min_training_vectors(const faiss::IndexIVF& lists) {
    const auto* pq = exactly<IndexIVFPQ>(lists);
    return pq ? pq->pq.ksub : 1;
}

bool same_codec(const faiss::IndexIVF& a, const faiss::IndexIVF& b) {
    if (typeid(a) != typeid(b) || a.d != b.d || a.code_size != b.code_size ||
        a.metric_type != b.metric_type) {
        return false;
    }
    if (const auto* sq = exactly<IndexIVFScalarQuantizer>(a)) {
        const auto* other = exactly<IndexIVFScalarQuantizer>(b);
        return sq->sq.qtype == other->sq.qtype &&
                sq->sq.trained == other->sq.trained;
    }
    if (const auto* pq = exactly<IndexIVFPQ>(a)) {
        return pq->pq.centroids == exactly<IndexIVFPQ>(b)->pq.centroids;
    }
    return true;
}

bool codec_untrained(const faiss::IndexIVF& lists) {
    if (lists.is_trained) {
        return false;
    }
    if (const auto* sq = exactly<IndexIVFScalarQuantizer>(lists)) {
        const auto type = sq->sq.qtype;
        return type != faiss::ScalarQuantizer::QT_fp16 &&
                type != faiss::ScalarQuantizer::QT_8bit_direct;
    }
    return exactly<IndexIVFPQ>(lists) != nullptr;
}

void check_encodable(const faiss::IndexIVF& lists, int64_t n, const float* x) {
    const auto* sq = exactly<IndexIVFScalarQuantizer>(lists);
    if (!sq || sq->sq.qtype != faiss::ScalarQuantizer::QT_fp16) {
        return;
    }
    for (int64_t i = 0; i < n * lists.d; i++) {
        FAISS_THROW_IF_NOT_FMT(
                std::fabs(x[i]) <= kLargestFloat16,
                "x[%" PRId64 "] = %g is beyond the %g that float16 can store",
                i,
                double(x[i]),
                double(kLargestFloat16));
    }
}

} // namespace faiss_saap
