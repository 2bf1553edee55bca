/// Indexes from strings, in the manner of faiss::index_factory.
#pragma once

#include <memory>
#include <string>

#include <faiss/MetricType.h>

#include <faiss_saap/IndexAsymmetricIVF.h>

namespace faiss_saap {

/// Builds an untrained index from a description
///
///     [Sph|Sym]AIVF<ncell>,<storage>
///
/// `AIVF1024` has 1024 cells, keys assigned by L2 k-means and queries by the metric,
/// compared with the cells' means; with `Sph` k-means is spherical, with `Sym`
/// queries are assigned as keys are. Storage is `Flat`, `SQfp16`, `SQ8` or
/// `PQ<m>[x<bits>]` (8 bits by default and at most). Examples: "AIVF1024,Flat",
/// "SphAIVF256,PQ16x8".
///
/// @param d       1 or more
/// @param metric  METRIC_INNER_PRODUCT or METRIC_L2: what `search` returns
/// @throws faiss::FaissException naming the part it does not understand
std::unique_ptr<IndexAsymmetricIVF> index_factory(
        int d,
        const std::string& description,
        faiss::MetricType metric = faiss::METRIC_L2);

} // namespace faiss_saap
