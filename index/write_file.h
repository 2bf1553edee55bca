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
/// throws. Links stay links: the file they lead to is written. What is written in
/// place is not replaced, either.
/// @throws faiss::FaissException naming the file, and whatever body throws
void write_file(
        const std::string& path,
        const std::function<void(FileSink&)>& body);

/// A pipe, a device, or an open file by its number (/dev/stdout): what `write_file` adds to.
bool is_written_in_place(const std::string& path);

/// Behind the links that a path leads through, also where there is no file yet.
std::string behind_links(const std::string& path);

} // namespace faiss_saap
