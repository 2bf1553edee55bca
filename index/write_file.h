/// Files that appear whole or not at all.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace faiss_saap {

/// Where `write_file`'s body puts its bytes.
class FileSink {
   public:
    virtual ~FileSink() = default;
    virtual void write(const void* data, size_t bytes) = 0;
};

/// Writes a file through a temporary one beside it, which is renamed when the
/// body has returned and all bytes are on disk, and removed when anything
/// throws. A link goes on leading to the file; what is no regular file (a pipe, a
/// device) is written to directly.
/// @throws faiss::FaissException naming the file, and whatever body throws
void write_file(
        const std::string& path,
        const std::function<void(FileSink&)>& body);

} // namespace faiss_saap
