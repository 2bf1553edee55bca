/// The classical view: keys as a database, queries as queries out of its
/// distribution, recall@k of inner-product search against what is read.
#include <algorithm>

#include <CLI/CLI.hpp>
#include <faiss/AutoTune.h>
#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss/IndexIVFFlat.h>
#include <fmt/core.h>

#include <faiss_saap/IndexAsymmetricIVF.h>

#include "common/HeadData.h"
#include "common/report.h"
#include "common/vector_files.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::string trace, base, query, export_prefix, json;
    int layer = 9, kv_head = 0, ncell = 512, k = 10, queries = 1000;
};

struct Vectors {
    VectorFile base, query;
};

/// Keys of the whole text; queries of its second half, evenly spaced.
Vectors from_trace(const Options& o) {
    const HeadData data(Trace(o.trace), o.layer, o.kv_head);
    Vectors v;
    v.base = {data.d, data.keys_post};
    v.query.d = data.d;
    const int64_t half = data.tokens / 2 * data.group;
    const int64_t n = std::min<int64_t>(o.queries, half);
    for (int64_t i = 0; i < n; i++) {
        const auto row = data.queries_post.begin() + (half + i * half / n) * data.d;
        v.query.x.insert(v.query.x.end(), row, row + data.d);
    }
    return v;
}

double recall(
        const std::vector<idx_t>& found,
        const std::vector<idx_t>& truth,
        int k) {
    int64_t hits = 0;
    for (size_t i = 0; i < truth.size(); i += k) {
        for (int a = 0; a < k; a++) {
            hits += std::count(
                    truth.begin() + i, truth.begin() + i + k, found[i + a]);
        }
    }
    return static_cast<double>(hits) / truth.size();
}

