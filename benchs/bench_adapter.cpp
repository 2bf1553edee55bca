/// What AttentionAdapter's answers are worth on a recorded text: for the
/// partitions it may hold, for both ways to choose cells for a group, and while
/// the sequence grows to four times the length at which it was clustered.
#include <algorithm>
#include <cmath>
#include <set>

#include <CLI/CLI.hpp>
#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/PartitionSet.h>

#include "common/GroundTruth.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::string trace, partitions, json;
    std::vector<int> layers, kv_heads = {0};
    std::vector<double> budgets = {0.02, 0.05, 0.1};
    int64_t sink = 16, window = 256;
    int keys_per_cell = 16, queries = 64;
};

/// Partitions of one KV head, and their name in the results.
struct Configuration {
    std::string name;
    HeadPartitions partitions;
};

/// What the queries of one stage say, all query heads together.
struct Figures {
    double read = 0, far = 0, error = 0, selectivity = 0;
    int64_t queries = 0;
};

std::vector<Configuration> configurations(
        const HeadData& data,
        const Options& o,
        const PartitionSet& trained) {
    const int64_t end = data.tokens / 4;
    const auto ncell = static_cast<int>((end - o.sink) / o.keys_per_cell);
    const KvView kv = data.view(end);
    const HeadPartitions post_rope =
            sequence_partitions(kv, o.sink, end, ncell);
    Partition by_means = kmeans_partition(
            end - o.sink,
            data.d,
            data.keys_pre.data() + o.sink * data.d,
            ncell,
            NEEDS_PRE_ROPE,
            {},
            data.rope);
    by_means.query = std::make_shared<CellMeanAssigner>(data.d, ncell);
    std::vector<Configuration> all = {
            {"post-RoPE", post_rope}, {"de-rotated, means", {{by_means}}}};
    if (!trained.partitions.empty()) {
        const Partition& p =
                trained.find(data.layer, data.kv_head).partition;
        all.push_back({"Saap", {{p}}});
        all.push_back({"Saap + post-RoPE", {{p, post_rope[0][0]}}});
    }
    return all;
}

/// The first token that asks at a stage.
int64_t first_to_ask(int64_t length) {
    return length - length / 8;
}

/// Tokens that ask at a stage: evenly spaced in the last eighth of the text so
/// far.
std::vector<int64_t> tokens_that_ask(int64_t length, int queries) {
    std::vector<int64_t> tokens;
    const int64_t begin = first_to_ask(length);
    const int64_t n = std::min<int64_t>(queries, length - begin);
    for (int64_t i = 0; i < n; i++) {
        tokens.push_back(begin + i * (length - begin) / n);
    }
    return tokens;
}

/// Distinct far keys that a row of query heads reads, over those there are.
double union_selectivity(
        const AttentionAdapter& adapter,
        int64_t sequence,
        const ProbedCells& probed,
        int64_t far_end,
        int64_t sink) {
    std::set<int32_t> slots;
    for (int32_t cell : probed.cells) {
        int p = 0;
        while (cell >= adapter.lists(sequence, 0, p).ncell()) {
            cell -= adapter.lists(sequence, 0, p++).ncell();
        }
        for (int32_t slot : adapter.lists(sequence, 0, p).slots(cell)) {
            if (slot < far_end) {
                slots.insert(slot);
            }
        }
    }
    const int64_t far = far_end - sink;
    return far > 0 ? static_cast<double>(slots.size()) / far : 0;
}

Figures ask(
        const HeadData& data,
        const Options& o,
        const AttentionAdapter& adapter,
        int64_t sequence,
        const std::vector<int64_t>& tokens,
        const std::vector<std::vector<GroundTruth>>& truth,
        const ProbePolicy& policy,
        bool attend) {
    Figures f;
    const KvView kv = data.view(adapter.length(sequence));
    std::vector<float> out(int64_t(data.group) * data.d), lse(data.group);
    std::vector<AttendStats> stats(data.group);
    for (size_t i = 0; i < tokens.size(); i++) {
        const SequenceInput in{sequence, kv, 1, &tokens[i]};
        const float* q = data.query_post(tokens[i], 0);
        const ProbedCells probed = adapter.route({in}, q, &policy);
        const FarRange far = far_range(tokens[i], o.sink, o.window);
        f.queries++;
        if (!attend) {
            f.selectivity += union_selectivity(
                    adapter, sequence, probed, far.end, far.begin);
            continue;
        }
        adapter.attend_preassigned(
                {in}, q, probed, {out.data(), lse.data(), stats.data()}, &policy);
        // What the heads read apart is the union of their cells.
        f.selectivity += policy.share_group
                ? stats[0].selectivity()
                : union_selectivity(
                          adapter, sequence, probed, far.end, far.begin);
        for (int h = 0; h < data.group; h++) {
            const GroundTruth& t = truth[i][h];
            // The LSE tells how much mass was read.
            f.read += std::exp(lse[h] - t.lse) * (1 - stats[h].dense_mass);
            f.far += t.mass_of(far.begin, far.end);
            f.error += t.error_of(out.data() + int64_t(h) * data.d) /
                    data.group;
        }
    }
    return f;
}

/// The policy with a choice per query head that reads as much of the KV head as
/// the shared choice does: bisection over what a head may read.
ProbePolicy per_head_policy(
        const HeadData& data,
        const Options& o,
        const AttentionAdapter& adapter,
        int64_t sequence,
        const std::vector<int64_t>& tokens,
        ProbePolicy policy,
        double selectivity) {
    policy.share_group = false;
    double low = 0, high = policy.max_selectivity;
    for (int i = 0; i < 8; i++) {
        policy.max_selectivity = (low + high) / 2;
        const Figures f =
                ask(data, o, adapter, sequence, tokens, {}, policy, false);
        (f.selectivity / f.queries > selectivity ? high : low) =
                policy.max_selectivity;
    }
    policy.max_selectivity = low;
    return policy;
}

