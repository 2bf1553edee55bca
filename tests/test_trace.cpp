#include <faiss_saap/Trace.h>
#include <faiss_saap/dtype.h>

#include <cstring>
#include <fstream>

#include <sys/stat.h>

#include "common.h"

namespace faiss_saap {
namespace {

using Metadata = std::map<std::string, std::string>;
using Tensors = std::map<std::string, TensorView>;

constexpr int tokens = 20, d = 4;

const Metadata kMetadata = {
        {"model", "m"},
        {"text", "t"},
        {"layers", "3,5"},
        {"rope_theta", "10000"},
        {"rope_layout", "half"},
        {"rope_applied", "no"}};

/// A valid trace of two layers, 4 query heads and 2 KV heads.
struct Parts {
    std::vector<float> data = std::vector<float>(4 * tokens * d, 0.5f);
    Tensors tensors;
    Metadata metadata = kMetadata;

    Parts() {
        for (const char* layer : {"3", "5"}) {
            for (const char* what : {"q", "k", "v"}) {
                TensorView t;
                t.dtype = "F32";
                t.shape = {*what == 'q' ? 4 : 2, tokens, d};
                t.data = data.data();
                t.bytes = t.elements() * 4;
                tensors[std::string("layer.") + layer + "." + what] = t;
            }
        }
    }
    void write(const std::string& path) const {
        write_safetensors(path, tensors, metadata);
    }
    /// Opens the trace and reads all of it.
    void read() const {
        const tests::TemporaryFile file;
        write(file.path);
        const Trace trace(file.path);
        for (int layer : trace.layers) {
            for (int h = 0; h < trace.heads_q; h++) {
                trace.queries(layer, h);
            }
            for (int h = 0; h < trace.heads_kv; h++) {
                trace.keys(layer, h);
                trace.values(layer, h);
            }
        }
    }
};

TEST(DType, ConvertsNothingFromNowhere) {
    for (DType t : {DType::float32, DType::float16, DType::bfloat16}) {
        to_float(t, nullptr, 0, nullptr); // a sanitizer would object
        from_float(t, nullptr, 0, nullptr);
    }
}

TEST(Trace, ReadsWhatWasWritten) {
    tests::Random random;
    Parts parts;
    parts.data = random.normal(parts.data.size());
    for (auto& [name, t] : parts.tensors) {
        t.data = parts.data.data();
    }
    parts.metadata["rope_scaling"] = "ntk:4";
    const tests::TemporaryFile file;
    parts.write(file.path);
    const Trace trace(file.path);
    EXPECT_EQ(trace.tokens, tokens);
    EXPECT_EQ(trace.heads_q, 4);
    EXPECT_EQ(trace.heads_kv, 2);
    EXPECT_EQ(trace.group(), 2);
    EXPECT_EQ(trace.d, d);
    EXPECT_EQ(trace.layers, (std::vector<int>{3, 5}));
    EXPECT_EQ(trace.kv_heads, (std::vector<int>{0, 1}));
    EXPECT_EQ(trace.rope.scaling, RopeScaling::ntk);
    const auto q = trace.queries(5, 2);
    ASSERT_EQ(q.size(), size_t(tokens * d));
    EXPECT_EQ(
            std::memcmp(q.data(), parts.data.data() + 2 * tokens * d, q.size() * 4),
            0);
    EXPECT_SENTENCE(trace.queries(5, 4), "no head 4");
    EXPECT_SENTENCE(trace.keys(5, -1), "no head -1");
    EXPECT_SENTENCE(trace.keys(4, 0), "layer 4 is not among");
    EXPECT_SENTENCE(trace.kv_index(2), "KV head 2 is not in the trace");
}

TEST(Trace, HeadsKeepTheModelsNumbers) {
    Parts parts;
    parts.metadata["kv_heads"] = "1,7";
    const tests::TemporaryFile file;
    parts.write(file.path);
    const Trace trace(file.path);
    EXPECT_EQ(trace.kv_index(7), 1);
    EXPECT_SENTENCE(trace.kv_index(0), "KV head 0");
}

TEST(Trace, WrongMetadataOrShape) {
    Parts().read();
    const auto with = [](const std::string& key, const std::string& value) {
        Parts p;
        p.metadata[key] = value;
        p.read();
    };
    EXPECT_SENTENCE(with("layers", ""), "'layers'");
    EXPECT_SENTENCE(with("layers", "3,x"), "layers = '3,x'");
    EXPECT_SENTENCE(with("layers", "-3"), "layers = '-3'");
    EXPECT_SENTENCE(with("layers", "3,"), "layers = '3,'");
    EXPECT_SENTENCE(with("layers", "3,5,3"), "'3,5,3' names 3 twice");
    EXPECT_SENTENCE(with("layers", "3,4"), "no tensor 'layer.4.q'");
    EXPECT_SENTENCE(with("rope_layout", "spiral"), "spiral");
    EXPECT_SENTENCE(with("rope_theta", "big"), "rope_theta = 'big'");
    EXPECT_SENTENCE(with("rope_theta", "10000xyz"), "rope_theta = '10000xyz'");
    EXPECT_SENTENCE(with("text", "\xff\xfe"), "not valid UTF-8");
    EXPECT_SENTENCE(with("rope_scaling", "ntk"), "ntk");
    EXPECT_SENTENCE(with("rope_applied", "yes"), "pre-RoPE");
    EXPECT_SENTENCE(with("kv_heads", "0"), "names 1 heads");
    EXPECT_SENTENCE(with("kv_heads", "5,5"), "'5,5' names 5 twice");
    const auto shaped = [](const char* name, std::vector<int64_t> shape,
                           const char* dtype = "F32") {
        Parts p;
        TensorView& t = p.tensors[name];
        t.shape = std::move(shape);
        t.dtype = dtype;
        t.bytes = t.elements() * (std::string(dtype) == "I64" ? 8 : 4);
        p.read();
    };
    EXPECT_SENTENCE(shaped("layer.5.k", {2, tokens, d - 1}), "layer.5.k' is (2, 20, 3)");
    EXPECT_SENTENCE(shaped("layer.5.v", {1, tokens, d}), "layer.5.v");
    EXPECT_SENTENCE(shaped("layer.3.q", {3, tokens, d}), "layer.5.q");
    EXPECT_SENTENCE(shaped("layer.3.q", {tokens, d}), "2 dimensions");
    EXPECT_SENTENCE(shaped("layer.3.k", {2, 0, d}), "a dimension of 0");
    EXPECT_SENTENCE(shaped("layer.3.k", {1, tokens, d}, "I64"), "dtype I64");
}

TEST(Trace, OtherLayersOfTheFileAreNotRead) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{4, 2, d}, {4, tokens, d}, {}}) {
        Parts p;
        TensorView& t = p.tensors["layer.7.q"] = p.tensors["layer.5.q"];
        t.shape = shape;
        t.bytes = t.elements() * 4;
        const tests::TemporaryFile file;
        p.write(file.path);
        const Trace trace(file.path);
        EXPECT_EQ(trace.queries(5, 3).size(), size_t(tokens * d));
        EXPECT_SENTENCE(trace.queries(7, 3), "layer 7 is not among");
    }
}

