/// What the tests share: random data with printed seeds, errors with sentences.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <faiss/impl/FaissException.h>
#include <gtest/gtest.h>
#include <unistd.h>

namespace faiss_saap::tests {

/// A generator whose seed is printed when the test fails; FAISS_SAAP_SEED
/// repeats a run.
struct Random {
    unsigned seed;
    std::mt19937 engine;
    ::testing::ScopedTrace trace;

    Random()
            : seed(choose()),
              engine(seed),
              trace(__FILE__, __LINE__, "FAISS_SAAP_SEED=" + std::to_string(seed)) {}

    std::vector<float> normal(size_t n, float scale = 1) {
        std::normal_distribution<float> distribution(0, scale);
        std::vector<float> x(n);
        for (float& f : x) {
            f = distribution(engine);
        }
        return x;
    }
    int64_t below(int64_t n) {
        return std::uniform_int_distribution<int64_t>(0, n - 1)(engine);
    }

   private:
    static unsigned choose() {
        const char* given = std::getenv("FAISS_SAAP_SEED");
        return given ? static_cast<unsigned>(std::atoll(given))
                     : std::random_device()();
    }
};

/// Name of a file that does not exist yet; removed with its guard.
struct TemporaryFile {
    std::string path;
    TemporaryFile() {
        std::string name = ::testing::TempDir() + "faiss_saap_XXXXXX";
        const int fd = mkstemp(name.data());
        if (fd >= 0) {
            close(fd);
        }
        unlink(name.c_str());
        path = name;
    }
    ~TemporaryFile() {
        unlink(path.c_str());
    }
};

/// Makes the end of a file of this library, in memory, say what it holds.
inline void seal(std::vector<uint8_t>& file) {
    const uint64_t size = file.size() - 24; // without kind, version and this end
    std::memcpy(file.data() + file.size() - 16, &size, 8);
    uint64_t sum = 0xcbf29ce484222325;
    for (size_t i = 8; i < file.size() - 16; i++) {
        sum = (sum ^ file[i]) * 0x100000001b3;
    }
    std::memcpy(file.data() + file.size() - 8, &sum, 8);
}

/// The embedded trace.
inline std::string embedded_trace() {
    return std::string(FAISS_SAAP_SOURCE_DIR) + "/data/kjv_8k.safetensors";
}

} // namespace faiss_saap::tests

/// The statement throws a FaissException whose sentence contains `part`.
#define EXPECT_SENTENCE(statement, part)                                      \
    do {                                                                      \
        bool thrown = false;                                                  \
        try {                                                                 \
            statement;                                                        \
        } catch (const faiss::FaissException& e) {                            \
            thrown = true;                                                    \
            EXPECT_NE(std::string(e.what()).find(part), std::string::npos)    \
                    << "the sentence is: " << e.what();                       \
        }                                                                     \
        EXPECT_TRUE(thrown) << #statement " throws no FaissException";        \
    } while (false)
