#include "decode.h"

#include <cmath>

#include <faiss/IndexFlat.h>
#include <fmt/core.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/dtype.h>

#include "report.h"

namespace faiss_saap::benchs {

namespace {

std::shared_ptr<QuantizerAssigner> flat_assigner(
        const std::vector<float>& centres,
        int d,
        faiss::MetricType metric) {
    auto flat = std::make_shared<faiss::IndexFlat>(d, metric);
    flat->add(static_cast<faiss::Index::idx_t>(centres.size()) / d, centres.data());
    return std::make_shared<QuantizerAssigner>(flat, NEEDS_POST_ROPE);
}

/// Parameters. Time does not depend on what a network has learnt, but for how unequal it
/// finds the cells: logarithms of masses that trained ones find deviate by 1 to 1.7.
std::vector<float> random_network(const ClassifierShape& shape, std::mt19937& random) {
    constexpr double kDeviation = 1.2;
    std::normal_distribution<float> normal;
    std::vector<float> parameters(parameter_count(shape), 0.0f);
    const auto layers = classifier_layers(shape);
    for (const ClassifierLayer& layer : layers) {
        const float deviation = 1 / std::sqrt(static_cast<float>(layer.cols));
        for (int64_t i = 0; i < layer.weights(); i++) {
            parameters[layer.weight + i] = deviation * normal(random);
        }
    }
    std::vector<float> query(shape.d), scores(shape.ncell);
    for (float& f : query) {
        f = normal(random);
    }
    const int32_t head = 0;
    RoutingInput input;
    input.n = 1, input.d = shape.d;
    input.pre_rope = query.data(), input.head = &head;
    QueryClassifier(shape, parameters.data(), DType::float32)
            .scores(input, nullptr, scores.data());
    double squares = 0; // the mean is about 0
    for (const float score : scores) {
        squares += double(score) * score;
    }
    const double wanted = kDeviation * std::sqrt(static_cast<double>(shape.d));
    const auto factor = static_cast<float>(wanted / std::sqrt(squares / shape.ncell));
    const ClassifierLayer& out = layers.back();
    for (int64_t i = 0; i < out.weights(); i++) {
        parameters[out.weight + i] *= factor;
    }
    return parameters;
}

} // namespace

std::vector<float> decode_queries(const DecodeOptions& o, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const int group = o.heads_q / o.heads_kv;
    std::vector<float> queries;
    for (int h = 0; h < o.heads_kv; h++) {
        std::vector<float> topic(o.d);
        for (float& f : topic) {
            f = normal(random);
        }
        for (int64_t i = 0; i < int64_t(group) * o.d; i++) {
            queries.push_back(topic[i % o.d] + 0.5f * normal(random));
        }
    }
    return queries;
}

HeadPartitions centre_partitions(
        const DecodeOptions& o,
        const std::vector<std::vector<float>>& centres) {
    HeadPartitions heads;
    const DType dtype = o.fp32_centroids ? DType::float32 : DType::bfloat16;
    for (std::vector<float> c : centres) {
        round_to(dtype, static_cast<int64_t>(c.size()), c.data());
        Partition p;
        p.key = flat_assigner(c, o.d, faiss::METRIC_L2);
        p.query = flat_assigner(c, o.d, faiss::METRIC_INNER_PRODUCT);
        heads.push_back({p});
    }
    return heads;
}

HeadPartitions classifier_partitions(
        const DecodeOptions& o,
        const std::vector<std::vector<float>>& centres,
        std::mt19937& random) {
    HeadPartitions heads = centre_partitions(o, centres);
    for (auto& head : heads) {
        ClassifierShape shape;
        shape.d = o.d;
        shape.group = o.heads_q / o.heads_kv;
        shape.ncell = o.ncell;
        head[0].query = std::make_shared<QueryClassifier>(
                shape, random_network(shape, random).data());
        head[0].rope.d = o.d;
    }
    return heads;
}

std::vector<int64_t> DecodeOptions::lengths() const {
    std::vector<int64_t> all;
    for (int s = 0; s < sequences; s++) {
        const double at = sequences > 1 ? 2.0 * s / (sequences - 1) - 1 : 0.0;
        all.push_back(std::max(
                int64_t(2),
                static_cast<int64_t>(
                        std::llround(static_cast<double>(tokens) * (1 + ragged * at)))));
    }
    std::mt19937 random(1);
    std::shuffle(all.begin(), all.end(), random);
    return all;
}

void report_decode(
        const DecodeOptions& o,
        const std::vector<DecodeStage>& stages,
        double selectivity,
        const std::string& device) {
    const double peak = stages[0].bytes / stages[0].median; // bytes per s
    double dense = 0;
    for (const DecodeStage& s : stages) {
        dense = s.name == "dense" ? s.median : dense;
    }
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    for (const DecodeStage& s : stages) {
        const double fraction = s.bytes / s.median / peak;
        rows.push_back({{"stage", s.name},
                        {"us", 1e6 * s.median},
                        {"p99_us", 1e6 * s.p99},
                        {"bytes", s.bytes},
                        {"fraction_of_bandwidth", fraction}});
        table.push_back({s.name,
                         fmt::format("{:.1f}", 1e6 * s.median),
                         fmt::format("{:.1f}", 1e6 * s.p99),
                         fmt::format("{:.1f}", s.bytes / (1 << 20)),
                         fmt::format("{:.2f}", fraction),
                         fmt::format("{:.1f}x", dense / s.median)});
    }
    fmt::print(
            "{}: {} x {} tokens{}, {} / {} heads, d {}, {}; {:.2f} % of the far "
            "keys read per KV head; {:.1f} GB/s read bandwidth\n",
            device,
            o.sequences,
            o.tokens,
            o.ragged > 0 ? fmt::format(" +- {:.0f} %", 100 * o.ragged) : "",
            o.heads_q,
            o.heads_kv,
            o.d,
            o.dtype,
            100 * selectivity,
            peak / 1e9);
    print_table(
            {"stage", "us", "p99 us", "MiB", "of bandwidth", "dense / stage"},
            table);
    if (!o.json.empty()) {
        nlohmann::json config = o.config();
        config["sequences"] = o.sequences;
        config["ragged"] = o.ragged;
        config["heads_q"] = o.heads_q;
        config["selectivity"] = selectivity;
        config["requested_selectivity"] = o.selectivity;
        config["fp32_centroids"] = o.fp32_centroids;
        config["buffers_gib"] = o.buffer_gib;
        config["repeat"] = o.repeat;
        config["bandwidth_bytes_per_s"] = peak;
        config["device_name"] = device;
        write_json(o.json, config, rows);
    }
}

} // namespace faiss_saap::benchs