TEST(Trace, NotFiniteValues) {
    Parts parts;
    parts.data[tokens * d + 9] = NAN; // in the second head
    const tests::TemporaryFile file;
    parts.write(file.path);
    const Trace trace(file.path);
    trace.keys(3, 0);
    EXPECT_SENTENCE(trace.keys(3, 1), "(vector 2, component 1)");
}

TEST(Trace, EmbeddedTrace) {
    const Trace trace(tests::embedded_trace());
    EXPECT_EQ(trace.tokens, 8192);
    EXPECT_EQ(trace.layers, (std::vector<int>{9, 21}));
    EXPECT_EQ(trace.kv_heads, (std::vector<int>{0}));
    EXPECT_EQ(trace.group(), 3);
    EXPECT_EQ(trace.d, 64);
    EXPECT_EQ(trace.keys(21, 0).size(), 8192u * 64);
}

class Safetensors : public ::testing::Test {
   protected:
    const tests::TemporaryFile file;
    void put(const std::string& bytes) {
        std::ofstream(file.path, std::ios::binary) << bytes;
    }
    /// A file with this header and `data` bytes behind it.
    void put(const std::string& header, size_t data) {
        std::string bytes(8, '\0');
        const uint64_t size = header.size();
        std::memcpy(bytes.data(), &size, 8);
        put(bytes + header + std::string(data, 'x'));
    }
    void read() {
        SafetensorsFile f(file.path);
    }
};

