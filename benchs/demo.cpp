/// The main job on the embedded trace: index a text's keys, decode its last
/// part token by token, and read a twentieth of the cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <omp.h>

#include <faiss/IndexFlat.h>
#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/attend_slots.h>
#include <faiss_saap/index_factory.h>

#include "common/GroundTruth.h"
#include "common/report.h"
#ifdef FAISS_SAAP_WITH_CUDA
#include <faiss_saap/gpu/device.h>

#include "device/decode_trace.h"
#endif

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::string trace, json;
    int ncell = 512;
    double budget = 0.05;
    int64_t sink = 16, window = 256;
};

/// Sums over queries, heads and layers for one method and budget.
struct Result {
    explicit Result(std::string m, double b = 1)
            : method(std::move(m)), budget(b) {}

    std::string method;
    double budget;
    double selectivity = 0, error = 0, seconds = 0;
    int64_t queries = 0, steps = 0;
    std::vector<double> read, far, ceiling; // per layer and head, over steps

    double recall(const std::vector<double>& part) const {
        double sum = 0;
        for (size_t i = 0; i < far.size(); i++) {
            sum += part[i] / far[i];
        }
        return sum / static_cast<double>(far.size());
    }
};

/// One decode step, and what dense attention makes of it.
struct Step {
    const HeadData& data;
    int64_t token;
    FarRange far;
    std::vector<GroundTruth> truth; // per query head

    Step(const HeadData& d, int64_t t, const Options& o)
            : data(d), token(t), far(far_range(t, o.sink, o.window)) {
        for (int h = 0; h < data.group; h++) {
            truth.emplace_back(data, token, h);
        }
    }

    /// Notes what a method gave: its outputs (group * d) and the share of all
    /// attention mass that it read beyond sink and window, per head.
    void note(
            Result& r,
            size_t first_head,
            const std::vector<float>& output,
            const std::vector<double>& far_read,
            double keys_read,
            double seconds) const {
        r.read.resize(std::max(r.read.size(), first_head + data.group));
        r.far.resize(r.read.size());
        for (int h = 0; h < data.group; h++) {
            r.read[first_head + h] += far_read[h];
            r.far[first_head + h] += truth[h].mass_of(far.begin, far.end);
            r.error += truth[h].error_of(output.data() + h * data.d);
        }
        r.queries += data.group;
        r.steps++;
        r.selectivity += keys_read / far.size();
        r.seconds += seconds;
    }
};

/// Slots of the far keys with the largest mass, summed over the group.
std::vector<int32_t> best_keys(const Step& step, int64_t k) {
    std::vector<std::pair<double, int32_t>> mass;
    for (int64_t j = step.far.begin; j < step.far.end; j++) {
        double sum = 0;
        for (const auto& t : step.truth) {
            sum += t.mass[j];
        }
        mass.emplace_back(-sum, static_cast<int32_t>(j));
    }
    std::nth_element(mass.begin(), mass.begin() + k, mass.end());
    std::vector<int32_t> slots;
    for (int64_t i = 0; i < k; i++) {
        slots.push_back(mass[i].second);
    }
    for (int64_t j = 0; j < step.far.begin; j++) {
        slots.push_back(static_cast<int32_t>(j));
    }
    for (int64_t j = step.far.end; j <= step.token; j++) {
        slots.push_back(static_cast<int32_t>(j));
    }
    std::sort(slots.begin(), slots.end());
    return slots;
}

/// Adds what a partition allows at best: its cells by true mass per key.
void note_ceiling(
        Result& r,
        size_t first_head,
        const Step& step,
        const CellLists& lists,
        int64_t limit) {
    const int ncell = lists.ncell();
    std::vector<int64_t> counts(ncell);
    std::vector<double> mass(ncell, 0.0);
    for (int64_t j = step.far.begin; j < step.far.end; j++) {
        counts[lists.cell_of(j)]++;
        for (const auto& t : step.truth) {
            mass[lists.cell_of(j)] += t.mass[j];
        }
    }
    std::vector<float> per_key(ncell, -INFINITY);
    for (int c = 0; c < ncell; c++) {
        if (counts[c] > 0) {
            per_key[c] = static_cast<float>(mass[c] / counts[c]);
        }
    }
    r.ceiling.resize(std::max(r.ceiling.size(), first_head + step.data.group));
    for (int32_t c :
         take_cells(ncell, per_key.data(), counts.data(), ncell, limit, false)) {
        for (int32_t j : lists.slots(c)) {
            for (int h = 0; j < step.far.end && h < step.data.group; h++) {
                r.ceiling[first_head + h] += step.truth[h].mass[j];
            }
        }
    }
}

