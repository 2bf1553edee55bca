/// Chooses, on recorded attention, what each KV head probes for a byte budget.
#include <algorithm>
#include <cmath>
#include <exception>
#include <map>

#include <CLI/CLI.hpp>
#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/choose_plan.h>

#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::vector<std::string> traces, lookups, tests;
    std::vector<int> layers, kv_heads;
    std::string partitions, out, json;
    PlanParams params;
    int64_t sink = -1, window = -1; ///< as trained
    int64_t tokens = 0;             ///< as the first trace
};

/// Figures of the plans of one head: [text][plan].
using Measured = std::vector<std::vector<PlanFigures>>;

struct HeadResult {
    int layer, kv_head;
    std::vector<ProbePlan> plans;
    ProbePlan chosen;
    Measured texts, lookups, tests;
};

/// "blend + own/32, .25": what a plan is, whatever its budget.
std::string name_of(const ProbePlan& p) {
    std::string text =
            p.trained == TrainedQuery::none ? "" : name(p.trained);
    if (p.segment) {
        text += fmt::format(" of {}", p.segment);
    }
    if (p.keys_per_cell) {
        text += fmt::format("{}own/{}", text.empty() ? "" : " + ", p.keys_per_cell);
        if (p.trained != TrainedQuery::none) {
            text += fmt::format(
                    ", {:.2g}",
                    p.trained_share / (p.trained_share + p.own_share));
        }
    }
    return text;
}

std::vector<Trace> read_traces(
        const std::vector<std::string>& paths,
        const PartitionSet& set) {
    std::vector<Trace> traces;
    for (const std::string& path : paths) {
        traces.emplace_back(path);
        set.check_rope(traces.back().rope);
    }
    return traces;
}

size_t place_of_chosen(const HeadResult& head) {
    for (size_t p = 0; p < head.plans.size(); p++) {
        if (name_of(head.plans[p]) == name_of(head.chosen)) {
            return p;
        }
    }
    FAISS_THROW_MSG("the chosen plan is not among the candidates");
}

/// Means over the heads, each with the plan that `pick` names for it.
template <class Pick>
std::vector<std::string> table_row(
        const std::string& title,
        const std::vector<HeadResult>& heads,
        Measured HeadResult::*part,
        const Pick& pick) {
    PlanFigures sum;
    sum.recall = 0;
    for (const HeadResult& head : heads) {
        const PlanFigures m = mean_figures(head.*part, pick(head));
        const auto n = static_cast<double>(heads.size());
        sum.recall += m.recall / n;
        sum.output_error += m.output_error / n;
        sum.bytes += m.bytes / n;
    }
    return {title,
            fmt::format("{:.4f}", sum.recall),
            fmt::format("{:.4f}", sum.output_error),
            fmt::format("{:.4f}", sum.loss()),
            fmt::format("{:.4f}", sum.bytes)};
}

/// The plan that is best on these texts by `measure` (small is good), of those
/// that keep to the budget on them or read no more than the chosen one does.
template <class Measure>
size_t best(
        const HeadResult& head,
        const Measured& texts,
        const Measure& measure) {
    size_t at = place_of_chosen(head);
    const double limit = std::max(
            mean_figures(texts, at).bytes,
            head.chosen.byte_budget * (1 + kBudgetTolerance));
    double least = INFINITY;
    for (size_t p = 0; p < head.plans.size(); p++) {
        const PlanFigures f = mean_figures(texts, p);
        if (f.bytes <= limit && measure(f) < least) {
            least = measure(f);
            at = p;
        }
    }
    return at;
}

