/// Traces longer than a model's recorded ones, and with their geometry.
#include <algorithm>

#include <CLI/CLI.hpp>
#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <faiss_saap/SafetensorsFile.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/dtype.h>

#include "common/TraceReplay.h"
#include "common/report.h"
#include "common/run_program.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::vector<std::string> traces;
    std::vector<int> layers, kv_heads = {0};
    int64_t tokens = 131072;
    std::string out, json, rope_scaling = "longer";
    double run = 512;
    uint64_t seed = 1234;
};

/// Frequencies stretched as the text is: what a model that is made for N tokens
/// gets for S N of them.
std::string stretched(const RopeParams& rope, double by) {
    FAISS_THROW_IF_NOT_FMT(
            rope.scaling == RopeScaling::none || rope.scaling == RopeScaling::ntk,
            "the traces have the RoPE scaling '%s': say with --rope-scaling what "
            "the longer text has",
            rope.scaling_text().c_str());
    RopeParams longer = rope;
    longer.scaling = RopeScaling::ntk;
    longer.factor =
            (rope.scaling == RopeScaling::ntk ? rope.factor : 1) * std::max(1.0, by);
    return longer.factor == 1 ? "" : longer.scaling_text();
}

std::vector<uint16_t> to_half(const std::vector<float>& x) {
    std::vector<uint16_t> half(x.size());
    from_float(
            DType::float16, x.data(), static_cast<int64_t>(x.size()), half.data());
    return half;
}

void run(const Options& o) {
    std::vector<Trace> traces;
    std::vector<int64_t> lengths;
    for (const std::string& path : o.traces) {
        traces.emplace_back(path);
        const Trace &t = traces.back(), &first = traces.front();
        FAISS_THROW_IF_NOT_FMT(
                t.d == first.d && t.group() == first.group() &&
                        t.rope == first.rope,
                "%s and %s are not of the same model: head dimension, query heads "
                "per KV head or RoPE differ",
                o.traces.front().c_str(),
                path.c_str());
        lengths.push_back(t.tokens);
    }
    const Trace& first = traces.front();
    const int d = first.d, group = first.group();
    RopeParams rope = first.rope;
    rope.set_scaling(
            o.rope_scaling != "longer"
                    ? o.rope_scaling
                    : stretched(
                              first.rope,
                              static_cast<double>(o.tokens) /
                                      *std::max_element(lengths.begin(), lengths.end())));
    RotaryEmbedding checked(rope);
    const ReplayPath path(lengths, o.tokens, o.run, o.seed);

    const auto recorded = [&](const auto& of_trace) {
        std::vector<float> all;
        for (const Trace& t : traces) {
            const std::vector<float> x = of_trace(t);
            all.insert(all.end(), x.begin(), x.end());
        }
        return all;
    };
    std::map<std::string, TensorView> tensors;
    std::map<std::string, std::vector<uint16_t>> values;
    nlohmann::json rows = nlohmann::json::array();
    Progress progress(
            "blending",
            static_cast<int64_t>(o.layers.size() * o.kv_heads.size()) * (group + 2));
    for (int layer : o.layers) {
        const std::string name = fmt::format("layer.{}.", layer);
        for (int kv_head : o.kv_heads) {
            double share = 0;
            const auto add = [&](const char* what, const std::vector<float>& x) {
                const auto y = to_half(path.replay(d, x, share));
                auto& all = values[name + what];
                all.insert(all.end(), y.begin(), y.end());
                progress.advance();
            };
            const auto keys = recorded([&](const Trace& t) {
                return t.keys(layer, t.kv_index(kv_head));
            });
            share = novelty(d, keys, lengths);
            fmt::print(
                    "layer {}, KV head {}: {:.0f} % of a key is new\n",
                    layer,
                    kv_head,
                    100 * share);
            rows.push_back(
                    {{"layer", layer}, {"kv_head", kv_head}, {"new", share}});
            add("k", keys);
            add("v", recorded([&](const Trace& t) {
                    return t.values(layer, t.kv_index(kv_head));
                }));
            for (int g = 0; g < group; g++) {
                add("q", recorded([&](const Trace& t) {
                        return t.queries(layer, t.kv_index(kv_head) * group + g);
                    }));
            }
        }
    }
    for (const auto& [name, x] : values) {
        TensorView& t = tensors[name];
        t.dtype = "F16";
        t.shape = {static_cast<int64_t>(x.size()) / (o.tokens * d), o.tokens, d};
        t.data = x.data();
        t.bytes = x.size() * sizeof(uint16_t);
    }
    std::vector<int32_t> tokens; // the places of the first walk
    for (const auto& row : path.rows) {
        tokens.push_back(static_cast<int32_t>(row[0]));
    }
    TensorView& t = tensors["tokens"];
    t.dtype = "I32";
    t.shape = {o.tokens};
    t.data = tokens.data();
    t.bytes = tokens.size() * sizeof(int32_t);

    const SafetensorsFile file(o.traces.front());
    auto metadata = file.metadata();
    std::vector<std::string> texts;
    for (const Trace& trace : traces) {
        texts.push_back(trace.text);
    }
    metadata["text"] = fmt::format("generated from {}", fmt::join(texts, ", "));
    metadata["layers"] = fmt::format("{}", fmt::join(o.layers, ","));
    metadata["kv_heads"] = fmt::format("{}", fmt::join(o.kv_heads, ","));
    metadata["rope_scaling"] = rope.scaling_text();
    write_safetensors(o.out, tensors, metadata);
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"traces", o.traces},
                 {"tokens", o.tokens},
                 {"rope_scaling", metadata["rope_scaling"]},
                 {"run", o.run},
                 {"seed", o.seed}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Writes a trace of any length with the geometry of recorded ones: each "
            "token blends two recorded tokens, before RoPE. benchs/README.md says "
            "how far methods fare on it as on recorded texts."};
    add_input(app, "--trace", o.traces, "recorded traces of one model")->required();
    app.add_option("--layer", o.layers, "layers, comma-separated")
            ->required()
            ->delimiter(',');
    app.add_option("--kv-head", o.kv_heads, "KV heads, comma-separated")
            ->delimiter(',')
            ->capture_default_str();
    app.add_option("--tokens", o.tokens, "length of the new text")
            ->check(CLI::Range(int64_t(17), int64_t(1) << 24))
            ->capture_default_str();
    add_output(app, "--out", o.out, "the trace, a .safetensors file")->required();
    app.add_option("--run", o.run, "tokens replayed in a row, on average")
            ->check(CLI::Range(1.0, 1e9))
            ->capture_default_str();
    app.add_option(
            "--rope-scaling",
            o.rope_scaling,
            "as docs/trace-format.md has it; by default NTK, stretched as the text "
            "is");
    app.add_option("--seed", o.seed, "of the walks")->capture_default_str();
    add_output(app, "--json", o.json, "file for what was measured");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