TEST_F(Safetensors, TruncatedAtEveryLength) {
    Parts().write(file.path);
    std::ifstream in(file.path, std::ios::binary);
    const std::string whole(std::istreambuf_iterator<char>(in), {});
    for (size_t size = 0; size < whole.size(); size += 13) {
        put(whole.substr(0, size));
        EXPECT_SENTENCE(read(), file.path);
    }
}

TEST_F(Safetensors, CorruptHeaders) {
    const std::string good =
            R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
    put(good, 8);
    read();
    put(std::string("\xff\xff\xff\xff\xff\xff\xff\x7f") + good);
    EXPECT_SENTENCE(read(), "header says");
    const auto corrupt = [&](const std::string& header, const char* part) {
        SCOPED_TRACE(header.substr(0, 100));
        put(header, 8);
        EXPECT_SENTENCE(read(), part);
    };
    corrupt("{", "not a JSON object");
    corrupt("[1]", "not a JSON object");
    corrupt("", "not a JSON object");
    corrupt(std::string(100000, '['), "not a JSON object");
    corrupt(R"({"a":1})", "not an object");
    corrupt(R"({"__metadata__":{"k":1}})", "metadata 'k'");
    corrupt(R"({"a":{"dtype":"F32","shape":[2]}})", "missing");
    corrupt(R"({"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}})", "wrong kind");
    corrupt(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "wrong kind");
    corrupt(R"({"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}})", "'Q4'");
    corrupt(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "needs 12");
    corrupt(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})", "outside");
    corrupt(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "outside");
    corrupt(
            R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,0]}})",
            "outside");
    corrupt(
            R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}})",
            "makes no sense");
    corrupt(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", "wrong kind");
}

TEST_F(Safetensors, APipeIsNoFile) {
    ASSERT_EQ(mkfifo(file.path.c_str(), 0600), 0);
    EXPECT_SENTENCE(read(), "not a regular file");
}

TEST_F(Safetensors, RandomDamageNeverCrashes) {
    tests::Random random;
    Parts().write(file.path);
    std::ifstream in(file.path, std::ios::binary);
    const std::string whole(std::istreambuf_iterator<char>(in), {});
    for (int round = 0; round < 300; round++) {
        std::string bytes = whole;
        for (int flips = 0; flips < 4; flips++) {
            bytes[random.below(600)] = char(random.below(256));
        }
        put(bytes);
        try {
            const Trace trace(file.path);
            for (int layer : trace.layers) {
                trace.keys(layer, 0);
            }
        } catch (const faiss::FaissException&) {
        }
    }
}

TEST_F(Safetensors, WriterChecksWhatItGets) {
    std::vector<float> x(4);
    Tensors tensors;
    TensorView& t = tensors["a"];
    t.dtype = "F32";
    t.shape = {5};
    t.data = x.data();
    t.bytes = 16;
    EXPECT_SENTENCE(write_safetensors(file.path, tensors, {}), "needs 20");
    EXPECT_FALSE(std::ifstream(file.path).good());
    t.shape = {4};
    EXPECT_SENTENCE(
            write_safetensors("/no/such/folder/f", tensors, {}),
            "cannot be created");
    write_safetensors(file.path, tensors, {});
    EXPECT_EQ(SafetensorsFile(file.path).tensor("a").to_float(), x);
    tensors["__metadata__"] = t;
    EXPECT_SENTENCE(write_safetensors(file.path, tensors, {}), "keeps this name");
    EXPECT_EQ(SafetensorsFile(file.path).tensor("a").to_float(), x);
}

TEST_F(Safetensors, AllFloatTypesAreRead) {
    const std::vector<float> x = {1.0f, -2.5f, 0.0f};
    for (const char* dtype : {"F32", "F16", "BF16"}) {
        std::vector<char> bytes(12);
        Tensors tensors;
        TensorView& t = tensors["a"];
        const DType type = std::string(dtype) == "F32" ? DType::float32
                : std::string(dtype) == "F16"          ? DType::float16
                                                       : DType::bfloat16;
        from_float(type, x.data(), 3, bytes.data());
        t.dtype = dtype;
        t.shape = {3};
        t.data = bytes.data();
        t.bytes = 3 * element_size(type);
        write_safetensors(file.path, tensors, {{"k", "v"}});
        const SafetensorsFile f(file.path);
        EXPECT_EQ(f.tensor("a").to_float(), x);
        EXPECT_EQ(f.meta("k"), "v");
        EXPECT_EQ(f.meta("absent", "otherwise"), "otherwise");
    }
}

} // namespace
} // namespace faiss_saap
