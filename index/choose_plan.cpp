#include <faiss_saap/choose_plan.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cmath>
#include <numeric>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/LayerPlan.h>
#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include "check.h"

namespace faiss_saap {

namespace {

/// Bytes of one number of a key, a value or a representative: caches are of
/// two-byte types.
constexpr double kNumberBytes = 2;

/// Keys of a cell of content and segment, about, until they are counted.
constexpr int64_t kKeysPerSegmentedCell = 8;

/// Beside the scores, the counts of the cells are read.
double counted(double scoring, double ncell) {
    return scoring + ncell * sizeof(int32_t);
}

/// Queries are scored by one vector for each own cell.
double own_index_bytes(double ncell, int d) {
    return counted(ncell * d * kNumberBytes, ncell);
}

/// One KV head of a text as an adapter sees it.
struct Head {
    int64_t tokens;
    int d, group;
    std::vector<float> keys, values; ///< post-RoPE, size tokens * d
    std::vector<float> queries;      ///< post-RoPE, size tokens * group * d

    Head(const Trace& text, const TrainedPartition& trained)
            : tokens(text.tokens), d(text.d), group(text.group()) {
        FAISS_THROW_IF_NOT_FMT(
                text.rope == trained.partition.rope,
                "%s: the partition was trained for other RoPE parameters",
                text.text.c_str());
        const int at = text.kv_index(trained.kv_head);
        std::vector<int64_t> position(tokens);
        std::iota(position.begin(), position.end(), 0);
        const RotaryEmbedding rotary(text.rope);
        keys = text.keys(trained.layer, at);
        rotary.rotate(tokens, position.data(), keys.data());
        values = text.values(trained.layer, at);
        queries.resize(tokens * group * d);
        for (int g = 0; g < group; g++) {
            auto q = text.queries(trained.layer, at * group + g);
            rotary.rotate(tokens, position.data(), q.data());
            for (int64_t i = 0; i < tokens; i++) {
                std::copy_n(
                        q.data() + i * d,
                        d,
                        queries.data() + (i * group + g) * d);
            }
        }
    }

    KvView view(int64_t length) const {
        return KvView::token_major(
                keys.data(),
                values.data(),
                DType::float32,
                length,
                1,
                d,
                d);
    }
    double dense_bytes(double length) const {
        return 2 * kNumberBytes * length * d;
    }
};

/// What the plans of a head probe, each partition once. A plan is a split of
/// the far keys over these.
struct Sources {
    std::vector<ProbePlan> trained; ///< with other queries or segments
    std::vector<int> keys_per_cell;

    explicit Sources(const std::vector<ProbePlan>& plans) {
        for (const ProbePlan& p : plans) {
            p.check();
            if (p.trained != TrainedQuery::none &&
                std::none_of(trained.begin(), trained.end(), [&](auto& seen) {
                    return same_trained(seen, p);
                })) {
                trained.push_back(p);
            }
            if (p.keys_per_cell &&
                !std::count(
                        keys_per_cell.begin(),
                        keys_per_cell.end(),
                        p.keys_per_cell)) {
                keys_per_cell.push_back(p.keys_per_cell);
            }
        }
    }

    static bool same_trained(const ProbePlan& a, const ProbePlan& b) {
        return a.trained == b.trained && a.segment == b.segment;
    }

    std::vector<Partition> partitions(
            const TrainedPartition& from,
            const KvView& prefill,
            int64_t sink,
            const KMeansParams& kmeans) const {
        std::vector<Partition> all;
        for (const ProbePlan& plan : trained) {
            all.push_back(planned_partition(from, plan));
        }
        for (int keys : keys_per_cell) {
            const int64_t ncell = (prefill.length - sink) / keys;
            all.push_back(sequence_partitions(
                    prefill,
                    sink,
                    prefill.length,
                    static_cast<int>(std::clamp<int64_t>(ncell, 1, 65536)),
                    kmeans)[0][0]);
        }
        return all;
    }

