/// A KV cache of any length whose keys lie in cells.
#pragma once

#include <random>
#include <vector>

#include <faiss_saap/KvView.h>

namespace faiss_saap::benchs {

/// Memory that starts on a page, of 4 KiB or of 2 MiB.
class Buffer {
   public:
    Buffer(size_t bytes, bool huge_pages);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    char* data() const {
        return static_cast<char*>(data_);
    }
    size_t size() const {
        return bytes_;
    }

   private:
    void* data_;
    size_t bytes_;
};

struct CacheShape {
    int64_t tokens = 0;
    int heads = 8; ///< KV heads
    int d = 128;
    DType dtype = DType::bfloat16;
    int ncell = 1024;
    double skew = 0.5; ///< standard deviation of the logarithm of cell sizes
    bool huge_pages = false;
    bool values = true; ///< false: values are the keys
};

/// Shape (tokens, heads, d). Keys lie around the centres of cells of their
/// head, whose sizes are as skewed as those of real partitions; values are
/// noise.
struct SyntheticCache {
    Buffer k, v;
    KvView kv;
    std::vector<std::vector<float>> centres; ///< per head, size ncell * d

    SyntheticCache(const CacheShape& shape, std::mt19937& random);
};

} // namespace faiss_saap::benchs