void run(const Options& o) {
    Vectors v;
    if (!o.trace.empty()) {
        v = from_trace(o);
    } else {
        v.base = read_vectors(o.base);
        v.query = read_vectors(o.query);
    }
    FAISS_THROW_IF_NOT_FMT(
            v.base.d == v.query.d,
            "base vectors have %d components, queries %d",
            v.base.d,
            v.query.d);
    if (!o.export_prefix.empty()) {
        for (const char* type : {"fvecs", "fbin"}) {
            write_vectors(o.export_prefix + "base." + type, v.base);
            write_vectors(o.export_prefix + "query." + type, v.query);
        }
    }
    const int d = v.base.d;
    const idx_t n = v.base.rows(), nq = v.query.rows();
    FAISS_THROW_IF_NOT_FMT(
            n >= o.k && n >= o.ncell && nq > 0,
            "%lld vectors are fewer than k = %d or ncell = %d, or there is no query",
            static_cast<long long>(n),
            o.k,
            o.ncell);
    faiss::IndexFlatIP flat(d);
    flat.add(n, v.base.x.data());
    std::vector<float> distances(nq * o.k);
    std::vector<idx_t> truth(nq * o.k), found(nq * o.k);
    flat.search(nq, v.query.x.data(), o.k, distances.data(), truth.data());

    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    faiss::OperatingPoints front;
    const auto measure = [&](const std::string& name,
                             const std::string& key,
                             const auto& search) {
        const double start = seconds_now();
        const double selectivity = search();
        const double us = 1e6 * (seconds_now() - start) / nq;
        const double r = recall(found, truth, o.k);
        front.add(r, us, name + " " + key);
        rows.push_back(
                {{"method", name},
                 {"parameters", key},
                 {"recall", r},
                 {"selectivity", selectivity},
                 {"us_per_query", us}});
        table.push_back(
                {name,
                 key,
                 fmt::format("{:.4f}", r),
                 fmt::format("{:.4f}", selectivity),
                 fmt::format("{:.1f}", us)});
    };
    // The same cells, queries by inner product with the means or as keys are.
    for (bool asymmetric : {true, false}) {
        faiss::IndexFlatL2 empty(d);
        IndexAsymmetricIVF index(std::make_unique<faiss::IndexIVFFlat>(
                &empty, d, o.ncell, faiss::METRIC_INNER_PRODUCT));
        index.training.asymmetric = asymmetric;
        index.train(n, v.base.x.data());
        index.add(n, v.base.x.data());
        for (int nprobe = 1; nprobe <= o.ncell; nprobe *= 2) {
            measure(asymmetric ? "asymmetric IVF" : "IVF, L2 cells",
                    fmt::format("nprobe={}", nprobe),
                    [&] {
                        SearchStats stats;
                        SearchParametersAsymmetricIVF p;
                        p.nprobe = nprobe;
                        p.stats = &stats;
                        index.search(
                                nq,
                                v.query.x.data(),
                                o.k,
                                distances.data(),
                                found.data(),
                                &p);
                        return static_cast<double>(stats.vectors_read) /
                                (double(nq) * n);
                    });
        }
    }
    faiss::IndexHNSWFlat hnsw(d, 16, faiss::METRIC_INNER_PRODUCT);
    hnsw.add(n, v.base.x.data());
    for (int ef = 16; ef <= 1024; ef *= 2) {
        hnsw.hnsw.efSearch = ef;
        measure("HNSW", fmt::format("efSearch={}", ef), [&] {
            faiss::hnsw_stats.reset();
            hnsw.search(
                    nq, v.query.x.data(), o.k, distances.data(), found.data());
            return static_cast<double>(faiss::hnsw_stats.n3) /
                    (double(nq) * n);
        });
    }
    print_table({"method", "parameters", "recall", "selectivity", "us/query"}, table);
    fmt::print("\nPareto front of recall@{} and time\n", o.k);
    nlohmann::json pareto = nlohmann::json::array();
    for (const auto& p : front.optimal_pts) {
        if (p.key.empty()) {
            continue; // Faiss's own point at the origin
        }
        fmt::print("  {:.4f}  {:8.1f} us  {}\n", p.perf, p.t, p.key);
        pareto.push_back({{"recall", p.perf}, {"us_per_query", p.t}, {"key", p.key}});
    }
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"trace", o.trace},
                 {"base", o.base},
                 {"query", o.query},
                 {"layer", o.layer},
                 {"kv_head", o.kv_head},
                 {"ncell", o.ncell},
                 {"k", o.k},
                 {"vectors", n},
                 {"queries", nq}},
                rows,
                {{"pareto", pareto}});
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Attention as maximum inner product search: the keys of a text are the "
            "database, its later queries ask. Recall@k against the share of the "
            "vectors read and time, of IVF with distinct assigners, plain IVF and "
            "HNSW."};
    auto* trace = add_input(app, "--trace", o.trace, "trace file");
    auto* layer = app.add_option("--layer", o.layer, "of the trace");
    auto* kv_head = app.add_option("--kv-head", o.kv_head, "of the trace");
    auto* base = add_input(
            app,
            "--base", o.base, "database in place of a trace: .fvecs or .fbin");
    auto* query = add_input(app, "--query", o.query, "its queries");
    for (CLI::Option* of_trace : {layer, kv_head}) {
        of_trace->capture_default_str()->excludes(base);
    }
    base->needs(query)->excludes(trace);
    query->needs(base);
    app.add_option("--ncell", o.ncell, "cells")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    app.add_option("-k", o.k, "neighbours")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--queries", o.queries, "taken from the trace")
            ->check(CLI::PositiveNumber)
            ->capture_default_str()
            ->excludes(base);
    app.add_option(
            "--export",
            o.export_prefix,
            "writes PREFIXbase and PREFIXquery as .fvecs and .fbin")
            ->excludes(base);
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] {
        FAISS_THROW_IF_NOT_MSG(
                !o.trace.empty() || !o.base.empty(),
                "there is nothing to search in: --trace, or --base and --query");
        run(o);
    });
}