/// The plans beside the best choice per head in hindsight, and beside each
/// method for all heads.
void report_part(
        const char* title,
        const std::vector<HeadResult>& heads,
        Measured HeadResult::*part) {
    if ((heads[0].*part).empty()) {
        return;
    }
    std::vector<std::vector<std::string>> table;
    table.push_back(table_row("the plans", heads, part, place_of_chosen));
    const auto hindsight = [&](const char* row, const auto& measure) {
        table.push_back(table_row(row, heads, part, [&](const HeadResult& h) {
            return best(h, h.*part, measure);
        }));
    };
    // Lookups may have another length, at which no plan keeps to the budget.
    if (part != &HeadResult::lookups) {
        hindsight("best per head by loss", [](const PlanFigures& f) {
            return f.loss();
        });
        hindsight("best per head by recall", [](const PlanFigures& f) {
            return -f.recall;
        });
        hindsight("best per head by error", [](const PlanFigures& f) {
            return f.output_error;
        });
    }
    // Only what every head could afford is a method for all heads.
    std::map<std::string, size_t> heads_with;
    for (const HeadResult& head : heads) {
        for (const ProbePlan& p : head.plans) {
            heads_with[name_of(p)]++;
        }
    }
    std::vector<std::vector<std::string>> singles;
    for (const auto& [method, count] : heads_with) {
        if (count == heads.size()) {
            singles.push_back(table_row(
                    "all heads: " + method,
                    heads,
                    part,
                    [&, &method = method](const HeadResult& h) {
                        size_t p = 0;
                        while (name_of(h.plans[p]) != method) {
                            p++;
                        }
                        return p;
                    }));
        }
    }
    std::sort(singles.begin(), singles.end(), [](const auto& a, const auto& b) {
        return a[3] < b[3];
    });
    table.insert(table.end(), singles.begin(), singles.end());
    fmt::print("\n{}, means over {} KV heads\n", title, heads.size());
    print_table({"", "recall", "error", "loss", "bytes"}, table);
}

void add_rows(
        nlohmann::json& rows,
        const HeadResult& head,
        const Measured& part,
        const char* role,
        const std::vector<Trace>& traces) {
    const size_t chosen = place_of_chosen(head);
    for (size_t t = 0; t < part.size(); t++) {
        for (size_t p = 0; p < head.plans.size(); p++) {
            const PlanFigures& f = part[t][p];
            const ProbePlan& plan = head.plans[p];
            rows.push_back(
                    {{"layer", head.layer},
                     {"kv_head", head.kv_head},
                     {"text", traces[t].text},
                     {"role", role},
                     {"method", name_of(plan)},
                     {"trained_share", plan.trained_share},
                     {"own_share", plan.own_share},
                     {"chosen", p == chosen},
                     {"mass_recall", f.recall},
                     {"output_error", f.output_error},
                     {"bytes_fraction", f.bytes},
                     {"far_mass", f.far_mass}});
        }
    }
}

