#include <faiss_saap/PartitionSet.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include <faiss/IndexFlat.h>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/SafetensorsFile.h>
#include <faiss_saap/version.h>

#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 10, ncell = 7, group = 3;

TrainedPartition make_partition(
        tests::Random& random,
        const RopeParams& rope,
        int layer,
        int kv_head,
        DType dtype) {
    TrainedPartition p;
    p.layer = layer;
    p.kv_head = kv_head;
    auto flat = std::make_shared<faiss::IndexFlat>(
            d, kv_head ? faiss::METRIC_INNER_PRODUCT : faiss::METRIC_L2);
    flat->add(ncell, random.normal(ncell * d).data());
    p.partition.key = std::make_shared<QuantizerAssigner>(flat, NEEDS_PRE_ROPE);
    ClassifierShape s;
    s.d = d;
    s.group = group;
    s.ncell = ncell;
    s.width = 12;
    s.depth = 1;
    s.share_input = kv_head != 0;
    s.share_trunk = kv_head == 0;
    p.partition.query = std::make_shared<QueryClassifier>(
            s, random.normal(parameter_count(s)).data(), dtype);
    p.partition.rope = rope;
    p.balance.keys = 1000;
    p.balance.largest = 300;
    p.balance.empty = 1;
    p.balance.imbalance = 1.3;
    p.heads = {{.5, .6, .25}, {.1 + .2, .7, 1e-9}, {1. / 3, .8, .125}};
    p.steps = 1200;
    if (kv_head == 0) { // the other one has no blend
        p.scale = .3f;
        for (int g = 0; g < group; g++) {
            BlendWeights w;
            w.mean = .1f * float(g);
            w.age = -1.f / 3;
            p.blend.push_back(w);
        }
    }
    return p;
}

PartitionSet make_set(tests::Random& random) {
    PartitionSet set;
    set.model = "a model";
    set.rope.d = d;
    set.rope.theta = 500000;
    set.rope.layout = RopeLayout::interleaved;
    set.rope.set_scaling("ntk:4");
    set.sink = 16;
    set.window = 300;
    set.texts = {"one", "two, \"quoted\""};
    set.seed = 99;
    set.partitions = {
            make_partition(random, set.rope, 3, 0, DType::bfloat16),
            make_partition(random, set.rope, 3, 1, DType::float32)};
    return set;
}

std::string bytes_of(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
}

std::vector<float> scores_of(const CellAssigner& assigner) {
    std::vector<float> x(d * group), scores(group * ncell);
    std::vector<int32_t> head = {0, 1, 2};
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = std::sin(float(i));
    }
    RoutingInput input;
    input.n = group;
    input.d = d;
    input.pre_rope = x.data();
    input.head = head.data();
    assigner.scores(input, nullptr, scores.data());
    return scores;
}

TEST(PartitionSet, RoundTrips) {
    tests::Random random;
    const PartitionSet set = make_set(random);
    const tests::TemporaryFile file, again;
    write_partitions(set, file.path);
    const PartitionSet read = read_partitions(file.path);
    write_partitions(read, again.path);
    EXPECT_TRUE(bytes_of(file.path) == bytes_of(again.path));
    EXPECT_EQ(read.model, set.model);
    EXPECT_EQ(read.rope, set.rope);
    EXPECT_EQ(read.sink, 16);
    EXPECT_EQ(read.window, 300);
    EXPECT_EQ(read.texts, set.texts);
    EXPECT_EQ(read.seed, 99);
    EXPECT_EQ(read.version, FAISS_SAAP_VERSION);
    ASSERT_EQ(read.partitions.size(), 2u);
    for (int h : {0, 1}) {
        const TrainedPartition& a = set.find(3, h);
        const TrainedPartition& b = read.find(3, h);
        EXPECT_EQ(b.steps, a.steps);
        EXPECT_EQ(b.scale, a.scale);
        EXPECT_TRUE(b.blend == a.blend);
        EXPECT_EQ(b.balance.keys, a.balance.keys);
        EXPECT_EQ(b.balance.largest, a.balance.largest);
        EXPECT_EQ(b.balance.empty, a.balance.empty);
        EXPECT_EQ(b.balance.imbalance, a.balance.imbalance);
        for (int g = 0; g < group; g++) {
            EXPECT_EQ(b.heads[g].recall, a.heads[g].recall);
            EXPECT_EQ(b.heads[g].ceiling, a.heads[g].ceiling);
            EXPECT_EQ(b.heads[g].far_mass, a.heads[g].far_mass);
        }
        EXPECT_EQ(b.partition.rope, set.rope);
        EXPECT_EQ(
                scores_of(*b.partition.query), scores_of(*a.partition.query));
        EXPECT_EQ(scores_of(*b.partition.key), scores_of(*a.partition.key));
    }
    const auto blended = read.find(3, 0).blended();
    EXPECT_TRUE(blended.query->needs & NEEDS_NEWEST_KEYS);
    EXPECT_SENTENCE(read.find(3, 1).blended(), "no weights of a blend");
    EXPECT_SENTENCE(read.find(4, 0), "layer 4, KV head 0");
    EXPECT_SENTENCE(read.find(3, 2), "layer 3, KV head 2");
}

