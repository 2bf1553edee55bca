/// Attention as a search problem: mass recall against selectivity on a trace.
#include <algorithm>
#include <cmath>
#include <map>

#include <CLI/CLI.hpp>
#include <faiss/IndexFlat.h>
#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>
#include <omp.h>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include "common/Method.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

const std::vector<std::string> kMethods = {
        "oracle_topk",
        "ivf_rope_l2",
        "ivf_rope_ip",
        "ivf_norope_l2",
        "ivf_norope_ip",
        "ivf_norope_mean",
        "offline_ip",
        "offline_mean",
        "saap",
        "saap_group",
        "saap_blend",
        "saap_blend_group"};
/// The last ones of these need --partitions.
constexpr int64_t kMethodsOfTheSequence = 6;

struct Options {
    std::string trace, json, partitions, save_cells, cluster_on = "all";
    std::vector<int> layers, kv_heads = {0};
    std::vector<std::string> methods;
    std::vector<double> budgets = {0.01, 0.02, 0.05, 0.1, 0.2};
    int ncell = 1024, niter = 10, seed = 1234, queries = 512;
    int64_t sink = 16, window = 256;
};

/// Sums over the queries for one method, budget and query head.
struct Sums {
    double read = 0, far = 0, ceiling = 0, error = 0, seconds = 0;
    double selectivity = 0, head_selectivity = 0;
    int64_t queries = 0;

    void add(const Sums& o) {
        read += o.read;
        far += o.far;
        ceiling += o.ceiling;
        error += o.error;
        seconds += o.seconds;
        selectivity += o.selectivity;
        head_selectivity += o.head_selectivity;
        queries += o.queries;
    }
};

/// Tokens whose queries are asked: N/2 + t * max(1, N/1024).
std::vector<int64_t> query_tokens(int64_t tokens, int queries) {
    std::vector<int64_t> at;
    const int64_t step = std::max<int64_t>(1, tokens / (2 * queries));
    for (int64_t i = tokens / 2;
         i < tokens && static_cast<int>(at.size()) < queries;
         i += step) {
        at.push_back(i);
    }
    return at;
}

Partition cluster(
        const HeadData& data,
        const Options& options,
        RoutingNeeds space) {
    KMeansParams params;
    params.niter = options.niter;
    params.seed = options.seed;
    const int64_t n =
            options.cluster_on == "all" ? data.tokens : data.tokens / 2;
    const auto& keys =
            space == NEEDS_PRE_ROPE ? data.keys_pre : data.keys_post;
    return kmeans_partition(
            n, data.d, keys.data(), options.ncell, space, params, data.rope);
}

/// The cells of a trained partition, queries by inner product with the
/// centroids: what it would be without its classifier.
Partition without_classifier(const Partition& trained) {
    Partition p = trained;
    const auto& key = dynamic_cast<const QuantizerAssigner&>(*trained.key);
    const auto& cells = dynamic_cast<const faiss::IndexFlat&>(*key.quantizer);
    auto centroids = std::make_shared<faiss::IndexFlatIP>(cells.d);
    centroids->add(cells.ntotal, cells.get_xb());
    p.query = std::make_shared<QuantizerAssigner>(centroids, NEEDS_PRE_ROPE);
    return p;
}

std::vector<std::unique_ptr<Method>> make_methods(
        const HeadData& data,
        const Options& options,
        const PartitionSet& trained) {
    std::map<RoutingNeeds, Partition> clustered; // one k-means per space
    const auto cells = [&](RoutingNeeds space) {
        if (!clustered.count(space)) {
            clustered[space] = cluster(data, options, space);
        }
        return clustered[space];
    };
    std::vector<std::unique_ptr<Method>> methods;
    const auto add = [&](const std::string& name,
                         const Partition& p,
                         bool share_group = false) {
        methods.push_back(std::make_unique<CellMethod>(
                name, p, options.sink, share_group));
    };
    const auto offline = [&] {
        return trained.find(data.layer, data.kv_head).partition;
    };
    const auto blended = [&] {
        return trained.find(data.layer, data.kv_head).blended();
    };
    const auto by_means = [](Partition p) {
        p.query = std::make_shared<CellMeanAssigner>(p.key->d, p.key->ncell);
        return p;
    };
    for (const std::string& name : options.methods) {
        if (name == "oracle_topk") {
            methods.push_back(std::make_unique<OracleTopK>());
        } else if (name == "ivf_rope_l2") {
            add(name, symmetric(cells(NEEDS_POST_ROPE)));
        } else if (name == "ivf_rope_ip") {
            add(name, cells(NEEDS_POST_ROPE));
        } else if (name == "ivf_norope_l2") {
            add(name, symmetric(cells(NEEDS_PRE_ROPE)));
        } else if (name == "ivf_norope_ip") {
            add(name, cells(NEEDS_PRE_ROPE));
        } else if (name == "ivf_norope_mean") {
            add(name, by_means(cells(NEEDS_PRE_ROPE)));
        } else if (name == "offline_ip") {
            add(name, without_classifier(offline()));
        } else if (name == "offline_mean") {
            add(name, by_means(offline()));
        } else if (name == "saap") {
            add(name, offline());
        } else if (name == "saap_group") {
            add(name, offline(), /*share_group=*/true);
        } else if (name == "saap_blend") {
            add(name, blended());
        } else if (name == "saap_blend_group") {
            add(name, blended(), /*share_group=*/true);
        }
    }
    return methods;
}