    ProbePolicy policy(const ProbePlan& plan) const {
        ProbePolicy p;
        p.nprobe = 65536;
        p.head_split.emplace_back();
        for (const ProbePlan& other : trained) {
            p.head_split[0].push_back(
                    same_trained(other, plan) ? plan.trained_share : 0);
        }
        for (int keys : keys_per_cell) {
            p.head_split[0].push_back(
                    keys == plan.keys_per_cell ? plan.own_share : 0);
        }
        return p;
    }
};

/// Dense attention of one token's queries.
struct Truth {
    std::vector<float> output, lse; ///< over all keys
    std::vector<float> near;        ///< log-sum-exp over sink and window

    Truth(const Head& head, int64_t token, const PlanParams& params, float scale)
            : output(head.group * head.d),
              lse(head.group),
              near(head.group) {
        const KvView kv = head.view(token + 1);
        const float* q = head.queries.data() + token * head.group * head.d;
        std::vector<float> part(output.size()), part_lse(head.group),
                near_output(output.size());
        const auto attend = [&](int64_t begin, int64_t end, float* o, float* l) {
            attend_range(kv, 0, head.group, q, scale, begin, end, o, l);
        };
        attend(0, token + 1, output.data(), lse.data());
        attend(0, params.sink, near_output.data(), near.data());
        attend(token + 1 - params.window,
               token + 1,
               part.data(),
               part_lse.data());
        merge_states(
                head.group,
                head.d,
                near_output.data(),
                near.data(),
                part.data(),
                part_lse.data());
    }

