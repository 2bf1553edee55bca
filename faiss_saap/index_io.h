/// Writing and reading an IndexAsymmetricIVF.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <faiss/impl/io.h>

#include <faiss_saap/IndexAsymmetricIVF.h>

namespace faiss_saap {

/// Writes assigners, codec and lists. The file begins with a fourcc and a
/// version number of its own and ends with its length and a checksum.
/// @throws faiss::FaissException for an untrained index or an assigner that
///         has no file form; a file is written beside and then renamed, so no
///         half-written file is left under `path`
void write_index(const IndexAsymmetricIVF& index, const std::string& path);
void write_index(const IndexAsymmetricIVF& index, faiss::IOWriter& writer);
std::vector<uint8_t> write_index_to_memory(const IndexAsymmetricIVF& index);

/// @throws faiss::FaissException for a truncated or corrupt file, one of
///         another kind or of a later version. Lengths are checked against the
///         size of the input before anything is allocated for them. Limit: a
///         quantizer that is not faiss::IndexFlat is read by stock Faiss, which
///         trusts the lengths in a file whose checksum is right
std::unique_ptr<IndexAsymmetricIVF> read_index(const std::string& path);
/// Reads to the end of the stream.
std::unique_ptr<IndexAsymmetricIVF> read_index(faiss::IOReader& reader);
std::unique_ptr<IndexAsymmetricIVF> read_index_from_memory(
        const uint8_t* data,
        size_t size);

} // namespace faiss_saap
