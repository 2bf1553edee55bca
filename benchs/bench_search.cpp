/// What distinct assigners cost: `search` against the plain faiss::IndexIVFFlat
/// over the same lists and the same probes, in one run.
#include <algorithm>
#include <random>
#include <vector>

#include <CLI/CLI.hpp>
#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <fmt/core.h>

#include <faiss_saap/IndexAsymmetricIVF.h>
#include <faiss_saap/QuantizerAssigner.h>

#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    int64_t n = 100000, nq = 200;
    int d = 64, ncell = 1024, nprobe = 32, k = 10, repeat = 21;
    std::string json;
};

void run(const Options& o) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(o.n * o.d), q(o.nq * o.d);
    for (auto* v : {&x, &q}) {
        for (float& f : *v) {
            f = normal(random);
        }
    }
    faiss::IndexFlatL2 quantizer(o.d);
    faiss::IndexIVFFlat plain(&quantizer, o.d, o.ncell);
    plain.cp.niter = 5;
    plain.train(o.n, x.data());
    plain.add(o.n, x.data());
    plain.nprobe = o.nprobe;

    Partition partition;
    const auto keys = std::make_shared<faiss::IndexFlatL2>(quantizer);
    partition.key =
            std::make_shared<QuantizerAssigner>(keys, NEEDS_POST_ROPE);
    partition.query = partition.key;
    faiss::IndexFlatL2 none(o.d);
    IndexAsymmetricIVF ours(
            std::make_unique<faiss::IndexIVFFlat>(&none, o.d, o.ncell),
            partition);
    ours.add(o.n, x.data());
    ours.nprobe = o.nprobe;

    std::vector<float> distances(o.nq * o.k);
    std::vector<idx_t> labels(o.nq * o.k), labels_plain(o.nq * o.k);
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    for (int64_t batch : {int64_t(1), o.nq}) {
        // Taken in turns, so that what disturbs one disturbs the other.
        std::vector<double> seconds_plain, seconds_ours;
        const auto time = [&](const faiss::Index& index,
                              std::vector<double>& seconds,
                              std::vector<idx_t>& out) {
            const double start = seconds_now();
            for (int64_t i = 0; i < o.nq; i += batch) {
                index.search(
                        batch,
                        q.data() + i * o.d,
                        o.k,
                        distances.data() + i * o.k,
                        out.data() + i * o.k);
            }
            seconds.push_back(seconds_now() - start);
        };
        for (int r = 0; r < o.repeat; r++) {
            time(plain, seconds_plain, labels_plain);
            time(ours, seconds_ours, labels);
        }
        FAISS_THROW_IF_NOT_MSG(
                labels == labels_plain, "the two indexes disagree");
        const double us_plain = 1e6 * percentile(seconds_plain, 0.5) / o.nq;
        const double us_ours = 1e6 * percentile(seconds_ours, 0.5) / o.nq;
        rows.push_back(
                {{"batch", batch},
                 {"us_per_query_ivfflat", us_plain},
                 {"us_per_query_asymmetric", us_ours},
                 {"ratio", us_ours / us_plain}});
        table.push_back(
                {std::to_string(batch),
                 fmt::format("{:.1f}", us_plain),
                 fmt::format("{:.1f}", us_ours),
                 fmt::format("{:.3f}", us_ours / us_plain)});
    }
    print_table(
            {"batch", "us/query IndexIVFFlat", "us/query asymmetric", "ratio"},
            table);
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"n", o.n},
                 {"d", o.d},
                 {"ncell", o.ncell},
                 {"nprobe", o.nprobe},
                 {"k", o.k},
                 {"queries", o.nq}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Times search of an IndexAsymmetricIVF against the plain "
            "faiss::IndexIVFFlat with the same cells, probes and vectors."};
    const auto add = [&app](const char* name, auto& value, const char* help) {
        app.add_option(name, value, help)
                ->check(CLI::PositiveNumber)
                ->capture_default_str();
    };
    add("--n", o.n, "vectors");
    add("--queries", o.nq, "queries");
    add("--dim", o.d, "dimension");
    add("--ncell", o.ncell, "cells");
    add("--nprobe", o.nprobe, "cells probed");
    add("--k", o.k, "neighbours");
    add("--repeat", o.repeat, "runs, of which the median counts");
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