void run(const Options& o) {
    const Trace trace(o.trace);
    PartitionSet trained;
    if (!o.partitions.empty()) {
        trained = read_partitions(o.partitions);
        trained.check_rope(trace.rope);
    }
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    for (int layer : o.layers) {
        for (int kv_head : o.kv_heads) {
            const HeadData data(trace, layer, kv_head);
            FAISS_THROW_IF_NOT_FMT(
                    data.tokens / 4 >= o.sink + o.keys_per_cell,
                    "%s: a quarter of %lld tokens makes no cell of keys-per-cell = %d "
                    "behind sink = %lld",
                    o.trace.c_str(),
                    static_cast<long long>(data.tokens),
                    o.keys_per_cell,
                    static_cast<long long>(o.sink));
            check_far_keys(first_to_ask(data.tokens / 4), o.sink, o.window);
            AdapterParams params;
            params.heads_q = data.group;
            params.heads_kv = 1;
            params.d = data.d;
            params.sink = o.sink;
            params.window = o.window;
            params.scale = data.scale;
            params.key_codes = true; // read only where keys are ranked
            AttentionAdapter adapter(params);
            const auto all = configurations(data, o, trained);
            std::vector<int64_t> sequences;
            for (const Configuration& c : all) {
                sequences.push_back(adapter.create(c.partitions));
            }
            Progress progress(
                    fmt::format("layer {}, KV head {}", layer, kv_head),
                    4 * static_cast<int64_t>(all.size()));
            for (int stage = 1; stage <= 4; stage++) {
                const int64_t length = data.tokens * stage / 4;
                const auto tokens = tokens_that_ask(length, o.queries);
                std::vector<std::vector<GroundTruth>> truth(tokens.size());
#pragma omp parallel for schedule(dynamic)
                for (size_t i = 0; i < tokens.size(); i++) {
                    for (int h = 0; h < data.group; h++) {
                        truth[i].emplace_back(data, tokens[i], h);
                    }
                }
                for (size_t c = 0; c < all.size(); c++) {
                    adapter.append(sequences[c], data.view(length));
                    for (double budget : o.budgets) {
                        ProbePolicy policy;
                        policy.nprobe = 65536;
                        policy.max_selectivity = budget;
                        Figures shared;
                        for (const std::string choice :
                             {"group", "group, codes", "query head"}) {
                            const bool share = choice != "query head";
                            policy.refine = choice == "group, codes" ? 6 : 1;
                            if (!share) {
                                policy = per_head_policy(
                                        data,
                                        o,
                                        adapter,
                                        sequences[c],
                                        tokens,
                                        policy,
                                        shared.selectivity / shared.queries);
                            }
                            const Figures f =
                                    ask(data,
                                        o,
                                        adapter,
                                        sequences[c],
                                        tokens,
                                        truth,
                                        policy,
                                        true);
                            if (choice == "group") {
                                shared = f;
                            }
                            const double n = static_cast<double>(f.queries);
                            rows.push_back(
                                    {{"layer", layer},
                                     {"kv_head", kv_head},
                                     {"tokens", length},
                                     {"partitions", all[c].name},
                                     {"choice", choice},
                                     {"budget", budget},
                                     {"queries", tokens.size()},
                                     {"selectivity", f.selectivity / n},
                                     {"mass_recall", f.read / f.far},
                                     {"output_error", f.error / n}});
                            table.push_back(
                                    {all[c].name,
                                     std::to_string(layer),
                                     std::to_string(length),
                                     choice,
                                     fmt::format("{:.2f}", budget),
                                     fmt::format("{:.3f}", f.selectivity / n),
                                     fmt::format("{:.3f}", f.read / f.far),
                                     fmt::format("{:.3f}", f.error / n)});
                        }
                    }
                    progress.advance();
                }
            }
        }
    }
    print_table(
            {"partitions",
             "layer",
             "tokens",
             "choice per",
             "budget",
             "selectivity",
             "mass recall",
             "output error"},
            table);
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"trace", o.trace},
                 {"partitions", o.partitions},
                 {"sink", o.sink},
                 {"window", o.window},
                 {"keys_per_cell", o.keys_per_cell},
                 {"queries", o.queries}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Mass recall and output error of AttentionAdapter on a trace. Cells "
            "of the sequence are learnt on its first quarter; then it grows to "
            "its full length, and queries ask at each quarter. Cells are chosen "
            "for the group, and for each query head at equal selectivity per "
            "KV head."};
    add_input(app, "--trace", o.trace, "recorded queries, keys and values")
            ->required()
            ->check(CLI::ExistingFile);
    app.add_option("--layer", o.layers, "layers, as 9,15")
            ->delimiter(',')
            ->required();
    app.add_option("--kv-head", o.kv_heads, "KV heads, as 0,1")
            ->delimiter(',')
            ->capture_default_str();
    add_input(
               app,
               "--partitions", o.partitions, "trained partitions, a .saap file")
            ->check(CLI::ExistingFile);
    app.add_option("--budget", o.budgets, "far keys read per KV head")
            ->delimiter(',')
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    app.add_option("--sink", o.sink, "first tokens, always attended")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option("--window", o.window, "most recent tokens, always attended")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option(
               "--keys-per-cell",
               o.keys_per_cell,
               "mean size of the cells learnt on the first quarter")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--queries", o.queries, "tokens that ask at each length")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
