#include <faiss_saap/index_io.h>

#include <cinttypes>
#include <cstring>

#include "MappedFile.h"
#include "check.h"
#include "lists_io.h"
#include "partition_io.h"
#include "write_file.h"

namespace faiss_saap {

namespace {

constexpr uint32_t kVersion = 1;
/// Bytes around the payload: fourcc and version; size and checksum.
constexpr size_t kHeader = 8, kTrailer = 16;

/// 64-bit FNV-1a, checked before a byte of the payload is interpreted. It
/// guards against damage; against malice every length is checked again.
struct Checksum {
    uint64_t value = 0xcbf29ce484222325;
    void add(const void* data, size_t bytes) {
        const auto* p = static_cast<const uint8_t*>(data);
        for (size_t i = 0; i < bytes; i++) {
            value = (value ^ p[i]) * 0x100000001b3;
        }
    }
};

/// Passes bytes on and sums them up.
struct ChecksumWriter : faiss::IOWriter {
    faiss::IOWriter& target;
    Checksum checksum;
    uint64_t bytes = 0;

    explicit ChecksumWriter(faiss::IOWriter& t) : target(t) {
        name = t.name;
    }
    size_t operator()(const void* p, size_t size, size_t n) override {
        const size_t written = target(p, size, n);
        checksum.add(p, size * written);
        bytes += size * written;
        return written;
    }
};

struct SinkWriter : faiss::IOWriter {
    FileSink& sink;
    SinkWriter(FileSink& s, const std::string& path) : sink(s) {
        name = path;
    }
    size_t operator()(const void* p, size_t size, size_t n) override {
        sink.write(p, size * n);
        return n;
    }
};

template <class T>
T value_at(const uint8_t* data) {
    T value;
    std::memcpy(&value, data, sizeof(value));
    return value;
}

std::unique_ptr<IndexAsymmetricIVF> read(
        const std::string& name,
        const uint8_t* data,
        size_t size) {
    const char* file = name.c_str();
    FAISS_THROW_IF_NOT_FMT(
            size >= kHeader + kTrailer,
            "%s: %zd bytes are too few for an index",
            file,
            size);
    FAISS_THROW_IF_NOT_FMT(
            value_at<uint32_t>(data) == faiss::fourcc("SaIx"),
            "%s: this is no IndexAsymmetricIVF (stock Faiss indexes are read "
            "with faiss::read_index)",
            file);
    const auto version = value_at<uint32_t>(data + 4);
    FAISS_THROW_IF_NOT_FMT(
            version == kVersion,
            "%s: format version %u, this library reads version %u",
            file,
            version,
            kVersion);
    const size_t payload = size - kHeader - kTrailer;
    const auto stated = value_at<uint64_t>(data + kHeader + payload);
    FAISS_THROW_IF_NOT_FMT(
            stated == payload,
            "%s: truncated or corrupt: there are %zd bytes of data, the end "
            "of the file says %" PRIu64,
            file,
            payload,
            stated);
    Checksum checksum;
    checksum.add(data + kHeader, payload);
    FAISS_THROW_IF_NOT_FMT(
            checksum.value == value_at<uint64_t>(data + size - 8),
            "%s: corrupt: the checksum does not match",
            file);

    MemoryReader reader(name, data + kHeader, payload);
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

} // namespace

void write_index(const IndexAsymmetricIVF& index, faiss::IOWriter& target) {
    FAISS_THROW_IF_NOT_MSG(
            index.is_trained, "an index that is not trained cannot be written");
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(index.nprobe) >= 1,
            "nprobe = %" PRId64 " must be at least 1",
            static_cast<int64_t>(index.nprobe));
    write_value(target, faiss::fourcc("SaIx"));
    write_value(target, kVersion);
    ChecksumWriter writer(target);
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
    write_value(target, writer.bytes);
    write_value(target, writer.checksum.value);
}

void write_index(const IndexAsymmetricIVF& index, const std::string& path) {
    write_file(path, [&](FileSink& sink) {
        SinkWriter writer(sink, path);
        write_index(index, writer);
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
