/// The files of ANN benchmarks: fvecs (for each vector an int32 d, then d
/// floats) and fbin (uint32 n, uint32 d, then n * d floats), little-endian.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace faiss_saap::benchs {

struct VectorFile {
    int d = 0;
    std::vector<float> x; ///< size rows() * d

    int64_t rows() const {
        return d > 0 ? static_cast<int64_t>(x.size()) / d : 0;
    }
};

/// The name's ending tells the type.
/// @throws faiss::FaissException for another ending, a file that cannot be read
///         or whose length does not agree with its header
VectorFile read_vectors(const std::string& path);

/// @throws faiss::FaissException for another ending, or when the file cannot be
///         written
void write_vectors(const std::string& path, const VectorFile& vectors);

} // namespace faiss_saap::benchs