TEST(PartitionSet, RefusesAnotherRope) {
    tests::Random random;
    const PartitionSet set = make_set(random);
    set.check_rope(set.rope);
    RopeParams other = set.rope;
    other.d = 64;
    EXPECT_SENTENCE(set.check_rope(other), "head dimension 10, not 64");
    other = set.rope;
    other.theta = 10000;
    EXPECT_SENTENCE(set.check_rope(other), "theta 500000");
    other = set.rope;
    other.set_scaling("");
    EXPECT_SENTENCE(set.check_rope(other), "scaling 'ntk:4'");
    other = set.rope;
    other.layout = RopeLayout::half;
    EXPECT_SENTENCE(set.check_rope(other), "layout interleaved");
}

TEST(PartitionSet, RefusesWhatCannotBeWritten) {
    tests::Random random;
    const PartitionSet good = make_set(random);
    const tests::TemporaryFile file;
    PartitionSet set = good;
    set.partitions.push_back(set.partitions[0]);
    EXPECT_SENTENCE(write_partitions(set, file.path), "two partitions");
    set = good;
    set.partitions[1].partition.query = set.partitions[1].partition.key;
    EXPECT_SENTENCE(write_partitions(set, file.path), "no QueryClassifier");
    set = good;
    set.partitions[1].partition.key =
            std::make_shared<CellMeanAssigner>(d, ncell);
    EXPECT_THROW(write_partitions(set, file.path), faiss::FaissException);
    set = good;
    set.partitions[0].blend[1].age = NAN;
    EXPECT_SENTENCE(write_partitions(set, file.path), "weight 'age'");
    set = good;
    set.partitions[0].blend.pop_back();
    EXPECT_SENTENCE(write_partitions(set, file.path), "2 query heads");
    set = good;
    set.partitions[1].partition.rope.theta = 3;
    EXPECT_SENTENCE(write_partitions(set, file.path), "other RoPE parameters");
    set = good;
    const auto with_rope = [&](const RopeParams& rope) {
        set = good;
        set.rope = rope;
        for (auto& p : set.partitions) {
            p.partition.rope = rope;
        }
        write_partitions(set, file.path);
    };
    RopeParams rope = good.rope;
    rope.theta = .5;
    EXPECT_SENTENCE(with_rope(rope), "theta = 0.5");
    rope = good.rope;
    rope.d += 2;
    EXPECT_SENTENCE(with_rope(rope), "the RoPE parameters are for d = ");
    EXPECT_SENTENCE(with_rope({}), "the RoPE parameters are for d = 0");
    set = good;
    set.partitions[0].kv_head = -1;
    EXPECT_SENTENCE(write_partitions(set, file.path), "KV head -1");
    set = good;
    set.partitions[1].heads.pop_back();
    EXPECT_SENTENCE(write_partitions(set, file.path), "2 query heads, its classifier has 3");
    set = good;
    set.partitions[1].heads[2].recall = NAN;
    EXPECT_SENTENCE(write_partitions(set, file.path), "layer.3.kv.1/held_out/2/0 is nan");
    set = good;
    set.texts[1] = "\xff\xfe";
    EXPECT_SENTENCE(write_partitions(set, file.path), "not valid UTF-8");
    set = good;
    set.plan_texts = {"\xff"};
    EXPECT_SENTENCE(write_partitions(set, file.path), "plan_texts");
    EXPECT_TRUE(bytes_of(file.path).empty()); // nothing half-written
    EXPECT_SENTENCE(
            write_partitions(good, "/no/such/folder/p.saap"),
            "/no/such/folder/p.saap");
}