struct Results {
    Result dense{"dense attention"};
    std::vector<Result> oracle, symmetric, asymmetric; // per budget
#ifdef FAISS_SAAP_WITH_CUDA
    DeviceDecode device; // sums over KV heads
    int device_heads = 0;
#endif
};

/// Sums that describe the index.
struct IndexFigures {
    double build_seconds = 0, insert_seconds = 0;
    int64_t built = 0, inserted = 0, queries = 0;
    double found_symmetric = 0, found_asymmetric = 0, share_read = 0;
};

/// How many of the 10 largest inner products `search` finds.
void search_both_ways(
        const HeadData& data,
        IndexAsymmetricIVF& index,
        int64_t from,
        IndexFigures& figures) {
    const int64_t n = (data.tokens - from) * data.group;
    const float* q = data.query_post(from, 0);
    constexpr int k = 10;
    std::vector<float> distances(n * k);
    std::vector<idx_t> exact(n * k), found(n * k);
    faiss::IndexFlatIP flat(data.d);
    flat.add(data.tokens, data.keys_post.data());
    flat.search(n, q, k, distances.data(), exact.data());

    const Partition asymmetric = index.partition;
    for (bool as_keys : {false, true}) {
        index.partition = as_keys ? symmetric(asymmetric) : asymmetric;
        SearchStats stats;
        SearchParametersAsymmetricIVF params;
        params.nprobe = std::max(1, index.ncell / 20);
        params.stats = &stats;
        index.search(n, q, k, distances.data(), found.data(), &params);
        double hits = 0;
        for (int64_t i = 0; i < n; i++) {
            for (int j = 0; j < k; j++) {
                hits += std::count(
                        exact.begin() + i * k,
                        exact.begin() + (i + 1) * k,
                        found[i * k + j]);
            }
        }
        (as_keys ? figures.found_symmetric : figures.found_asymmetric) +=
                hits / k;
        figures.share_read += 0.5 * static_cast<double>(stats.vectors_read) /
                static_cast<double>(index.ntotal);
    }
    index.partition = asymmetric;
    figures.queries += n;
}

