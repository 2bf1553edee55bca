/// Partitions to and from a stream of bytes.
#pragma once

#include <faiss/impl/io.h>

#include <faiss_saap/Partition.h>

namespace faiss_saap {

/// @throws faiss::FaissException for an assigner that has no file form
void write_partition(const Partition& partition, faiss::IOWriter& writer);
Partition read_partition(faiss::IOReader& reader);

/// Whether two partitions have the same cells: the same assigners, or equal
/// ones where they can be written.
bool same_cells(const Partition& a, const Partition& b);

void write_bytes(faiss::IOWriter& writer, const void* data, size_t bytes);
void read_bytes(faiss::IOReader& reader, void* data, size_t bytes);

template <class T>
void write_value(faiss::IOWriter& writer, const T& value) {
    static_assert(std::is_trivially_copyable<T>::value, "plain data only");
    write_bytes(writer, &value, sizeof(value));
}

template <class T>
T read_value(faiss::IOReader& reader) {
    static_assert(std::is_trivially_copyable<T>::value, "plain data only");
    T value;
    read_bytes(reader, &value, sizeof(value));
    return value;
}

} // namespace faiss_saap
