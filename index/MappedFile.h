/// A file mapped into memory, read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace faiss_saap {

class MappedFile {
   public:
    /// @throws faiss::FaissException when it is no regular file or cannot be
    ///         opened
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const uint8_t* data() const {
        return data_;
    }
    size_t size() const {
        return size_;
    }

   private:
    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

} // namespace faiss_saap
