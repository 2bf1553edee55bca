#include <faiss_saap/rope.h>

#include <fstream>

#include <nlohmann/json.hpp>

#include "common.h"

namespace faiss_saap {
namespace {

/// Values from tests/python/rope_reference.py, which shares no code with us.
TEST(Rope, AgreesWithIndependentReference) {
    std::ifstream file(
            std::string(FAISS_SAAP_SOURCE_DIR) +
            "/tests/data/rope_reference.json");
    const auto cases = nlohmann::json::parse(file);
    EXPECT_GE(cases.size(), 8u);
    for (const auto& c : cases) {
        SCOPED_TRACE(c["name"].get<std::string>());
        RopeParams params;
        params.d = c["d"];
        params.theta = c["theta"];
        params.layout = c["layout"] == "half" ? RopeLayout::half
                                              : RopeLayout::interleaved;
        params.set_scaling(c["scaling"]);
        const RotaryEmbedding rope(params);
        EXPECT_NEAR(rope.magnitude, c["magnitude"].get<double>(), 1e-7);
        const std::vector<double> frequency = c["inverse_frequency"];
        ASSERT_EQ(rope.inverse_frequency.size(), frequency.size());
        for (size_t i = 0; i < frequency.size(); i++) {
            EXPECT_NEAR(
                    rope.inverse_frequency[i], frequency[i], 2e-8 * frequency[i]);
        }
        const std::vector<int64_t> position = c["position"];
        const std::vector<float> expected = c["output"];
        const std::vector<float> input = c["input"];
        std::vector<float> x = input;
        const auto n = static_cast<int64_t>(position.size());
        rope.rotate(n, position.data(), x.data());
        for (size_t i = 0; i < x.size(); i++) {
            EXPECT_NEAR(x[i], expected[i], 5e-6) << "component " << i;
        }
        rope.derotate(n, position.data(), x.data());
        for (size_t i = 0; i < x.size(); i++) {
            EXPECT_NEAR(x[i], input[i], 2e-6) << "component " << i;
        }
    }
}

TEST(Rope, InnerProductDependsOnDistanceOnly) {
    tests::Random random;
    for (const char* scaling :
         {"", "linear:2", "ntk:4", "llama3:{\"factor\":8}",
          "yarn:{\"factor\":4}"}) {
        RopeParams params;
        params.d = 16;
        params.set_scaling(scaling);
        const RotaryEmbedding rope(params);
        const auto q = random.normal(16), k = random.normal(16);
        double first = 0;
        for (int64_t shift : {0, 1, 1000, 300000}) {
            auto a = q, b = k;
            const int64_t pa = 100 + shift, pb = 37 + shift;
            rope.rotate(1, &pa, a.data());
            rope.rotate(1, &pb, b.data());
            double dot = 0;
            for (int j = 0; j < 16; j++) {
                dot += double(a[j]) * b[j];
            }
            first = shift == 0 ? dot : first;
            EXPECT_NEAR(dot, first, 1e-5) << scaling;
        }
    }
}

TEST(Rope, ScalingTextRoundTrips) {
    for (const char* text :
         {"", "linear:2.5", "ntk:4",
          "llama3:{\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
          "\"original_max_position_embeddings\":8192}",
          "yarn:{\"factor\":4,\"beta_fast\":31,\"beta_slow\":2,"
          "\"attention_factor\":1.2,\"truncate\":false,"
          "\"original_max_position_embeddings\":32768}"}) {
        RopeParams a, b;
        a.d = b.d = 64;
        a.set_scaling(text);
        b.set_scaling(a.scaling_text());
        EXPECT_EQ(a, b) << text;
        EXPECT_EQ(a.scaling_text().empty(), std::string(text).empty());
    }
    RopeParams a, b;
    a.d = b.d = 64;
    a.set_scaling("ntk:4");
    b.set_scaling("ntk:2");
    EXPECT_NE(a, b);
}

TEST(Rope, WrongInput) {
    RopeParams p;
    p.d = 8;
    for (const char* text :
         {"ntk", "ntk:", "ntk:x", "ntk:2x", "ntk:-1", "ntk:nan", "cubic:2",
          "linear:0", "yarn:4", "yarn:[1]", "yarn:{\"factor\":\"4\"}",
          "llama3:{\"factor\":8", "llama3:{}",
          "llama3:{\"factor\":8,\"low_freq_factor\":5}",
          "yarn:{\"factor\":4,\"beta_fast\":0.5}"}) {
        const RopeParams before = p;
        EXPECT_SENTENCE(p.set_scaling(text), "rope");
        EXPECT_EQ(p, before) << text;
    }
    EXPECT_SENTENCE(
            p.set_scaling("llama3:{\"factor\":8,\"low_freq_facto\":2}"),
            "the key 'low_freq_facto' is not known");
    EXPECT_SENTENCE(
            p.set_scaling("yarn:{\"factor\":8,\"truncate\":0}"), "truncate is of type number");
    RopeParams tiny = p;
    tiny.scaling = RopeScaling::linear;
    tiny.factor = 1e-310;
    EXPECT_SENTENCE(RotaryEmbedding{tiny}, "frequency of inf");
    const std::string deep = std::string(200000, '[') + std::string(200000, ']');
    EXPECT_SENTENCE(p.set_scaling("yarn:{\"factor\":" + deep + "}"), "rope");
    EXPECT_SENTENCE(p.set_scaling("yarn:{\"factor\":[[1]]}"), "factor is of type array");
    p.d = 7;
    EXPECT_SENTENCE(RotaryEmbedding{p}, "d = 7");
    p.d = 0;
    EXPECT_SENTENCE(RotaryEmbedding{p}, "d = 0");
    p.d = 8;
    p.theta = 0;
    EXPECT_SENTENCE(RotaryEmbedding{p}, "theta = 0");
    EXPECT_SENTENCE(p.check(), "theta = 0");
}

} // namespace
} // namespace faiss_saap
