#include "common/vector_files.h"

#include <filesystem>
#include <fstream>

#include "common.h"

using namespace faiss_saap::benchs;
using namespace faiss_saap::tests;

TEST(VectorFiles, AreReadAsWritten) {
    Random random;
    for (const char* type : {".fvecs", ".fbin"}) {
        const TemporaryFile name;
        const std::string path = name.path + type;
        VectorFile v{5, random.normal(35)};
        write_vectors(path, v);
        EXPECT_EQ(
                std::filesystem::file_size(path),
                std::string(type) == ".fvecs" ? 7 * 4 * 6 : 8 + 7 * 4 * 5);
        const VectorFile back = read_vectors(path);
        EXPECT_EQ(back.d, 5);
        EXPECT_EQ(back.x, v.x);
        for (int cut : {1, 20, 100}) {
            std::filesystem::resize_file(
                    path, std::filesystem::file_size(path) - cut);
            EXPECT_SENTENCE(read_vectors(path), path);
        }
        std::filesystem::remove(path);
    }
}

TEST(VectorFiles, WrongOnesAreRefused) {
    EXPECT_SENTENCE(read_vectors("x.npy"), ".fvecs or .fbin");
    EXPECT_SENTENCE(read_vectors("/nowhere/x.fvecs"), "cannot be read");
    EXPECT_SENTENCE(write_vectors("/nowhere/x.fbin", {1, {1}}), "cannot be created");
}
