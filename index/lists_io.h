/// Inverted lists with their codec, to and from bytes.
#pragma once

#include <memory>

#include <faiss/IndexIVF.h>

#include "binary_io.h"

namespace faiss_saap {

/// @param lists  accepted by adopt_storage
void write_lists(const faiss::IndexIVF& lists, faiss::IOWriter& writer);

/// Lists with an empty quantizer of their own.
std::unique_ptr<faiss::IndexIVF> read_lists(MemoryReader& reader);

} // namespace faiss_saap
