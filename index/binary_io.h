/// Plain data to and from bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <faiss/MetricType.h>
#include <faiss/impl/FaissAssert.h>
#include <faiss/impl/io.h>

namespace faiss_saap {

/// Reads from memory and knows how much is left, so that a length can be
/// checked before anything is allocated for it.
struct MemoryReader : faiss::IOReader {
    const uint8_t* at;
    size_t left;

    MemoryReader(const std::string& n, const uint8_t* data, size_t size)
            : at(data), left(size) {
        name = n;
    }
    size_t operator()(void* p, size_t size, size_t n) override {
        const size_t can = size ? std::min(n, left / size) : 0;
        if (can) {
            std::memcpy(p, at, can * size);
        }
        at += can * size;
        left -= can * size;
        return can;
    }
};

inline void write_bytes(
        faiss::IOWriter& writer,
        const void* data,
        size_t bytes) {
    const size_t written = bytes ? writer(data, 1, bytes) : 0;
    FAISS_THROW_IF_NOT_FMT(
            written == bytes,
            "%s: %zd of %zd bytes could be written",
            writer.name.c_str(),
            written,
            bytes);
}

template <class T>
void write_value(faiss::IOWriter& writer, const T& value) {
    static_assert(std::is_trivially_copyable<T>::value, "plain data only");
    write_bytes(writer, &value, sizeof(value));
}

/// A length and the values.
template <class T>
void write_array(faiss::IOWriter& writer, const T* data, size_t n) {
    write_value<uint64_t>(writer, n);
    write_bytes(writer, data, n * sizeof(T));
}

inline void read_bytes(MemoryReader& reader, void* data, size_t bytes) {
    FAISS_THROW_IF_NOT_FMT(
            bytes <= reader.left,
            "%s: corrupt: %zd bytes are wanted, %zd are left",
            reader.name.c_str(),
            bytes,
            reader.left);
    if (bytes) {
        reader(data, 1, bytes);
    }
}

template <class T>
T read_value(MemoryReader& reader) {
    static_assert(std::is_trivially_copyable<T>::value, "plain data only");
    T value;
    read_bytes(reader, &value, sizeof(value));
    return value;
}

template <class T>
std::vector<T> read_array(MemoryReader& reader) {
    const auto n = read_value<uint64_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            n <= reader.left / sizeof(T),
            "%s: corrupt: a length of %llu, %zd bytes are left",
            reader.name.c_str(),
            static_cast<unsigned long long>(n),
            reader.left);
    std::vector<T> data(n);
    read_bytes(reader, data.data(), n * sizeof(T));
    return data;
}

/// A metric, checked before it becomes an enumerator.
inline faiss::MetricType read_metric(MemoryReader& reader) {
    const auto metric = read_value<int32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            metric == faiss::METRIC_L2 ||
                    metric == faiss::METRIC_INNER_PRODUCT,
            "%s: corrupt: a metric of %d",
            reader.name.c_str(),
            metric);
    return static_cast<faiss::MetricType>(metric);
}

} // namespace faiss_saap
