/// Attention as a search problem: mass recall against selectivity on a trace.
#include <algorithm>
#include <cmath>
#include <map>

#include <CLI/CLI.hpp>
#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <faiss_saap/PartitionSet.h>

#include "common/GroundTruth.h"
#include "common/evaluate.h"
#include "common/report.h"
#include "methods/MethodList.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::string trace, json, partitions, save_cells, cluster_on = "all";
    std::vector<int> layers, kv_heads = {0};
    std::vector<std::string> methods;
    std::vector<double> budgets = {0.01, 0.02, 0.05, 0.1, 0.2};
    int ncell = 1024, niter = 10, seed = 1234, queries = 512;
    int64_t sink = 16, window = 256;
};

/// Default methods: what all need no more than a trace, and with --partitions
/// those of Saap.
std::vector<std::string> default_methods(const Options& options) {
    std::vector<std::string> names = {
            "oracle_topk",
            "ivf_rope_l2",
            "ivf_rope_ip",
            "ivf_norope_l2",
            "ivf_norope_ip",
            "ivf_norope_mean"};
    if (!options.partitions.empty()) {
        for (const char* name :
             {"offline_ip", "offline_mean", "saap", "saap_group"}) {
            names.push_back(name);
        }
        if (options.cluster_on == "prefix") {
            names.push_back("saap_blend");
            names.push_back("saap_blend_group");
        }
    }
    return names;
}

/// What `--methods` means: names, or all of them.
std::vector<std::string> chosen_methods(const Options& options) {
    if (options.methods.empty()) {
        return default_methods(options);
    }
    const auto& given = options.methods;
    if (std::find(given.begin(), given.end(), "all") == given.end()) {
        return given;
    }
    FAISS_THROW_IF_NOT_MSG(given.size() == 1, "methods: all stands alone");
    std::vector<std::string> names;
    for (const MethodEntry& e : all_methods()) {
        if ((!e.needs_trained || !options.partitions.empty()) &&
            (!e.needs_newest || options.cluster_on == "prefix")) {
            names.push_back(e.name);
        }
    }
    return names;
}

/// Cells and representatives, for evaluation with other tools.
void save_cells(
        const std::string& path,
        const HeadData& data,
        const Partition& partition) {
    RoutingInput input;
    input.n = data.tokens;
    input.d = data.d;
    input.pre_rope = data.keys_pre.data();
    input.post_rope = data.keys_post.data();
    std::vector<int32_t> cells(data.tokens);
    partition.key->assign(input, nullptr, 1, cells.data(), nullptr);
    std::vector<float> means(int64_t(partition.ncell()) * data.d, 0.0f);
    cell_means(
            data.tokens,
            data.d,
            data.keys_post.data(),
            cells.data(),
            partition.ncell(),
            means.data());
    std::map<std::string, TensorView> tensors;
    TensorView& c = tensors["cells"];
    c.dtype = "I32";
    c.shape = {data.tokens};
    c.data = cells.data();
    c.bytes = cells.size() * sizeof(int32_t);
    TensorView& m = tensors["means"];
    m.dtype = "F32";
    m.shape = {partition.ncell(), data.d};
    m.data = means.data();
    m.bytes = means.size() * sizeof(float);
    write_safetensors(
            path,
            tensors,
            {{"layer", std::to_string(data.layer)},
             {"kv_head", std::to_string(data.kv_head)}});
}

/// The 0th, 5th, ... 100th percentile.
std::vector<double> percentiles(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    std::vector<double> at;
    for (int p = 0; p <= 100; p += 5) {
        at.push_back(x[(x.size() - 1) * p / 100]);
    }
    return at;
}

/// A figure of a row, or a dash for null.
std::string fixed(const nlohmann::json& x) {
    return x.is_null() ? "-" : fmt::format("{:.3f}", x.get<double>());
}