TEST(PartitionSet, TruncatedFiles) {
    tests::Random random;
    const tests::TemporaryFile file;
    write_partitions(make_set(random), file.path);
    const std::string whole = bytes_of(file.path);
    for (size_t cut = 0; cut < whole.size(); cut += 131) {
        std::ofstream(file.path, std::ios::binary)
                << whole.substr(0, cut);
        EXPECT_THROW(read_partitions(file.path), faiss::FaissException) << cut;
    }
}

/// The file, taken apart and put together with a change.
template <class Change>
void read_changed(const std::string& path, const Change& change) {
    const SafetensorsFile file(path);
    auto tensors = file.tensors();
    auto metadata = file.metadata();
    std::vector<float> numbers(10000, 0.5f); // bytes for changed tensors
    change(tensors, metadata, numbers);
    const tests::TemporaryFile changed;
    write_safetensors(changed.path, tensors, metadata);
    read_partitions(changed.path);
}

TEST(PartitionSet, WrongFiles) {
    tests::Random random;
    const tests::TemporaryFile file;
    write_partitions(make_set(random), file.path);
    read_changed(file.path, [](auto&, auto&, auto&) {});

    const auto with = [&](const std::string& key, const std::string& value) {
        read_changed(file.path, [&](auto&, auto& metadata, auto&) {
            metadata[key] = value;
        });
    };
    const auto replaced = [&](const std::string& key,
                              const std::string& from,
                              const std::string& to) {
        read_changed(file.path, [&](auto&, auto& metadata, auto&) {
            const size_t at = metadata[key].find(from);
            ASSERT_NE(at, std::string::npos) << metadata[key];
            metadata[key].replace(at, from.size(), to);
        });
    };
    EXPECT_SENTENCE(with("format", "something"), "no file of partitions");
    EXPECT_SENTENCE(with("format_version", "6"), "version '6'");
    EXPECT_SENTENCE(with("rope", "{"), "'rope' is no JSON");
    EXPECT_SENTENCE(with("rope", "{}"), "'d' is missing");
    EXPECT_SENTENCE(replaced("rope", "interleaved", "spiral"), "spiral");
    EXPECT_SENTENCE(replaced("rope", "ntk:4", "ntk"), "rope_scaling: 'ntk'");
    EXPECT_SENTENCE(replaced("rope", "ntk:4", "ntk"), ": rope: "); // of the file
    EXPECT_SENTENCE(replaced("rope", "\"d\":10", "\"d\":12"), "d = 12");
    EXPECT_SENTENCE(with("heads", "[[3,0],[3,0]]"), "once");
    EXPECT_SENTENCE(with("heads", "[[3]]"), "once");
    EXPECT_SENTENCE(with("heads", "[[4,0]]"), "no 'layer.4.kv.0'");
    EXPECT_SENTENCE(with("heads", "7"), "no lists");
    EXPECT_SENTENCE(with("training", "[]"), "'sink'");
    const std::string head = "layer.3.kv.0";
    EXPECT_SENTENCE(with(head, "{}"), "'d' is missing");
    EXPECT_SENTENCE(replaced(head, "\"width\":12", "\"width\":16"), "in.weight");
    EXPECT_SENTENCE(replaced(head, "\"width\":12", "\"width\":0"), "width = 0");
    EXPECT_SENTENCE(
            replaced(head, "\"width\":12", "\"width\":\"12\""), "'width'");
    EXPECT_SENTENCE(replaced(head, "\"ncell\":7", "\"ncell\":8"), "expected");
    EXPECT_SENTENCE(
            replaced(head, "\"ncell\":7", "\"ncell\":70000"), "ncell = 70000");
    EXPECT_SENTENCE(
            replaced(head, "\"share_trunk\":true", "\"share_trunk\":false"),
            "expected");
    EXPECT_SENTENCE(
            replaced(head, "\"share_input\":false", "\"share_input\":true"),
            "expected");
    EXPECT_SENTENCE(
            replaced(head, "\"share_input\":false", "\"share_input\":0"), "'share_input'");
    EXPECT_SENTENCE(replaced(head, "\"depth\":1", "\"depth\":2"), "block1");
    EXPECT_SENTENCE(replaced(head, "\"group\":3", "\"group\":2"), "held_out");
    EXPECT_SENTENCE(
            replaced(head, "\"held_out\":[[0.5,0.6,", "\"held_out\":[["),
            "held_out");

    const auto tensor = [&](const std::string& name, auto change) {
        read_changed(file.path, [&](auto& tensors, auto&, auto& numbers) {
            change(tensors[name], numbers);
        });
    };
    EXPECT_SENTENCE(
            read_changed(
                    file.path,
                    [](auto& tensors, auto&, auto&) {
                        tensors.erase("layer.3.kv.1.out.bias");
                    }),
            "no tensor 'layer.3.kv.1.out.bias'");
    EXPECT_SENTENCE(
            tensor(head + ".blend",
                   [](TensorView& t, auto& numbers) {
                       numbers[7] = NAN;
                       t.data = numbers.data();
                   }),
            "weight 'newest' of query head 1");
    EXPECT_SENTENCE(
            tensor(head + ".blend",
                   [](TensorView& t, auto&) { std::swap(t.shape[0], t.shape[1]); }),
            "expected F32 (3, 5)");
    EXPECT_SENTENCE(
            read_changed(
                    file.path,
                    [](auto& tensors, auto&, auto&) {
                        tensors.erase("layer.3.kv.0.blend");
                    }),
            "no tensor 'layer.3.kv.0.blend'");
    EXPECT_SENTENCE(
            replaced(head, "\"scale\":0.3", "\"scale\":-0.3"), "scale = -0.3");
    EXPECT_SENTENCE(
            replaced(head, "\"blend\":true", "\"blend\":7"), "'blend'");
    // Files of the first version say nothing of blends.
    read_changed(file.path, [&](auto& tensors, auto& metadata, auto&) {
        metadata["format_version"] = "1";
        tensors.erase("layer.3.kv.0.blend");
        const size_t at = metadata[head].find("\"blend\":true,");
        ASSERT_NE(at, std::string::npos);
        metadata[head].erase(at, 13);
    });
    // And those before the fifth nothing of input layers.
    const auto before_version_5 = [&](const char* depth) {
        read_changed(file.path, [&](auto&, auto& metadata, auto&) {
            metadata["format_version"] = "4";
            std::string& about = metadata[head];
            const std::string field = "\"share_input\":false,";
            const size_t at = about.find(field);
            ASSERT_NE(at, std::string::npos);
            about.erase(at, field.size());
            about.replace(about.find("\"depth\":1"), 9, depth);
        });
    };
    before_version_5("\"depth\":1");
    EXPECT_SENTENCE(before_version_5("\"depth\":0"), "linear");
    EXPECT_SENTENCE(
            tensor(head + ".centroids",
                   [](TensorView& t, auto& numbers) {
                       numbers[11] = NAN;
                       t.data = numbers.data();
                   }),
            "vector 1, component 1");
    EXPECT_SENTENCE(
            tensor(head + ".out.bias",
                   [](TensorView& t, auto& numbers) {
                       numbers[2] = INFINITY;
                       t.data = numbers.data();
                   }),
            "layer 'out'");
    EXPECT_SENTENCE(
            tensor(head + ".in.weight",
                   [](TensorView& t, auto& numbers) {
                       t.dtype = "F16";
                       t.data = numbers.data();
                   }),
            "weights are F32 or BF16");
    EXPECT_SENTENCE(
            tensor(head + ".out.weight",
                   [](TensorView& t, auto&) { std::swap(t.shape[1], t.shape[2]); }),
            "expected BF16 (1, 7, 16)");
}

} // namespace
} // namespace faiss_saap