void decode(
        const HeadData& data,
        const Options& options,
        const std::vector<double>& budgets,
        size_t first_head,
        Results& results,
        IndexFigures& figures) {
    const int64_t prefix = data.tokens / 8 * 7;
    const int d = data.d;
    check_far_keys(prefix, options.sink, options.window);

    // An index over the keys: cells by L2 k-means, queries by inner product.
    double start = seconds_now();
    auto index = index_factory(
            d,
            fmt::format("AIVF{},Flat", options.ncell),
            faiss::METRIC_INNER_PRODUCT);
    index->train(prefix, data.keys_post.data());
    index->add(prefix, data.keys_post.data());
    figures.build_seconds += seconds_now() - start;
    figures.built += prefix;

    AdapterParams params;
    params.heads_q = data.group;
    params.heads_kv = 1;
    params.d = d;
    params.sink = options.sink;
    params.window = options.window;
    AttentionAdapter adapter(params);
    const int64_t asymmetric = adapter.create({{index->partition}});
    const int64_t as_keys = adapter.create({{symmetric(index->partition)}});
    adapter.append(asymmetric, data.view(prefix));
    adapter.append(as_keys, data.view(prefix));

    Progress progress(
            fmt::format("layer {}", data.layer), data.tokens - prefix);
    std::vector<float> out(int64_t(data.group) * d), lse(data.group);
    std::vector<AttendStats> stats(data.group);
    for (int64_t token = prefix; token < data.tokens; token++) {
        progress.advance();
        start = seconds_now();
        index->add(1, data.keys_post.data() + token * d);
        figures.insert_seconds += seconds_now() - start;
        figures.inserted++;
        const KvView kv = data.view(token + 1);
        adapter.append(asymmetric, kv);
        adapter.append(as_keys, kv);

        const Step step(data, token, options);
        const float* q = data.query_post(token, 0);
        const std::vector<double> nothing(data.group, 0.0);
        start = seconds_now();
        attend_range(
                kv,
                0,
                data.group,
                q,
                data.scale,
                0,
                token + 1,
                out.data(),
                lse.data());
        double seconds = seconds_now() - start;
        std::vector<double> far_mass;
        for (const auto& t : step.truth) {
            far_mass.push_back(t.mass_of(step.far.begin, step.far.end));
        }
        step.note(
                results.dense,
                first_head,
                out,
                far_mass,
                static_cast<double>(step.far.size()),
                seconds);

        for (size_t b = 0; b < budgets.size(); b++) {
            const auto limit =
                    static_cast<int64_t>(budgets[b] * step.far.size());
            const auto slots = best_keys(step, limit);
            start = seconds_now();
            attend_slots(
                    kv,
                    0,
                    data.group,
                    q,
                    data.scale,
                    static_cast<int64_t>(slots.size()),
                    slots.data(),
                    out.data(),
                    lse.data());
            seconds = seconds_now() - start;
            std::vector<double> read;
            for (const auto& t : step.truth) {
                read.push_back(
                        t.mass_of(slots) - t.mass_of(0, step.far.begin) -
                        t.mass_of(step.far.end, token + 1));
            }
            step.note(
                    results.oracle[b],
                    first_head,
                    out,
                    read,
                    static_cast<double>(limit),
                    seconds);

            ProbePolicy policy;
            policy.nprobe = options.ncell;
            policy.max_selectivity = budgets[b];
            for (bool keys_way : {true, false}) {
                const int64_t sequence = keys_way ? as_keys : asymmetric;
                Result& r = (keys_way ? results.symmetric
                                      : results.asymmetric)[b];
                start = seconds_now();
                adapter.attend(
                        {{sequence, kv}},
                        q,
                        {out.data(), lse.data(), stats.data()},
                        &policy);
                seconds = seconds_now() - start;
                for (int h = 0; h < data.group; h++) {
                    // LSEs tell how much mass was read.
                    read[h] = std::exp(lse[h] - step.truth[h].lse) *
                            (1 - stats[h].dense_mass);
                }
                step.note(
                        r,
                        first_head,
                        out,
                        read,
                        static_cast<double>(stats[0].keys_read),
                        seconds);
                note_ceiling(r, first_head, step, adapter.lists(sequence, 0), limit);
            }
        }
    }
    search_both_ways(data, *index, prefix, figures);
#ifdef FAISS_SAAP_WITH_CUDA
    if (gpu::device_count() > 0) {
        const DeviceDecode device = decode_trace(
                data,
                index->partition,
                options.sink,
                options.window,
                options.budget);
        results.device.mass_recall += device.mass_recall;
        results.device.error += device.error;
        results.device.selectivity += device.selectivity;
        results.device_heads++;
    }
#endif
}

std::vector<std::string> table_row(const Result& r, const Result& dense) {
    const double n = static_cast<double>(r.steps);
    return {r.method,
            fmt::format("{:.3f}", r.selectivity / n),
            fmt::format("{:.3f}", r.recall(r.read)),
            r.ceiling.empty() ? "-" : fmt::format("{:.3f}", r.recall(r.ceiling)),
            fmt::format("{:.1e}", r.error / static_cast<double>(r.queries)),
            fmt::format("{:.1f}", 1e6 * r.seconds / n),
            fmt::format("{:.1f}x", dense.seconds / dense.steps * n / r.seconds)};
}

nlohmann::json json_row(const Result& r, const Result& dense) {
    const double n = static_cast<double>(r.steps);
    nlohmann::json row = {
            {"method", r.method},
            {"budget", r.budget},
            {"selectivity", r.selectivity / n},
            {"mass_recall", r.recall(r.read)},
            {"ceiling", nullptr},
            {"output_error", r.error / static_cast<double>(r.queries)},
            {"us_per_query", 1e6 * r.seconds / n},
            {"speed_up", dense.seconds / dense.steps * n / r.seconds}};
    if (!r.ceiling.empty()) {
        row["ceiling"] = r.recall(r.ceiling);
    }
    return row;
}