    /// Mass of the far keys that an answer with this log-sum-exp has read.
    double far_mass(int g, float answer_lse) const {
        return std::max(
                0.0,
                std::exp(double(answer_lse) - lse[g]) -
                        std::exp(double(near[g]) - lse[g]));
    }
    double error(int g, int d, const float* answer) const {
        double difference = 0, norm = 0;
        for (int j = g * d; j < (g + 1) * d; j++) {
            const double e = double(answer[j]) - output[j];
            difference += e * e;
            norm += double(output[j]) * output[j];
        }
        return norm > 0 ? std::sqrt(difference / norm) : 0;
    }
};

/// Tokens that ask: the last ones, or some that are evenly spaced behind the
/// prefill.
std::vector<int64_t> asking(
        const Trace& text,
        const PlanParams& params,
        bool lookup) {
    const int64_t first = lookup
            ? text.tokens - params.asked
            : static_cast<int64_t>(params.prefill * text.tokens);
    // A token at `first` has far keys, and the prefill keys for cells.
    FAISS_THROW_IF_NOT_FMT(
            first > params.sink + params.window,
            "%s: of %" PRId64 " tokens, those from %" PRId64
            " on ask, but the first %" PRId64 " are sink and window",
            text.text.c_str(),
            text.tokens,
            std::max<int64_t>(first, 0),
            params.sink + params.window);
    const int64_t step = lookup
            ? 1
            : std::max<int64_t>(1, (text.tokens - first) / params.queries);
    std::vector<int64_t> at;
    for (int64_t i = first; i < text.tokens &&
         (lookup || static_cast<int>(at.size()) < params.queries);
         i += step) {
        at.push_back(i);
    }
    return at;
}

void check_figures(
        const std::vector<ProbePlan>& plans,
        const std::vector<std::vector<PlanFigures>>& texts) {
    FAISS_THROW_IF_NOT_MSG(!texts.empty(), "there are figures of no text");
    for (const auto& figures : texts) {
        FAISS_THROW_IF_NOT_FMT(
                figures.size() == plans.size(),
                "the figures of a text are for %zd plans, there are %zd",
                figures.size(),
                plans.size());
        for (size_t p = 0; p < plans.size(); p++) {
            const PlanFigures& f = figures[p];
            FAISS_THROW_IF_NOT_FMT(
                    std::isfinite(f.loss()) && std::isfinite(f.bytes) &&
                            std::isfinite(f.selectivity),
                    "the figures of plan %zd are not finite: recall %g, output_error %g, "
                    "bytes %g, selectivity %g",
                    p,
                    f.recall,
                    f.output_error,
                    f.bytes,
                    f.selectivity);
        }
    }
}

} // namespace

PlanFigures mean_figures(
        const std::vector<std::vector<PlanFigures>>& texts,
        size_t plan) {
    PlanFigures m;
    m.recall = 0;
    for (const auto& figures : texts) {
        const auto n = static_cast<double>(texts.size());
        FAISS_THROW_IF_NOT_FMT(
                plan < figures.size(),
                "plan = %zd, a text has figures of %zd",
                plan,
                figures.size());
        const PlanFigures& f = figures[plan];
        m.recall += f.recall / n;
        m.output_error += f.output_error / n;
        m.selectivity += f.selectivity / n;
        m.bytes += f.bytes / n;
        m.far_mass += f.far_mass / n;
    }
    return m;
}

void PlanParams::check() const {
    const auto require = [](bool holds, const char* sentence) {
        FAISS_THROW_IF_NOT_FMT(holds, "%s", sentence);
    };
    FAISS_THROW_IF_NOT_FMT(
            byte_budget > 0 && byte_budget <= 1,
            "byte_budget = %g must be above 0 and at most 1",
            byte_budget);
    FAISS_THROW_IF_NOT_FMT(
            prefill > 0 && prefill < 1,
            "prefill = %g must be between 0 and 1",
            prefill);
    require(sink >= 0 && sink <= INT32_MAX && window >= 0 && window <= INT32_MAX,
            "sink and window must be between 0 and 2^31 - 1");
    FAISS_THROW_IF_NOT_FMT(queries >= 1, "queries = %d must be at least 1", queries);
    FAISS_THROW_IF_NOT_FMT(
            asked >= 1, "asked = %" PRId64 " must be at least 1", asked);
    require(std::isfinite(scale) && scale >= 0, "scale must be positive, or 0");
    for (int keys : keys_per_cell) {
        FAISS_THROW_IF_NOT_FMT(
                keys >= 1, "keys_per_cell has %d: must be at least 1", keys);
    }
    for (int n : segments) {
        FAISS_THROW_IF_NOT_FMT(
                n >= 1, "segments has %d: must be at least 1", n);
    }
    for (double share : splits) {
        FAISS_THROW_IF_NOT_FMT(
                share > 0 && share < 1,
                "splits has %g: must be between 0 and 1",
                share);
    }
}

double scoring_bytes(const CellAssigner& query, int filled) {
    double as_stored = 0;
    if (const auto* c = dynamic_cast<const QueryClassifier*>(&query)) {
        as_stored = static_cast<double>(c->bytes_read());
    } else if (const auto* b = dynamic_cast<const BlendAssigner*>(&query)) {
        as_stored = static_cast<double>(b->classifier->bytes_read());
    }
    double other = static_cast<double>(query.bytes_read()) - as_stored;
    if (filled >= 0 && (query.needs & NEEDS_STATS)) {
        other *= static_cast<double>(filled) / query.ncell;
    }
    return as_stored + other * kNumberBytes / sizeof(float);
}

std::vector<ProbePlan> candidate_plans(
        const TrainedPartition& trained,
        int64_t tokens,
        const PlanParams& params) {
    params.check();
    FAISS_THROW_IF_NOT_FMT(
            tokens >= 1 && tokens <= INT32_MAX,
            "tokens = %" PRId64 " must be between 1 and 2^31 - 1",
            tokens);
    trained.partition.check();
    const int d = trained.partition.d();
    const double dense = 2 * kNumberBytes * static_cast<double>(tokens) * d;
    std::vector<ProbePlan> plans;
    double least = INFINITY;
    const auto try_plan = [&](TrainedQuery query,
                              int64_t segment,
                              int keys,
                              double split) {
        ProbePlan plan;
        plan.layer = trained.layer;
        plan.kv_head = trained.kv_head;
        plan.trained = query;
        plan.segment = segment;
        plan.keys_per_cell = keys;
        plan.tokens = tokens;
        plan.byte_budget = params.byte_budget;
        double index = 0;
        if (query != TrainedQuery::none) {
            const Partition p = planned_partition(trained, plan);
            // How many cells of segments are filled shows only on a text.
            const int filled = segment
                    ? static_cast<int>(std::min<int64_t>(
                              p.ncell(), tokens / kKeysPerSegmentedCell))
                    : p.ncell();
            index += counted(scoring_bytes(*p.query, filled), p.ncell());
        }
        if (keys) {
            index += own_index_bytes(double(tokens) / keys, d);
        }
        const double left = params.byte_budget - index / dense;
        least = std::min(least, index / dense);
        if (left <= 0) {
            return;
        }
        plan.trained_share = split * left;
        plan.own_share = (1 - split) * left;
        plans.push_back(plan);
    };
    std::vector<TrainedQuery> queries = {
            TrainedQuery::classifier, TrainedQuery::mean};
    if (!trained.blend.empty()) {
        queries.push_back(TrainedQuery::blend);
    }
    for (TrainedQuery query : queries) {
        try_plan(query, 0, 0, 1);
    }
    for (int n : params.segments) {
        try_plan(TrainedQuery::mean, (tokens + n - 1) / n, 0, 1);
    }
    for (int keys : params.keys_per_cell) {
        try_plan(TrainedQuery::none, 0, keys, 0);
        for (TrainedQuery query : queries) {
            for (double split : params.splits) {
                try_plan(query, 0, keys, split);
            }
        }
    }
    FAISS_THROW_IF_NOT_FMT(
            !plans.empty(),
            "byte_budget = %g leaves nothing for keys: the smallest index "
            "reads %g at %" PRId64 " tokens",
            params.byte_budget,
            least,
            tokens);
    return plans;
}

std::vector<PlanFigures> measure_plans(
        const Trace& text,
        const TrainedPartition& trained,
        const std::vector<ProbePlan>& plans,
        const PlanParams& params,
        bool lookup) {
    params.check();
    const std::vector<int64_t> tokens = asking(text, params, lookup);
    const Head head(text, trained);
    const int group = head.group, d = head.d;

    const Sources sources(plans);
    const KvView prefill = head.view(tokens[0]);
    const std::vector<Partition> partitions = sources.partitions(
            trained, prefill, params.sink, params.kmeans);
    AdapterParams about;
    about.heads_q = group;
    about.heads_kv = 1;
    about.d = d;
    about.sink = params.sink;
    about.window = params.window;
    about.scale = params.scale;
    about.dense_below = 0;
    AttentionAdapter adapter(about, HeadPartitions{partitions});
    const float scale = adapter.params().scale;
    const int64_t sequence = adapter.create();

    std::vector<ProbePolicy> policies;
    for (const ProbePlan& plan : plans) {
        policies.push_back(sources.policy(plan));
    }

    std::vector<PlanFigures> figures(plans.size());
    std::vector<double> far(group), read(plans.size() * group);
    std::vector<float> output(group * d), lse(group);
    std::vector<AttendStats> stats(group);
    AttendOutput out;
    out.output = output.data();
    out.lse = lse.data();
    out.stats = stats.data();
    for (int64_t token : tokens) {
        // Statistics of the cells must not know what comes after the query.
        SequenceInput in;
        in.sequence = sequence;
        in.kv = head.view(token + 1);
        adapter.append(sequence, in.kv);
        const Truth truth(head, token, params, scale);
        for (int g = 0; g < group; g++) {
            far[g] += truth.far_mass(g, truth.lse[g]);
        }
        for (size_t p = 0; p < plans.size(); p++) {
            adapter.attend(
                    {in},
                    head.queries.data() + token * group * d,
                    out,
                    &policies[p]);
            for (int g = 0; g < group; g++) {
                read[p * group + g] += truth.far_mass(g, lse[g]);
                figures[p].output_error += truth.error(g, d, output.data());
            }
            figures[p].selectivity += stats[0].selectivity();
        }
    }
    std::vector<double> index; // bytes of each partition, at the end
    for (size_t p = 0; p < partitions.size(); p++) {
        const CellLists& lists =
                adapter.lists(sequence, 0, static_cast<int>(p));
        int filled = 0;
        for (int c = 0; c < lists.ncell(); c++) {
            filled += lists.stats().count[c] > 0;
        }
        index.push_back(
                counted(scoring_bytes(*partitions[p].query, filled),
                        lists.ncell()));
    }
    const auto asked = static_cast<double>(tokens.size());
    for (size_t p = 0; p < plans.size(); p++) {
        PlanFigures& f = figures[p];
        f.recall = 0;
        for (int g = 0; g < group; g++) {
            f.recall += far[g] > 0 ? read[p * group + g] / far[g] / group
                                   : 1.0 / group;
            f.far_mass += far[g] / asked / group;
        }
        f.output_error /= asked * group;
        f.selectivity /= asked;
        double read_index = 0;
        for (size_t i = 0; i < partitions.size(); i++) {
            read_index += policies[p].head_split[0][i] > 0 ? index[i] : 0;
        }
        f.bytes = f.selectivity +
                read_index / head.dense_bytes(static_cast<double>(head.tokens));
    }
    return figures;
}

std::vector<ProbePlan> spend_budget(
        std::vector<ProbePlan> plans,
        const std::vector<std::vector<PlanFigures>>& texts) {
    check_figures(plans, texts);
    for (size_t p = 0; p < plans.size(); p++) {
        const PlanFigures f = mean_figures(texts, p);
        const double left = plans[p].byte_budget - (f.bytes - f.selectivity);
        const double shares = plans[p].trained_share + plans[p].own_share;
        if (left > 0 && f.selectivity > 0) {
            const double factor = std::min(left / f.selectivity, 1 / shares);
            plans[p].trained_share *= factor;
            plans[p].own_share *= factor;
        }
    }
    return plans;
}

ProbePlan choose_plan(
        const std::vector<ProbePlan>& plans,
        const std::vector<std::vector<PlanFigures>>& texts,
        const std::vector<std::vector<PlanFigures>>& lookups) {
    FAISS_THROW_IF_NOT_MSG(!plans.empty(), "plans is empty");
    check_figures(plans, texts);
    double bar = INFINITY; // loss on what is looked up
    if (!lookups.empty()) {
        check_figures(plans, lookups);
        for (size_t p = 0; p < plans.size(); p++) {
            if (plans[p].trained == TrainedQuery::classifier &&
                !plans[p].keys_per_cell) {
                bar = mean_figures(lookups, p).loss();
            }
        }
    }
    // By how far a plan exceeds the budget and the bar, then by loss.
    using Rank = std::array<double, 3>;
    size_t best = 0;
    Rank least = {INFINITY, INFINITY, INFINITY};
    for (size_t p = 0; p < plans.size(); p++) {
        const PlanFigures f = mean_figures(texts, p);
        const double above = f.bytes / plans[p].byte_budget - 1;
        const double worse =
                bar < INFINITY ? mean_figures(lookups, p).loss() - bar : 0;
        const Rank rank = {
                above > kBudgetTolerance ? above : 0, std::max(worse, 0.0), f.loss()};
        if (rank < least) {
            least = rank;
            best = p;
        }
    }
    ProbePlan plan = plans[best];
    const PlanFigures f = mean_figures(texts, best);
    plan.recall = f.recall;
    plan.output_error = f.output_error;
    return plan;
}

} // namespace faiss_saap
