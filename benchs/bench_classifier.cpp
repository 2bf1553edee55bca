/// What one query costs a classifier: weights in the cache, and not.
#include <algorithm>
#include <random>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include <faiss_saap/QueryClassifier.h>

#include "common/memory.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    ClassifierShape shape;
    bool separate_inputs = false, separate_trunks = false, fp32 = false;
    int queries = 2000, batch = 256;
    double cold_gib = .5;
    std::string json;
};

void run(Options o) {
    ClassifierShape& s = o.shape;
    s.share_input = !o.separate_inputs && !o.separate_trunks;
    s.share_trunk = !o.separate_trunks;
    const DType dtype = o.fp32 ? DType::float32 : DType::bfloat16;
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, .1f);
    std::vector<float> parameters(parameter_count(s));
    for (float& x : parameters) {
        x = normal(random);
    }
    // As many copies as no cache holds.
    check_fits_memory(o.cold_gib * (1 << 30), "cold-gib: weights");
    const QueryClassifier first(s, parameters.data(), dtype);
    const auto copies = static_cast<size_t>(
            o.cold_gib * (1 << 30) / static_cast<double>(first.bytes_read()));
    const std::vector<QueryClassifier> cold(copies + 1, first);

    std::vector<float> x(size_t(o.batch) * s.d), scores(size_t(o.batch) * s.ncell);
    for (float& f : x) {
        f = normal(random);
    }
    std::vector<int32_t> head(o.batch);
    RoutingInput input;
    input.d = s.d;
    input.pre_rope = x.data();
    input.head = head.data();

    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    const auto add = [&](const char* stage, const std::vector<double>& us) {
        rows.push_back(
                {{"stage", stage},
                 {"us", percentile(us, .5)},
                 {"p99_us", percentile(us, .99)},
                 {"bytes", first.bytes_read()}});
        table.push_back(
                {stage,
                 fmt::format("{:.1f}", percentile(us, .5)),
                 fmt::format("{:.1f}", percentile(us, .99)),
                 fmt::format("{}", first.bytes_read())});
    };
    const auto time = [&](const QueryClassifier& classifier, int64_t n) {
        input.n = n;
        const double start = seconds_now();
        classifier.scores(input, nullptr, scores.data());
        return 1e6 * (seconds_now() - start) / static_cast<double>(n);
    };
    std::vector<double> us;
    for (int i = 0; i < o.queries; i++) {
        us.push_back(time(first, 1));
    }
    add("warm", us);
    us.clear();
    for (int i = 0; i < o.queries; i++) {
        us.push_back(time(cold[i % cold.size()], 1));
    }
    add("cold", us);
    us.clear();
    for (int i = 0; i < std::max(1, o.queries / o.batch); i++) {
        us.push_back(time(first, o.batch));
    }
    add("batch", us);
    print_table({"stage", "us/query", "p99", "bytes of the group"}, table);
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"d", s.d},
                 {"group", s.group},
                 {"ncell", s.ncell},
                 {"width", s.width},
                 {"depth", s.depth},
                 {"share_input", s.share_input},
                 {"share_trunk", s.share_trunk},
                 {"dtype", name(dtype)},
                 {"batch", o.batch}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    o.shape.d = 64;
    o.shape.group = 3;
    o.shape.ncell = 1024;
    CLI::App app{
            "Times a query classifier: one query at a time on one core, with "
            "the weights in the cache (warm) and out of it (cold), and a batch "
            "of one head's queries through BLAS, per query."};
    const auto add = [&app](const char* name, auto& value, const char* help) {
        return app.add_option(name, value, help)
                ->check(CLI::PositiveNumber)
                ->capture_default_str();
    };
    add("--dim", o.shape.d, "head dimension");
    add("--group", o.shape.group, "query heads of the KV head");
    add("--ncell", o.shape.ncell, "cells");
    add("--width", o.shape.width, "of the hidden layers");
    app.add_option(
               "--depth",
               o.shape.depth,
               "residual blocks; 0: one rectified hidden layer")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_flag(
            "--separate-inputs",
            o.separate_inputs,
            "an input matrix per query head instead of one for the group");
    app.add_flag(
            "--separate-trunks",
            o.separate_trunks,
            "a whole network per query head instead of one for the group");
    app.add_flag("--fp32", o.fp32, "weights as float32 instead of bfloat16");
    add("--queries", o.queries, "timed queries, of which the median counts");
    add("--batch", o.batch, "queries of a batch");
    add("--cold-gib", o.cold_gib, "memory that cold weights are spread over")
            ->check(CLI::Range(0.0, 1024.0));
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