void run(const Options& options) {
    const auto names = chosen_methods(options);
    for (const std::string& name : names) {
        const MethodEntry& e = find_method(name);
        FAISS_THROW_IF_NOT_FMT(
                !e.needs_trained || !options.partitions.empty(),
                "%s needs trained partitions: --partitions",
                name.c_str());
        FAISS_THROW_IF_NOT_FMT(
                !e.needs_newest || options.cluster_on == "prefix",
                "%s looks at the newest keys, which must not be later than the "
                "query: --cluster-on prefix",
                name.c_str());
    }
    const Trace trace(options.trace);
    PartitionSet trained;
    if (!options.partitions.empty()) {
        trained = read_partitions(options.partitions);
        trained.check_rope(trace.rope);
    }
    Evaluation evaluation;
    evaluation.budgets = options.budgets;
    evaluation.queries = options.queries;
    evaluation.sink = options.sink;
    evaluation.window = options.window;
    evaluation.decoding = options.cluster_on == "prefix";
    nlohmann::json rows = nlohmann::json::array();
    nlohmann::json heads = nlohmann::json::array();
    std::vector<std::vector<std::string>> table, per_head;
    for (int layer : options.layers) {
        for (int kv_head : options.kv_heads) {
            const HeadData data(trace, layer, kv_head);
            check_far_keys(
                    query_tokens(data.tokens, options.queries).front(),
                    options.sink,
                    options.window);
            Setup setup(data);
            setup.sink = options.sink;
            setup.window = options.window;
            setup.clustered =
                    evaluation.decoding ? data.tokens / 2 : data.tokens;
            setup.ncell = options.ncell;
            setup.niter = options.niter;
            setup.seed = options.seed;
            setup.trained = &trained;
            std::vector<std::unique_ptr<Method>> methods;
            for (const std::string& name : names) {
                methods.push_back(find_method(name).make(setup, false));
            }
            if (!options.save_cells.empty()) {
                save_cells(
                        options.save_cells, data, setup.cells(NEEDS_POST_ROPE));
            }
            const Figures figures = evaluate(data, evaluation, methods);
            const auto& sums = figures.sums;
            for (int h = 0; h < data.group; h++) {
                heads.push_back(
                        {{"layer", layer},
                         {"kv_head", kv_head},
                         {"query_head", data.query_heads[h]},
                         {"far_mass", sums[h].far / sums[h].queries},
                         {"keys_for_95", percentiles(figures.keys_for_95[h])}});
            }
            const double dense_bytes =
                    2.0 * kNumberBytes * data.tokens * data.d;
            size_t at = 0;
            for (const std::string& name : names) {
                for (double budget : options.budgets) {
                    Sums all;
                    for (int h = 0; h < data.group; h++, at++) {
                        const Sums& s = sums[at];
                        const double n = static_cast<double>(s.queries);
                        all.add(s);
                        const double index = s.index_bytes / n / dense_bytes;
                        nlohmann::json row = {
                                {"method", name},
                                {"layer", layer},
                                {"kv_head", kv_head},
                                {"query_head", data.query_heads[h]},
                                {"budget", budget},
                                {"queries", s.queries},
                                {"selectivity", s.selectivity / n},
                                {"head_selectivity", s.head_selectivity / n},
                                {"mass_recall", s.far > 0 ? s.read / s.far : 1.0},
                                {"ceiling", nullptr},
                                {"output_error", s.error / n},
                                {"index_bytes_fraction", index},
                                {"bytes_fraction", index + s.selectivity / n},
                                {"us_per_query", 1e6 * s.seconds / n}};
                        if (!std::isnan(s.ceiling)) {
                            row["ceiling"] =
                                    s.far > 0 ? s.ceiling / s.far : 1.0;
                        }
                        rows.push_back(row);
                        per_head.push_back(
                                {name,
                                 std::to_string(layer),
                                 std::to_string(data.query_heads[h]),
                                 fmt::format("{:.3g}", budget),
                                 fmt::format("{:.4f}", s.head_selectivity / n),
                                 fixed(row["mass_recall"]),
                                 fixed(row["ceiling"]),
                                 fmt::format("{:.3f}", s.far / n)});
                    }
                    const double n = static_cast<double>(all.queries);
                    double recall = 0, ceiling = 0;
                    for (int h = 0; h < data.group; h++) {
                        const auto& row = rows[rows.size() - data.group + h];
                        recall += row["mass_recall"].get<double>() / data.group;
                        ceiling += row["ceiling"].is_null()
                                ? NAN
                                : row["ceiling"].get<double>() / data.group;
                    }
                    table.push_back(
                            {name,
                             std::to_string(layer),
                             std::to_string(kv_head),
                             fmt::format("{:.3g}", budget),
                             fmt::format("{:.4f}", all.selectivity / n),
                             fmt::format(
                                     "{:.4f}",
                                     all.selectivity / n +
                                             all.index_bytes / n / dense_bytes),
                             fmt::format("{:.3f}", recall),
                             std::isnan(ceiling) ? "-"
                                                 : fmt::format("{:.3f}", ceiling),
                             fmt::format("{:.4f}", all.error / n),
                             fmt::format("{:.1f}", 1e6 * all.seconds / n)});
                }
            }
        }
    }
    print_table(
            {"method",
             "layer",
             "query head",
             "budget",
             "selectivity",
             "recall",
             "ceiling",
             "far mass"},
            per_head);
    fmt::print("\nmeans over the query heads of a KV head\n");
    print_table(
            {"method",
             "layer",
             "kv head",
             "budget",
             "selectivity",
             "bytes",
             "recall",
             "ceiling",
             "error",
             "us/query"},
            table);
    if (!options.json.empty()) {
        write_json(
                options.json,
                {{"trace", trace.text},
                 {"model", trace.model},
                 {"tokens", trace.tokens},
                 {"rope_scaling", trace.rope.scaling_text()},
                 {"ncell", options.ncell},
                 {"partitions", options.partitions},
                 {"sink", options.sink},
                 {"window", options.window},
                 {"cluster_on", options.cluster_on},
                 {"niter", options.niter},
                 {"seed", options.seed},
                 {"queries", options.queries}},
                rows,
                {{"heads", heads}});
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    std::vector<std::string> known;
    for (const MethodEntry& e : all_methods()) {
        known.push_back(e.name);
    }
    std::vector<std::string> known_or_all = known;
    known_or_all.push_back("all");
    CLI::App app{
            "Mass recall of attention against selectivity, on recorded queries, "
            "keys and values. For each method and budget (the largest share of "
            "far keys that a query head may read): the attention mass that was "
            "read, what the partition would allow, and the error of the output."};
    add_input(app, "--trace", o.trace, "trace file")->required();
    app.add_option("--layer", o.layers, "layers, comma-separated")
            ->required()
            ->delimiter(',');
    app.add_option("--kv-head", o.kv_heads, "KV heads, comma-separated")
            ->delimiter(',')
            ->capture_default_str();
    app.add_option(
               "--methods",
               o.methods,
               "comma-separated, or all; by default a few inverted files and, "
               "with --partitions, Saap. Known: " +
                       fmt::format("{}", fmt::join(known, ", ")))
            ->delimiter(',')
            ->check(CLI::IsMember(known_or_all));
    app.add_option("--ncell", o.ncell, "cells of each partition")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    app.add_option(
               "--budget", o.budgets, "shares of far keys, comma-separated")
            ->delimiter(',')
            ->check(CLI::Range(0.0, 1.0))
            ->default_str(fmt::format("{}", fmt::join(o.budgets, ",")));
    app.add_option("--sink", o.sink, "first tokens, always read")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option("--window", o.window, "most recent tokens, always read")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option(
               "--cluster-on",
               o.cluster_on,
               "all: k-means sees the whole text; prefix: the first half, the "
               "rest is inserted")
            ->check(CLI::IsMember({"all", "prefix"}))
            ->capture_default_str();
    add_input(
            app,
            "--partitions",
            o.partitions,
            "file of train_partitions, for the methods offline_*, saap* and union*");
    app.add_option("--queries", o.queries, "queries in the second half")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--niter", o.niter, "k-means iterations")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--seed", o.seed, "of k-means")->capture_default_str();
    add_output(
            app,
            "--save-cells",
            o.save_cells,
            "safetensors file for the post-RoPE cells (cell of each key, cell "
            "means) of the last layer and head");
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