/// Everything that one query tells about every method and budget.
/// @param sums  size methods * budgets * group
void evaluate_query(
        const HeadData& data,
        const Options& options,
        const std::vector<std::unique_ptr<Method>>& methods,
        int64_t token,
        std::vector<Sums>& sums) {
    const FarRange far = far_range(token, options.sink, options.window);
    const KvView kv = data.view(token + 1);
    const int d = data.d;
    std::vector<GroundTruth> truth;
    for (int h = 0; h < data.group; h++) {
        truth.emplace_back(data, token, h);
    }
    std::vector<float> out(d), part(d);
    std::vector<char> read_by_group(token + 1);
    size_t at = 0;
    for (const auto& method : methods) {
        for (double budget : options.budgets) {
            const auto limit = static_cast<int64_t>(budget * far.size());
            std::fill(read_by_group.begin(), read_by_group.end(), 0);
            int64_t distinct = 0;
            double start = seconds_now();
            const auto chosen = method->select(data, truth, token, far, limit);
            const double choosing = (seconds_now() - start) / data.group;
            const auto ceiling = method->ceiling(truth, far, limit);
            for (int h = 0; h < data.group; h++, at++) {
                Sums& s = sums[at];
                const auto& slots = chosen[h];
                start = seconds_now();
                float lse, part_lse;
                const float* q = data.query_post(token, h);
                attend_range(
                        kv, 0, 1, q, data.scale, 0, far.begin, out.data(), &lse);
                attend_range(
                        kv,
                        0,
                        1,
                        q,
                        data.scale,
                        far.end,
                        token + 1,
                        part.data(),
                        &part_lse);
                merge_states(1, d, out.data(), &lse, part.data(), &part_lse);
                attend_slots(
                        kv,
                        0,
                        1,
                        q,
                        data.scale,
                        static_cast<int64_t>(slots.size()),
                        slots.data(),
                        part.data(),
                        &part_lse);
                merge_states(1, d, out.data(), &lse, part.data(), &part_lse);
                s.seconds += choosing + seconds_now() - start;
                s.queries++;
                s.read += truth[h].mass_of(slots);
                s.far += truth[h].mass_of(far.begin, far.end);
                s.ceiling += ceiling[h];
                s.error += truth[h].error_of(out.data());
                if (far.size() > 0) {
                    s.head_selectivity +=
                            static_cast<double>(slots.size()) / far.size();
                }
                for (int32_t j : slots) {
                    distinct += !read_by_group[j];
                    read_by_group[j] = 1;
                }
            }
            for (int h = 0; h < data.group && far.size() > 0; h++) {
                sums[at - data.group + h].selectivity +=
                        static_cast<double>(distinct) / far.size();
            }
        }
    }
}

