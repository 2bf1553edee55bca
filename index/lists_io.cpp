#include "lists_io.h"

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexScalarQuantizer.h>

#include <faiss_saap/faiss_compat.h>

#include "lists_codec.h"

namespace faiss_saap {

namespace {

enum Kind : uint32_t { kFlat = 1, kScalar = 2, kProduct = 3 };

void expect(bool plausible, const MemoryReader& reader, const char* what) {
    FAISS_THROW_IF_NOT_FMT(
            plausible, "%s: corrupt: %s", reader.name.c_str(), what);
}

} // namespace

void check_file_form(const faiss::IndexIVF& lists) {
    const auto* product = dynamic_cast<const faiss::IndexIVFPQ*>(&lists);
    FAISS_THROW_IF_NOT_FMT(
            !product || product->polysemous_ht == 0,
            "lists->polysemous_ht = %d has no file form",
            product->polysemous_ht);
}

void write_lists(const faiss::IndexIVF& lists, faiss::IOWriter& writer) {
    const auto* scalar =
            dynamic_cast<const faiss::IndexIVFScalarQuantizer*>(&lists);
    const auto* product = dynamic_cast<const faiss::IndexIVFPQ*>(&lists);
    write_value<uint32_t>(
            writer, product ? kProduct : scalar ? kScalar : kFlat);
    write_value<int32_t>(writer, lists.d);
    write_value<int32_t>(writer, lists.metric_type);
    write_value<uint64_t>(writer, lists.nlist);
    if (scalar) {
        write_value<int32_t>(writer, scalar->sq.qtype);
        const std::vector<float> trained(
                scalar->sq.trained.begin(), scalar->sq.trained.end());
        write_array(writer, trained.data(), trained.size());
    } else if (product) {
        write_value<uint32_t>(writer, static_cast<uint32_t>(product->pq.M));
        write_value<uint32_t>(writer, static_cast<uint32_t>(product->pq.nbits));
        write_array(
                writer,
                product->pq.centroids.data(),
                product->pq.centroids.size());
    }
    write_value<uint8_t>(writer, !lists.direct_map.no());
    for (size_t c = 0; c < lists.nlist; c++) {
        const size_t n = lists.invlists->list_size(c);
        const faiss::InvertedLists::ScopedIds ids(lists.invlists, c);
        const faiss::InvertedLists::ScopedCodes codes(lists.invlists, c);
        write_array(writer, n ? &ids.ids[0] : nullptr, n);
        write_bytes(writer, codes.codes, n * lists.code_size);
    }
}

std::unique_ptr<faiss::IndexIVF> read_lists(MemoryReader& reader) {
    const auto kind = read_value<uint32_t>(reader);
    const auto d = read_value<int32_t>(reader);
    const faiss::MetricType metric = read_metric(reader);
    const auto nlist = read_value<uint64_t>(reader);
    // Each list has a length of 8 bytes.
    expect(nlist >= 1 && nlist <= 65536 && nlist <= reader.left / 8,
           reader,
           "the number of lists");
    expect(d >= 1 && d <= kMostDimensions, reader, "the dimension");
    auto quantizer = std::make_unique<faiss::IndexFlat>(d, metric);
    std::unique_ptr<faiss::IndexIVF> lists;
    if (kind == kFlat) {
        lists = std::make_unique<faiss::IndexIVFFlat>(
                quantizer.get(), d, nlist, metric);
    } else if (kind == kScalar) {
        using Scalar = faiss::ScalarQuantizer;
        const auto number = read_value<int32_t>(reader);
        expect(number >= Scalar::QT_8bit && number <= Scalar::QT_6bit,
               reader,
               "the scalar quantizer's type");
        const auto type = static_cast<Scalar::QuantizerType>(number);
        const auto trained = read_array<float>(reader);
        auto scalar = std::make_unique<faiss::IndexIVFScalarQuantizer>(
                quantizer.get(), d, nlist, type, metric, false);
        // Per component, uniform, or nothing at all.
        const bool uniform = type == Scalar::QT_8bit_uniform ||
                type == Scalar::QT_4bit_uniform;
        const size_t size = type == Scalar::QT_fp16 ||
                        type == Scalar::QT_8bit_direct
                ? 0
                : uniform ? 2
                          : 2 * static_cast<size_t>(d);
        expect(trained.size() == size, reader, "the scalar quantizer's range");
        scalar->sq.trained.assign(trained.begin(), trained.end());
        lists = std::move(scalar);
    } else if (kind == kProduct) {
        const auto pieces = read_value<uint32_t>(reader);
        const auto bits = read_value<uint32_t>(reader);
        expect(pieces >= 1 && pieces <= uint32_t(d) && d % pieces == 0 &&
                       bits >= 1 && bits <= 16,
               reader,
               "the product quantizer's size");
        const auto centroids = read_array<float>(reader);
        expect(centroids.size() == (size_t(1) << bits) * d,
               reader,
               "the product quantizer's centroids");
        auto product = std::make_unique<faiss::IndexIVFPQ>(
                quantizer.get(), d, nlist, pieces, bits, metric);
        product->by_residual = false;
        product->pq.centroids.assign(centroids.begin(), centroids.end());
        lists = std::move(product);
    } else {
        expect(false, reader, "the kind of storage");
    }
    lists->quantizer = quantizer.release();
    lists->own_fields = true;
    lists->is_trained = true;

    const bool mapped = read_value<uint8_t>(reader) != 0;
    for (size_t c = 0; c < nlist; c++) {
        const auto ids = read_array<idx_t>(reader);
        expect(ids.size() <= reader.left / lists->code_size,
               reader,
               "the size of a list");
        for (auto id : ids) {
            expect(id >= 0, reader, "a negative id");
        }
        lists->invlists->add_entries(c, ids.size(), ids.data(), reader.at);
        reader.at += ids.size() * lists->code_size;
        reader.left -= ids.size() * lists->code_size;
        lists->ntotal += static_cast<idx_t>(ids.size());
    }
    if (mapped) {
        lists->set_direct_map_type(faiss::DirectMap::Hashtable);
    }
    return lists;
}

} // namespace faiss_saap
