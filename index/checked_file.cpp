#include "checked_file.h"

#include <cinttypes>
#include <cstring>

#include "write_file.h"

namespace faiss_saap {

namespace {

/// Bytes around the body: fourcc and version; size and checksum.
constexpr size_t kHeader = 8, kTrailer = 16;

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

} // namespace

void write_checked(
        faiss::IOWriter& target,
        const FileKind& kind,
        const std::function<void(faiss::IOWriter&)>& body) {
    write_value(target, kind.fourcc);
    write_value(target, kind.version);
    ChecksumWriter writer(target);
    body(writer);
    write_value(target, writer.bytes);
    write_value(target, writer.checksum.value);
}

void write_checked_file(
        const std::string& path,
        const FileKind& kind,
        const std::function<void(faiss::IOWriter&)>& body) {
    write_file(path, [&](FileSink& sink) {
        SinkWriter writer(sink, path);
        write_checked(writer, kind, body);
    });
}

MemoryReader read_checked(
        const std::string& name,
        const uint8_t* data,
        size_t size,
        const FileKind& kind) {
    const char* file = name.c_str();
    FAISS_THROW_IF_NOT_FMT(
            size >= kHeader + kTrailer,
            "%s: %zd bytes are too few for %s",
            file,
            size,
            kind.what);
    FAISS_THROW_IF_NOT_FMT(
            value_at<uint32_t>(data) == kind.fourcc,
            "%s: this is not %s",
            file,
            kind.what);
    const auto version = value_at<uint32_t>(data + 4);
    FAISS_THROW_IF_NOT_FMT(
            version == kind.version,
            "%s: format version %u, this library reads version %u",
            file,
            version,
            kind.version);
    const size_t body = size - kHeader - kTrailer;
    const auto stated = value_at<uint64_t>(data + kHeader + body);
    FAISS_THROW_IF_NOT_FMT(
            stated == body,
            "%s: truncated or corrupt: there are %zd bytes of data, the end "
            "of the file says %" PRIu64,
            file,
            body,
            stated);
    FAISS_THROW_IF_NOT_FMT(
            checksum(data + kHeader, body) ==
                    value_at<uint64_t>(data + size - 8),
            "%s: corrupt: the checksum does not match",
            file);
    return MemoryReader(name, data + kHeader, body);
}

uint64_t checksum(const void* data, size_t bytes) {
    Checksum sum;
    sum.add(data, bytes);
    return sum.value;
}

} // namespace faiss_saap