std::vector<Sums> evaluate(
        const HeadData& data,
        const Options& options,
        const std::vector<std::unique_ptr<Method>>& methods) {
    const auto tokens = query_tokens(data.tokens, options.queries);
    std::vector<Sums> sums(
            methods.size() * options.budgets.size() * data.group);
    Progress progress(
            fmt::format("layer {}, KV head {}", data.layer, data.kv_head),
            static_cast<int64_t>(tokens.size()));
    // Statistics of cells move on in blocks, so that queries can share threads,
    // but not past a query that looks at the newest keys.
    bool exact = false;
    for (const auto& method : methods) {
        exact = exact || method->needs_newest_keys();
    }
    const int64_t block =
            options.cluster_on == "all" ? tokens.size() : exact ? 1 : 32;
    for (size_t begin = 0; begin < tokens.size(); begin += block) {
        const size_t end = std::min(begin + block, tokens.size());
        const int64_t listed = options.cluster_on == "all"
                ? data.tokens
                : far_range(tokens[end - 1], options.sink, options.window).end;
        for (const auto& method : methods) {
            method->list_until(data, listed);
        }
#pragma omp parallel
        {
            std::vector<Sums> mine(sums.size());
#pragma omp for schedule(dynamic)
            for (size_t i = begin; i < end; i++) {
                evaluate_query(data, options, methods, tokens[i], mine);
                progress.advance();
            }
#pragma omp critical
            for (size_t i = 0; i < sums.size(); i++) {
                sums[i].add(mine[i]);
            }
        }
    }
    return sums;
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

/// A figure of a row, or a dash for null.
std::string fixed(const nlohmann::json& x) {
    return x.is_null() ? "-" : fmt::format("{:.3f}", x.get<double>());
}

void run(const Options& options) {
    for (const std::string& name : options.methods) {
        const auto at = std::find(kMethods.begin(), kMethods.end(), name);
        FAISS_THROW_IF_NOT_FMT(
                at - kMethods.begin() < kMethodsOfTheSequence ||
                        !options.partitions.empty(),
                "%s needs trained partitions: --partitions",
                name.c_str());
        FAISS_THROW_IF_NOT_FMT(
                options.cluster_on == "prefix" ||
                        name.find("blend") == std::string::npos,
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
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table, per_head;
    for (int layer : options.layers) {
        for (int kv_head : options.kv_heads) {
            const HeadData data(trace, layer, kv_head);
            const auto methods = make_methods(data, options, trained);
            if (!options.save_cells.empty()) {
                save_cells(
                        options.save_cells,
                        data,
                        cluster(data, options, NEEDS_POST_ROPE));
            }
            const auto sums = evaluate(data, options, methods);
            size_t at = 0;
            for (const auto& method : methods) {
                const double index_fraction = method->index_bytes(data) /
                        (2.0 * data.tokens * data.d * sizeof(float));
                for (double budget : options.budgets) {
                    Sums all;
                    for (int h = 0; h < data.group; h++, at++) {
                        const Sums& s = sums[at];
                        const double n = static_cast<double>(s.queries);
                        all.add(s);
                        nlohmann::json row = {
                                {"method", method->name},
                                {"layer", layer},
                                {"kv_head", kv_head},
                                {"query_head", data.query_heads[h]},
                                {"budget", budget},
                                {"selectivity", s.selectivity / n},
                                {"head_selectivity", s.head_selectivity / n},
                                {"mass_recall", s.far > 0 ? s.read / s.far : 1.0},
                                {"ceiling", nullptr},
                                {"output_error", s.error / n},
                                {"index_bytes_fraction", index_fraction},
                                {"us_per_query", 1e6 * s.seconds / n}};
                        if (!std::isnan(s.ceiling)) {
                            row["ceiling"] =
                                    s.far > 0 ? s.ceiling / s.far : 1.0;
                        }
                        rows.push_back(row);
                        per_head.push_back(
                                {method->name,
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
                            {method->name,
                             std::to_string(layer),
                             std::to_string(kv_head),
                             fmt::format("{:.3g}", budget),
                             fmt::format("{:.4f}", all.selectivity / n),
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
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Mass recall of attention against selectivity, on recorded queries, "
            "keys and values. For each method and budget (the largest share of "
            "far keys that a query head may read): the attention mass that was "
            "read, what the partition would allow, and the error of the output."};
    app.add_option("--trace", o.trace, "trace file")->required();
    app.add_option("--layer", o.layers, "layers, comma-separated")
            ->required()
            ->delimiter(',');
    app.add_option("--kv-head", o.kv_heads, "KV heads, comma-separated")
            ->delimiter(',')
            ->capture_default_str();
    app.add_option(
               "--methods",
               o.methods,
               "comma-separated; all that need no further input by default")
            ->delimiter(',')
            ->check(CLI::IsMember(kMethods));
    app.add_option("--ncell", o.ncell, "cells of each partition")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    app.add_option(
               "--budget", o.budgets, "shares of far keys, comma-separated")
            ->delimiter(',')
            ->check(CLI::Range(0.0, 1.0));
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
    app.add_option(
            "--partitions",
            o.partitions,
            "file of train_partitions, for the methods offline_* and saap*");
    app.add_option("--queries", o.queries, "queries in the second half")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--niter", o.niter, "k-means iterations")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--seed", o.seed, "of k-means")->capture_default_str();
    app.add_option(
            "--save-cells",
            o.save_cells,
            "safetensors file for the post-RoPE cells (cell of each key, cell "
            "means) of the last layer and head");
    app.add_option("--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    if (o.methods.empty()) {
        o.methods = kMethods;
        if (o.cluster_on == "all") {
            o.methods.resize(kMethods.size() - 2); // no blends
        }
        if (o.partitions.empty()) {
            o.methods.resize(kMethodsOfTheSequence);
        }
    }
    return run_program([&] { run(o); });
}
