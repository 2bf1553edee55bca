/// Partitions to and from a stream of bytes.
#pragma once

#include <faiss_saap/Partition.h>

#include "binary_io.h"

namespace faiss_saap {

/// @throws faiss::FaissException for an assigner that has no file form
void write_partition(const Partition& partition, faiss::IOWriter& writer);
Partition read_partition(MemoryReader& reader);

/// Whether two partitions have the same cells: the same key assigner, or equal
/// ones where they can be written.
bool same_cells(const Partition& a, const Partition& b);

} // namespace faiss_saap
