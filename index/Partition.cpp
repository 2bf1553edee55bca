#include <faiss_saap/Partition.h>

#include <cinttypes>
#include <cmath>
#include <vector>

#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>
#include <faiss/utils/distances.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/faiss_compat.h>

#include "check.h"

namespace faiss_saap {

int Partition::d() const {
    return key ? key->d : 0;
}

int Partition::ncell() const {
    return key ? key->ncell : 0;
}

void Partition::check() const {
    FAISS_THROW_IF_NOT_MSG(key, "partition has no key assigner");
    FAISS_THROW_IF_NOT_MSG(query, "partition has no query assigner");
    FAISS_THROW_IF_NOT_FMT(
            key->d == query->d,
            "partition.key->d = %d but partition.query->d = %d",
            key->d,
            query->d);
    FAISS_THROW_IF_NOT_FMT(
            key->ncell == query->ncell,
            "partition.key->ncell = %d but partition.query->ncell = %d",
            key->ncell,
            query->ncell);
    FAISS_THROW_IF_NOT_MSG(
            !(key->needs & (NEEDS_STATS | NEEDS_NEWEST_KEYS)),
            "partition.key needs cell statistics: a key's cell must not depend "
            "on the keys before it");
    FAISS_THROW_IF_NOT_MSG(
            !(key->needs & NEEDS_HEAD),
            "partition.key needs query heads, which keys do not have");
    if (rope.d != 0) {
        rope.check();
    }
}

void cell_means(
        int64_t n,
        int d,
        const float* x,
        const int32_t* cells,
        int ncell,
        float* means) {
    FAISS_THROW_IF_NOT_FMT(d > 0, "d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(ncell >= 0, "ncell = %d must not be negative", ncell);
    std::vector<double> sum(static_cast<size_t>(ncell) * d);
    std::vector<int64_t> count(ncell);
    for (int64_t i = 0; i < n; i++) {
        const int32_t c = cells[i];
        if (c < 0) {
            continue;
        }
        FAISS_THROW_IF_NOT_FMT(
                c < ncell,
                "cells[%" PRId64 "] = %d, there are %d cells",
                i,
                c,
                ncell);
        count[c]++;
        for (int j = 0; j < d; j++) {
            sum[static_cast<size_t>(c) * d + j] += x[i * d + j];
        }
    }
    for (int c = 0; c < ncell; c++) {
        for (int j = 0; count[c] && j < d; j++) {
            const size_t at = static_cast<size_t>(c) * d + j;
            means[at] = static_cast<float>(sum[at] / count[c]);
        }
    }
}

Partition kmeans_partition(
        int64_t n,
        int d,
        const float* x,
        int ncell,
        RoutingNeeds space,
        const KMeansParams& params,
        const RopeParams& rope,
        faiss::MetricType metric) {
    FAISS_THROW_IF_NOT_FMT(d > 0, "d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "ncell = %d must be between 1 and 65536",
            ncell);
    FAISS_THROW_IF_NOT_FMT(
            n >= ncell,
            "n = %" PRId64 " vectors are fewer than the ncell = %d cells they "
            "should make",
            n,
            ncell);
    FAISS_THROW_IF_NOT_MSG(x, "x is null");
    FAISS_THROW_IF_NOT_FMT(
            params.niter >= 1, "niter = %d must be at least 1", params.niter);
    check_finite(x, n, d, "x");

    faiss::ClusteringParameters cp;
    cp.niter = params.niter;
    cp.spherical = params.spherical;
    cp.seed = params.seed;
    cp.verbose = params.verbose;
    // Sequences are short and cells small: no sampling, no warnings.
    cp.min_points_per_centroid = 1;
    cp.max_points_per_centroid = static_cast<int>(n / ncell) + 1;
    faiss::Clustering clustering(d, ncell, cp);

    std::shared_ptr<faiss::IndexFlat> key;
    if (params.spherical) {
        key = std::make_shared<faiss::IndexFlatIP>(d);
    } else {
        key = std::make_shared<faiss::IndexFlatL2>(d);
    }
    clustering.train(n, x, *key);
    if (params.spherical) {
        // faiss::Clustering does not normalise what it merely copies (n ==
        // ncell).
        faiss::fvec_renorm_L2(d, ncell, clustering.centroids.data());
    }
    key->reset();
    key->add(ncell, clustering.centroids.data());

    Partition partition;
    partition.rope = rope;
    partition.key = std::make_shared<QuantizerAssigner>(key, space);

    std::vector<int32_t> cells(n);
    RoutingInput input;
    input.n = n;
    input.d = d;
    (space == NEEDS_PRE_ROPE ? input.pre_rope : input.post_rope) = x;
    partition.key->assign(input, nullptr, 1, cells.data(), nullptr);

    // An empty cell is represented by its centroid.
    std::vector<float> means = clustering.centroids;
    cell_means(n, d, x, cells.data(), ncell, means.data());
    auto query = std::make_shared<faiss::IndexFlat>(d, metric);
    query->add(ncell, means.data());
    partition.query = std::make_shared<QuantizerAssigner>(query, space);
    return partition;
}

Partition symmetric(const Partition& partition) {
    Partition result = partition;
    result.query = partition.key;
    return result;
}

} // namespace faiss_saap
