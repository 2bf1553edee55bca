/// Reading and writing safetensors files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace faiss_saap {

class MappedFile;

/// One tensor of a file; `data` points into the mapped file.
struct TensorView {
    std::string dtype; ///< as in the file: "F16", "BF16", "F32", "I32", ...
    std::vector<int64_t> shape;
    const void* data = nullptr;
    size_t bytes = 0;

    int64_t elements() const; ///< product of the shape
    /// All elements as float; F16, BF16 and F32 only.
    /// @throws faiss::FaissException for other types
    std::vector<float> to_float() const;
};

/// A safetensors file mapped into memory, read-only. Every length in the
/// header is checked against the file before it is used: a truncated, corrupt
/// or oversized file gives an exception and nothing is allocated for it.
/// Immutable; copies share the mapping.
class SafetensorsFile {
   public:
    /// @throws faiss::FaissException naming the file and what is wrong
    explicit SafetensorsFile(const std::string& path);

    const std::string& path() const {
        return path_;
    }
    const std::map<std::string, TensorView>& tensors() const {
        return tensors_;
    }
    const std::map<std::string, std::string>& metadata() const {
        return metadata_;
    }
    bool has(const std::string& name) const {
        return tensors_.count(name) > 0;
    }
    /// @throws faiss::FaissException when there is none of this name
    const TensorView& tensor(const std::string& name) const;
    /// The value of a metadata key, or `otherwise` where it is absent.
    std::string meta(
            const std::string& key,
            const std::string& otherwise = "") const;

   private:
    std::string path_;
    std::shared_ptr<const MappedFile> file_;
    std::map<std::string, TensorView> tensors_;
    std::map<std::string, std::string> metadata_;
};

/// Writes a safetensors file: to a temporary file beside it, then renamed, so
/// that no half-written file is ever seen under this name.
/// @throws faiss::FaissException when a shape does not agree with its bytes or
///         the file cannot be written
void write_safetensors(
        const std::string& path,
        const std::map<std::string, TensorView>& tensors,
        const std::map<std::string, std::string>& metadata);

} // namespace faiss_saap
