#include <faiss_saap/index_factory.h>

#include <regex>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexScalarQuantizer.h>

#include "check.h"

namespace faiss_saap {

namespace {

int whole_number(const std::string& text, const std::string& description) {
    try {
        return std::stoi(text);
    } catch (const std::exception&) {
        FAISS_THROW_FMT(
                "description '%s': the number %s is too large",
                description.c_str(),
                text.c_str());
    }
}

std::unique_ptr<faiss::IndexIVF> make_lists(
        int d,
        int ncell,
        const std::string& storage,
        const std::string& description,
        faiss::MetricType metric) {
    // Never asked and never filled: the assigners know the cells.
    auto quantizer = std::make_unique<faiss::IndexFlat>(d, metric);
    std::unique_ptr<faiss::IndexIVF> lists;
    std::smatch m;
    if (storage == "Flat") {
        lists = std::make_unique<faiss::IndexIVFFlat>(
                quantizer.get(), d, ncell, metric);
    } else if (storage == "SQfp16" || storage == "SQ8") {
        lists = std::make_unique<faiss::IndexIVFScalarQuantizer>(
                quantizer.get(),
                d,
                ncell,
                storage == "SQ8" ? faiss::ScalarQuantizer::QT_8bit
                                 : faiss::ScalarQuantizer::QT_fp16,
                metric,
                /*by_residual=*/false);
    } else if (
            std::regex_match(storage, m, std::regex("PQ(\\d+)(?:x(\\d+))?"))) {
        const int pieces = whole_number(m[1], description);
        const int bits = m[2].matched ? whole_number(m[2], description) : 8;
        FAISS_THROW_IF_NOT_FMT(
                pieces >= 1 && d % pieces == 0,
                "description '%s': PQ%d does not divide d = %d",
                description.c_str(),
                pieces,
                d);
        FAISS_THROW_IF_NOT_FMT(
                bits >= 1 && bits <= 16,
                "description '%s': %d bits must be between 1 and 16",
                description.c_str(),
                bits);
        auto pq = std::make_unique<faiss::IndexIVFPQ>(
                quantizer.get(), d, ncell, pieces, bits, metric);
        pq->by_residual = false;
        lists = std::move(pq);
    } else {
        FAISS_THROW_FMT(
                "description '%s': storage '%s' must be Flat, SQfp16, SQ8 or "
                "PQ<m>[x<bits>]",
                description.c_str(),
                storage.c_str());
    }
    lists->quantizer = quantizer.release();
    lists->own_fields = true;
    return lists;
}

} // namespace

std::unique_ptr<IndexAsymmetricIVF> index_factory(
        int d,
        const std::string& description,
        faiss::MetricType metric) {
    FAISS_THROW_IF_NOT_FMT(d >= 1, "d = %d must be at least 1", d);
    FAISS_THROW_IF_NOT_FMT(
            metric == faiss::METRIC_L2 ||
                    metric == faiss::METRIC_INNER_PRODUCT,
            "metric = %d must be METRIC_L2 or METRIC_INNER_PRODUCT",
            static_cast<int>(metric));
    // std::regex recurses once per character.
    FAISS_THROW_IF_NOT_FMT(
            description.size() <= 100,
            "description has %zd characters, more than 100",
            description.size());
    std::smatch m;
    FAISS_THROW_IF_NOT_FMT(
            std::regex_match(
                    description,
                    m,
                    std::regex("(Sph|Sym)?AIVF(\\d+),(.*)")),
            "description '%s' is not of the form "
            "[Sph|Sym]AIVF<ncell>,<storage>",
            description.c_str());
    const int ncell = whole_number(m[2], description);
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "description '%s': %d cells must be between 1 and 65536",
            description.c_str(),
            ncell);
    auto index = std::make_unique<IndexAsymmetricIVF>(
            make_lists(d, ncell, m[3], description, metric));
    index->training.kmeans.spherical = m[1] == "Sph";
    index->training.asymmetric = m[1] != "Sym";
    return index;
}

} // namespace faiss_saap
