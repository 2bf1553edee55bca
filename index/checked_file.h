/// Binary files with a kind, a version, a length and a checksum.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "binary_io.h"

namespace faiss_saap {

/// What a file is: `fourcc` and `version` stand at its beginning.
struct FileKind {
    uint32_t fourcc;
    uint32_t version;
    const char* what; ///< "an index", for sentences
};

/// Writes the header, what `body` writes, and the length and checksum of that.
void write_checked(
        faiss::IOWriter& target,
        const FileKind& kind,
        const std::function<void(faiss::IOWriter&)>& body);

/// The same into a file that appears whole or not at all.
void write_checked_file(
        const std::string& path,
        const FileKind& kind,
        const std::function<void(faiss::IOWriter&)>& body);

/// Checks all of it before a byte of the body is interpreted. The checksum
/// guards against damage; against malice every length is to be checked again.
/// @throws faiss::FaissException when it is another kind, another version,
///         truncated or damaged
MemoryReader read_checked(
        const std::string& name,
        const uint8_t* data,
        size_t size,
        const FileKind& kind);

/// 64-bit FNV-1a.
uint64_t checksum(const void* data, size_t bytes);

} // namespace faiss_saap
