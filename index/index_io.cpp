#include <faiss_saap/index_io.h>

#include <cinttypes>

#include "MappedFile.h"
#include "check.h"
#include "checked_file.h"
#include "lists_io.h"
#include "partition_io.h"

namespace faiss_saap {

namespace {

const FileKind kIndexFile = {
        faiss::fourcc("SaIx"),
        1,
        "an IndexAsymmetricIVF (stock Faiss indexes are read with "
        "faiss::read_index)"};

std::unique_ptr<IndexAsymmetricIVF> read(
        const std::string& name,
        const uint8_t* data,
        size_t size) {
    const char* file = name.c_str();
    MemoryReader reader = read_checked(name, data, size, kIndexFile);
    CellTraining training;
    training.kmeans.niter = read_value<int32_t>(reader);
    training.kmeans.spherical = read_value<uint8_t>(reader) != 0;
    training.kmeans.seed = read_value<int32_t>(reader);
    training.asymmetric = read_value<uint8_t>(reader) != 0;
    const bool cells_given = read_value<uint8_t>(reader) != 0;
    const auto nprobe = read_value<uint64_t>(reader);
    const auto max_codes = read_value<uint64_t>(reader);
    Partition partition = read_partition(reader);
    auto index = std::make_unique<IndexAsymmetricIVF>(
            read_lists(reader), std::move(partition));
    FAISS_THROW_IF_NOT_FMT(
            reader.left == 0,
            "%s: corrupt: %zd bytes are left over",
            file,
            reader.left);
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(nprobe) >= 1,
            "%s: corrupt: nprobe = %" PRIu64,
            file,
            nprobe);
    index->training = training;
    index->cells_given = cells_given;
    index->nprobe = nprobe;
    index->max_codes = max_codes;
    return index;
}

void check_writable(const IndexAsymmetricIVF& index) {
    FAISS_THROW_IF_NOT_MSG(
            index.is_trained, "an index that is not trained cannot be written");
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(index.nprobe) >= 1,
            "nprobe = %" PRId64 " must be at least 1",
            static_cast<int64_t>(index.nprobe));
    index.check_partition();
    check_file_form(*index.lists);
}

void write_body(const IndexAsymmetricIVF& index, faiss::IOWriter& writer) {
    const KMeansParams& kmeans = index.training.kmeans;
    write_value<int32_t>(writer, kmeans.niter);
    write_value<uint8_t>(writer, kmeans.spherical);
    write_value<int32_t>(writer, kmeans.seed);
    write_value<uint8_t>(writer, index.training.asymmetric);
    write_value<uint8_t>(writer, index.cells_given);
    write_value<uint64_t>(writer, index.nprobe);
    write_value<uint64_t>(writer, index.max_codes);
    write_partition(index.partition, writer);
    write_lists(*index.lists, writer);
}

} // namespace

void write_index(const IndexAsymmetricIVF& index, faiss::IOWriter& target) {
    check_writable(index);
    write_checked(target, kIndexFile, [&](faiss::IOWriter& writer) {
        write_body(index, writer);
    });
}

void write_index(const IndexAsymmetricIVF& index, const std::string& path) {
    check_writable(index);
    write_checked_file(path, kIndexFile, [&](faiss::IOWriter& writer) {
        write_body(index, writer);
    });
}

std::vector<uint8_t> write_index_to_memory(const IndexAsymmetricIVF& index) {
    faiss::VectorIOWriter writer;
    write_index(index, writer);
    return std::move(writer.data);
}

std::unique_ptr<IndexAsymmetricIVF> read_index(const std::string& path) {
    const MappedFile file(path);
    return read(path, file.data(), file.size());
}

std::unique_ptr<IndexAsymmetricIVF> read_index_from_memory(
        const uint8_t* data,
        size_t size) {
    FAISS_THROW_IF_NOT_MSG(data, "data is null");
    return read("index in memory", data, size);
}

std::unique_ptr<IndexAsymmetricIVF> read_index(faiss::IOReader& reader) {
    // To its end, in steps: nothing is allocated that was not there.
    std::vector<uint8_t> bytes;
    constexpr size_t kStep = 1 << 20;
    for (size_t got = kStep; got == kStep;) {
        const size_t size = bytes.size();
        bytes.resize(size + kStep);
        got = reader(bytes.data() + size, 1, kStep);
        bytes.resize(size + got);
    }
    return read(
            reader.name.empty() ? "index" : reader.name,
            bytes.data(),
            bytes.size());
}

} // namespace faiss_saap
