/// Inverted lists with their codec, to and from bytes.
#pragma once

#include <memory>

#include <faiss/IndexIVF.h>

#include "binary_io.h"

namespace faiss_saap {

/// @throws faiss::FaissException for what `write_lists` would leave out
void check_file_form(const faiss::IndexIVF& lists);

/// @param lists  accepted by adopt_storage and check_file_form
void write_lists(const faiss::IndexIVF& lists, faiss::IOWriter& writer);

/// Lists with an empty quantizer of their own.
std::unique_ptr<faiss::IndexIVF> read_lists(MemoryReader& reader);

} // namespace faiss_saap
