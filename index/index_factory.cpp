#include <faiss_saap/index_factory.h>

#include <algorithm>
#include <cstring>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexScalarQuantizer.h>

#include "check.h"

namespace faiss_saap {

namespace {

/// Reads a description from left to right.
struct Description {
    const std::string& whole;
    size_t at = 0;

    bool take(const char* literal) {
        if (whole.compare(at, std::strlen(literal), literal) != 0) {
            return false;
        }
        at += std::strlen(literal);
        return true;
    }
    bool at_digit() const {
        return at < whole.size() && whole[at] >= '0' && whole[at] <= '9';
    }
    /// A number with at least one digit, from 1 to 65536.
    int take_number(const char* what) {
        const size_t begin = at;
        int64_t number = 0;
        while (at_digit()) {
            number = std::min<int64_t>(10 * number + (whole[at] - '0'), 65537);
            at++;
        }
        FAISS_THROW_IF_NOT_FMT(
                at > begin && number >= 1 && number <= 65536,
                "description '%s': %s '%s' must be between 1 and 65536",
                whole.c_str(),
                what,
                whole.substr(begin, at - begin).c_str());
        return static_cast<int>(number);
    }
    void expect(bool understood, const char* form) const {
        FAISS_THROW_IF_NOT_FMT(
                understood,
                "description '%s': '%s' must be %s",
                whole.c_str(),
                whole.substr(std::min(at, whole.size())).c_str(),
                form);
    }
};

std::unique_ptr<faiss::IndexIVF> make_lists(
        int d,
        int ncell,
        Description& description,
        faiss::MetricType metric) {
    // Never asked and never filled: the assigners know the cells.
    auto quantizer = std::make_unique<faiss::IndexFlat>(d, metric);
    std::unique_ptr<faiss::IndexIVF> lists;
    const auto scalar = [&](faiss::ScalarQuantizer::QuantizerType type) {
        return std::make_unique<faiss::IndexIVFScalarQuantizer>(
                quantizer.get(),
                d,
                ncell,
                type,
                metric,
                /*by_residual=*/false);
    };
    if (description.take("Flat")) {
        lists = std::make_unique<faiss::IndexIVFFlat>(
                quantizer.get(), d, ncell, metric);
    } else if (description.take("SQfp16")) {
        lists = scalar(faiss::ScalarQuantizer::QT_fp16);
    } else if (description.take("SQ8")) {
        lists = scalar(faiss::ScalarQuantizer::QT_8bit);
    } else {
        description.expect(
                description.take("PQ"), "Flat, SQfp16, SQ8 or PQ<m>[x<bits>]");
        const int pieces = description.take_number("PQ");
        const int bits =
                description.take("x") ? description.take_number("bits") : 8;
        FAISS_THROW_IF_NOT_FMT(
                d % pieces == 0,
                "description '%s': PQ%d does not divide d = %d",
                description.whole.c_str(),
                pieces,
                d);
        FAISS_THROW_IF_NOT_FMT(
                bits <= 8, // IndexIVFPQ's tables
                "description '%s': %d bits must be at most 8",
                description.whole.c_str(),
                bits);
        auto pq = std::make_unique<faiss::IndexIVFPQ>(
                quantizer.get(), d, ncell, pieces, bits, metric);
        pq->by_residual = false;
        lists = std::move(pq);
    }
    description.expect(
            description.at == description.whole.size(),
            "absent: nothing may follow the storage");
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
    Description rest{description};
    const bool spherical = rest.take("Sph");
    const bool symmetric = !spherical && rest.take("Sym");
    rest.expect(rest.take("AIVF"), "[Sph|Sym]AIVF<ncell>,<storage>");
    const int ncell = rest.take_number("cells");
    rest.expect(rest.take(","), "a comma and the storage");
    auto index = std::make_unique<IndexAsymmetricIVF>(
            make_lists(d, ncell, rest, metric));
    index->training.kmeans.spherical = spherical;
    index->training.asymmetric = !symmetric;
    return index;
}

} // namespace faiss_saap