void run(Options o) {
    PartitionSet set = read_partitions(o.partitions);
    PlanParams& params = o.params;
    params.sink = o.sink >= 0 ? o.sink : set.sink;
    params.window = o.window >= 0 ? o.window : set.window;
    params.check();
    const auto texts = read_traces(o.traces, set);
    const auto lookups = read_traces(o.lookups, set);
    const auto tests = read_traces(o.tests, set);
    const int64_t tokens = o.tokens ? o.tokens : texts[0].tokens;

    const auto wanted = [](const std::vector<int>& some, int x) {
        return some.empty() ||
                std::find(some.begin(), some.end(), x) != some.end();
    };
    std::vector<const TrainedPartition*> trained;
    for (const TrainedPartition& p : set.partitions) {
        if (wanted(o.layers, p.layer) && wanted(o.kv_heads, p.kv_head)) {
            trained.push_back(&p);
        }
    }
    FAISS_THROW_IF_NOT_FMT(
            !trained.empty(),
            "%s has no partition of these layers and KV heads",
            o.partitions.c_str());

    const auto nhead = static_cast<int64_t>(trained.size());
    std::vector<HeadResult> heads(nhead);
    std::exception_ptr error;
    {
        Progress progress("choosing", nhead);
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < nhead; i++) {
            try {
                HeadResult& head = heads[i];
                const TrainedPartition& p = *trained[i];
                head.layer = p.layer;
                head.kv_head = p.kv_head;
                head.plans = candidate_plans(p, tokens, params);
                const auto measure = [&](const std::vector<Trace>& traces,
                                         bool lookup) {
                    Measured measured;
                    for (const Trace& t : traces) {
                        measured.push_back(measure_plans(
                                t, p, head.plans, params, lookup));
                    }
                    return measured;
                };
                head.plans = spend_budget(head.plans, measure(texts, false));
                head.texts = measure(texts, false);
                head.lookups = measure(lookups, true);
                head.tests = measure(tests, false);
                head.chosen =
                        choose_plan(head.plans, head.texts, head.lookups);
                progress.advance();
            } catch (...) {
#pragma omp critical
                error = std::current_exception();
            }
        }
    }
    if (error) {
        std::rethrow_exception(error);
    }

    set.plans.clear();
    set.plan_texts.clear();
    for (const auto* traces : {&texts, &lookups}) {
        for (const Trace& t : *traces) {
            set.plan_texts.push_back(t.text);
        }
    }
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    for (const HeadResult& head : heads) {
        set.plans.push_back(head.chosen);
        const ProbePlan& p = head.chosen;
        table.push_back(
                {fmt::format("{}", p.layer),
                 fmt::format("{}", p.kv_head),
                 name_of(p),
                 fmt::format("{:.4f}", p.trained_share),
                 fmt::format("{:.4f}", p.own_share),
                 fmt::format("{:.3f}", p.recall),
                 fmt::format("{:.4f}", p.output_error)});
        add_rows(rows, head, head.texts, "text", texts);
        add_rows(rows, head, head.lookups, "lookup", lookups);
        add_rows(rows, head, head.tests, "test", tests);
    }
    if (!o.out.empty()) {
        write_partitions(set, o.out);
    }
    print_table(
            {"layer",
             "kv head",
             "plan",
             "trained",
             "own",
             "recall",
             "error"},
            table);
    report_part("texts chosen by", heads, &HeadResult::texts);
    report_part("lookups chosen by", heads, &HeadResult::lookups);
    report_part("other texts", heads, &HeadResult::tests);
    if (!o.json.empty()) {
        write_json(
                o.json,
                {{"plan_texts", set.plan_texts},
                 {"model", set.model},
                 {"byte_budget", params.byte_budget},
                 {"tokens", tokens},
                 {"sink", params.sink},
                 {"window", params.window},
                 {"prefill", params.prefill},
                 {"queries", params.queries},
                 {"asked", params.asked}},
                rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    PlanParams& p = o.params;
    CLI::App app{
            "Chooses what each KV head probes for a byte budget, by what it "
            "does on some texts: the trained cells by classifier, means or "
            "blend, cells of the sequence's own rotated keys, or both with a "
            "split of the budget. Prints the plans, and beside them the best "
            "choice per head in hindsight and each method for all heads."};
    add_input(app, "--trace", o.traces, "traces of texts to choose by")
            ->required()
            ->delimiter(',');
    add_input(
               app,
               "--lookup-trace",
               o.lookups,
               "traces of texts whose last tokens look something up, at which no "
               "plan may be worse than the classifier")
            ->delimiter(',');
    add_input(
               app,
               "--test-trace", o.tests, "traces of other texts, only measured")
            ->delimiter(',');
    add_input(app, "--partitions", o.partitions, "file of train_partitions")
            ->required();
    app.add_option(
               "--byte-budget",
               p.byte_budget,
               "what a token may read, index included, as a share of the keys "
               "and values")
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    add_output(app, "--out", o.out, "file for the partitions with their plans");
    app.add_option(
               "--layers", o.layers, "comma-separated; all of the file by default")
            ->delimiter(',');
    app.add_option(
               "--kv-heads",
               o.kv_heads,
               "comma-separated; all of the file by default")
            ->delimiter(',');
    app.add_option(
               "--tokens",
               o.tokens,
               "length of the texts that it is for; that of the first trace by "
               "default")
            ->check(CLI::Range(int64_t(1), int64_t(INT32_MAX)));
    app.add_option("--sink", o.sink, "first tokens, always read; as trained")
            ->check(CLI::NonNegativeNumber);
    app.add_option(
               "--window", o.window, "most recent tokens, always read; as trained")
            ->check(CLI::NonNegativeNumber);
    app.add_option(
               "--prefill",
               p.prefill,
               "share of a text that is there before its queries ask")
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    app.add_option("--queries", p.queries, "tokens of each text that ask")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--asked", p.asked, "last tokens of a lookup, which ask")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] { run(o); });
}
