#include "vector_files.h"

#include <cstring>
#include <fstream>
#include <iterator>

#include <faiss/impl/FaissAssert.h>

#include <index/write_file.h>

namespace faiss_saap::benchs {

namespace {

bool is_fvecs(const std::string& path) {
    const auto ends = [&](const std::string& with) {
        return path.size() > with.size() &&
                path.compare(path.size() - with.size(), with.size(), with) == 0;
    };
    FAISS_THROW_IF_NOT_FMT(
            ends(".fvecs") || ends(".fbin"),
            "%s: the name must end in .fvecs or .fbin",
            path.c_str());
    return ends(".fvecs");
}

} // namespace

VectorFile read_vectors(const std::string& path) {
    const bool fvecs = is_fvecs(path);
    std::ifstream file(path, std::ios::binary);
    FAISS_THROW_IF_NOT_FMT(file.good(), "%s: cannot be read", path.c_str());
    const std::vector<char> bytes(
            (std::istreambuf_iterator<char>(file)),
            std::istreambuf_iterator<char>());
    const auto number = [&](size_t at) {
        int32_t x = 0;
        if (at + 4 <= bytes.size()) {
            std::memcpy(&x, bytes.data() + at, 4);
        }
        return static_cast<int64_t>(x);
    };
    VectorFile v;
    const int64_t size = static_cast<int64_t>(bytes.size());
    const int64_t d = number(fvecs ? 0 : 4);
    FAISS_THROW_IF_NOT_FMT(
            d > 0 && d <= 1 << 20,
            "%s: vectors of %lld components",
            path.c_str(),
            static_cast<long long>(d));
    const int64_t row = (d + fvecs) * 4, begin = fvecs ? 0 : 8;
    const int64_t n = fvecs ? size / row : number(0);
    FAISS_THROW_IF_NOT_FMT(
            n > 0 && (size - begin) % row == 0 && (size - begin) / row == n,
            "%s: its length of %lld bytes is not that of its vectors",
            path.c_str(),
            static_cast<long long>(size));
    v.d = static_cast<int>(d);
    v.x.resize(n * d);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = begin + i * row;
        FAISS_THROW_IF_NOT_FMT(
                !fvecs || number(at) == d,
                "%s: vector %lld has another number of components",
                path.c_str(),
                static_cast<long long>(i));
        std::memcpy(&v.x[i * d], bytes.data() + at + (fvecs ? 4 : 0), d * 4);
    }
    return v;
}

void write_vectors(const std::string& path, const VectorFile& vectors) {
    const bool fvecs = is_fvecs(path);
    const int32_t d = vectors.d;
    const auto n = static_cast<int32_t>(vectors.rows());
    write_file(path, [&](FileSink& file) {
        if (!fvecs) {
            file.write(&n, 4);
            file.write(&d, 4);
        }
        for (int32_t i = 0; i < n; i++) {
            if (fvecs) {
                file.write(&d, 4);
            }
            file.write(&vectors.x[int64_t(i) * d], size_t(d) * 4);
        }
    });
}

} // namespace faiss_saap::benchs