void run(const Options& options) {
    omp_set_num_threads(1); // what is timed is compared, whatever else the machine does
    const Trace trace(options.trace);
    fmt::print(
            "{}: {} tokens of {}, layers",
            trace.model,
            trace.tokens,
            trace.text);
    for (int layer : trace.layers) {
        fmt::print(" {}", layer);
    }
    fmt::print(
            "\nsink {}, window {}, {} cells, at most {:.0f} % of the far keys "
            "read per KV head\n\n",
            options.sink,
            options.window,
            options.ncell,
            100 * options.budget);

    std::vector<double> budgets = {0.01, 0.02, 0.05, 0.1, 0.2};
    budgets.push_back(options.budget);
    std::sort(budgets.begin(), budgets.end());
    budgets.erase(std::unique(budgets.begin(), budgets.end()), budgets.end());
    Results results;
    for (double budget : budgets) {
        results.oracle.emplace_back("oracle top-k", budget);
        results.symmetric.emplace_back("symmetric IVF (L2, L2)", budget);
        results.asymmetric.emplace_back("asymmetric IVF (L2, IP)", budget);
    }
    IndexFigures figures;
    size_t first_head = 0;
    for (int layer : trace.layers) {
        for (int kv_head : trace.kv_heads) {
            const HeadData data(trace, layer, kv_head);
            decode(data, options, budgets, first_head, results, figures);
            first_head += data.group;
        }
    }

    const size_t b =
            std::find(budgets.begin(), budgets.end(), options.budget) -
            budgets.begin();
    print_table(
            {"method",
             "selectivity",
             "mass recall",
             "ceiling",
             "output error",
             "us/query",
             "speed-up"},
            {table_row(results.dense, results.dense),
             table_row(results.oracle[b], results.dense),
             table_row(results.symmetric[b], results.dense),
             table_row(results.asymmetric[b], results.dense)});
    const double queries = static_cast<double>(figures.queries);
    fmt::print(
            "\nA query is one token of one KV head: {} query heads together, on "
            "one core.\nIndex: {} keys clustered and added in {:.2f} s, {} "
            "inserted one by one in {:.1f} us each.\nIts search, reading {:.1f} "
            "% of the keys, finds of the 10 largest inner products: {:.3f} "
            "symmetric, {:.3f} asymmetric.\n",
            trace.group(),
            figures.built,
            figures.build_seconds,
            figures.inserted,
            1e6 * figures.insert_seconds / figures.inserted,
            100 * figures.share_read / queries,
            figures.found_symmetric / queries,
            figures.found_asymmetric / queries);

#ifdef FAISS_SAAP_WITH_CUDA
    if (results.device_heads) {
        fmt::print(
                "On the GPU ({}, float16, the last 64 tokens): selectivity "
                "{:.3f}, mass recall {:.3f}, output error {:.1e}.\n",
                gpu::device_info(0).name,
                results.device.selectivity / results.device_heads,
                results.device.mass_recall / results.device_heads,
                results.device.error / results.device_heads);
    } else {
        fmt::print("No GPU here: all of this ran on the CPU.\n");
    }
#endif

    if (!options.json.empty()) {
        nlohmann::json rows = nlohmann::json::array();
        rows.push_back(json_row(results.dense, results.dense));
        for (const auto* method :
             {&results.oracle, &results.symmetric, &results.asymmetric}) {
            for (const Result& r : *method) {
                rows.push_back(json_row(r, results.dense));
            }
        }
        write_json(
                options.json,
                {{"trace", trace.text},
                 {"model", trace.model},
                 {"tokens", trace.tokens},
                 {"layers", trace.layers},
                 {"kv_heads", trace.kv_heads},
                 {"ncell", options.ncell},
                 {"sink", options.sink},
                 {"window", options.window}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Indexes the keys of a recorded text, decodes its last eighth token "
            "by token and compares dense attention, the best keys one by one, "
            "symmetric and asymmetric assignment of queries."};
    add_input(app, "--trace", o.trace, "trace file")->required();
    app.add_option("--ncell", o.ncell, "cells of the partition")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    app.add_option("--budget", o.budget, "share of far keys in the table")
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    app.add_option("--sink", o.sink, "first tokens, always read")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option("--window", o.window, "most recent tokens, always read")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
