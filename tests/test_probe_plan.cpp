#include <faiss_saap/choose_plan.h>

#include <algorithm>
#include <numeric>
#include <set>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/LayerPlan.h>

#include "adapter_world.h"
#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 16, group = 2, layer = 3;
constexpr int64_t tokens = 700;

/// A text of two KV heads, and a partition of the second one's keys whose
/// classifier knows nothing.
struct Recorded {
    std::vector<float> q, k, v; ///< (heads, tokens, d), pre-RoPE

    explicit Recorded(tests::Random& random)
            : q(random.normal(2 * group * tokens * d, 2)),
              k(random.normal(2 * tokens * d, 2)),
              v(random.normal(2 * tokens * d)) {}

    Trace read() const {
        const tests::TemporaryFile file;
        const auto view = [](const std::vector<float>& x, int64_t heads) {
            TensorView t;
            t.dtype = "F32";
            t.shape = {heads, tokens, d};
            t.data = x.data();
            t.bytes = x.size() * sizeof(float);
            return t;
        };
        write_safetensors(
                file.path,
                {{"layer.3.q", view(q, 2 * group)},
                 {"layer.3.k", view(k, 2)},
                 {"layer.3.v", view(v, 2)}},
                {{"layers", "3"},
                 {"model", "random"},
                 {"text", "random"},
                 {"rope_theta", "10000"},
                 {"rope_layout", "half"},
                 {"rope_applied", "no"}});
        return Trace(file.path);
    }
};

TrainedPartition make_trained(
        tests::Random& random,
        const Trace& text,
        int kv_head,
        bool blend = true) {
    TrainedPartition p;
    p.layer = layer;
    p.kv_head = kv_head;
    const auto keys = text.keys(layer, kv_head);
    p.partition = kmeans_partition(
            tokens, d, keys.data(), 12, NEEDS_PRE_ROPE, {}, text.rope);
    ClassifierShape s;
    s.d = d;
    s.group = group;
    s.ncell = 12;
    s.width = 8;
    p.partition.query = std::make_shared<QueryClassifier>(
            s, random.normal(parameter_count(s)).data(), DType::float32);
    p.heads.resize(group);
    if (blend) {
        p.blend.resize(group);
        p.blend[1].mean = 1;
        p.scale = .25f;
    }
    return p;
}

PlanParams small_params() {
    PlanParams p;
    p.sink = 4;
    p.window = 60;
    p.queries = 9;
    p.asked = 5;
    p.keys_per_cell = {16};
    p.splits = {.5};
    p.segments = {3};
    return p;
}

ProbePlan make_plan(TrainedQuery trained, double share, int keys, double own) {
    ProbePlan p;
    p.layer = layer;
    p.kv_head = 1;
    p.trained = trained;
    p.trained_share = share;
    p.keys_per_cell = keys;
    p.own_share = own;
    p.tokens = tokens;
    p.byte_budget = .5;
    return p;
}

ProbePlan make_segments(int64_t segment, double share) {
    ProbePlan p = make_plan(TrainedQuery::mean, share, 0, 0);
    p.segment = segment;
    return p;
}

TEST(ProbePolicy, SharesOfEachHead) {
    ProbePolicy p;
    EXPECT_EQ(p.share(5, 0, 1), 1);
    EXPECT_EQ(p.share(5, 1, 2), .5);
    p.head_split = {{.1}, {.2, .3}};
    p.check();
    EXPECT_EQ(p.share(0, 0, 1), .1);
    EXPECT_EQ(p.share(1, 1, 2), .3);
    EXPECT_SENTENCE(p.share(0, 0, 2), "head_split[0] has 1 shares");
    EXPECT_SENTENCE(p.share(2, 0, 1), "for 2 KV heads, there is a KV head 2");
    // What an adapter calls that knows no shares of single heads.
    EXPECT_SENTENCE(p.share(0, 1), "head_split");
    p.head_split[1] = {.8, .3};
    EXPECT_SENTENCE(p.check(), "head_split[1] sums up to 1.1");
    p.head_split[1] = {-.5, .3};
    EXPECT_SENTENCE(p.check(), "head_split[1] has a share of -0.5");
}

TEST(ProbePlan, ChecksItsFields) {
    make_plan(TrainedQuery::mean, .1, 0, 0).check();
    EXPECT_SENTENCE(
            make_plan(TrainedQuery::mean, 1.1, 0, 0).check(),
            "layer 3, KV head 1: trained_share = 1.1");
    EXPECT_SENTENCE(
            make_plan(TrainedQuery::mean, .1, 16, NAN).check(), "own_share");
    EXPECT_SENTENCE(
            make_plan(TrainedQuery::mean, .6, 16, .6).check(), "sum up to 1.2");
    EXPECT_SENTENCE(
            make_plan(TrainedQuery::mean, .1, -1, 0).check(),
            "keys_per_cell = -1");
    EXPECT_SENTENCE(
            make_plan(TrainedQuery::none, .1, 0, .1).check(), "probes nothing");
    make_segments(100, .1).check();
    EXPECT_SENTENCE(make_segments(-1, .1).check(), "segment = -1");
    ProbePlan by_classifier = make_segments(100, .1);
    by_classifier.trained = TrainedQuery::classifier;
    EXPECT_SENTENCE(by_classifier.check(), "segments need means");
}

TEST(ProbePlan, FilesCarryPlans) {
    tests::Random random;
    const Trace text = Recorded(random).read();
    PartitionSet set;
    set.rope = text.rope;
    set.partitions = {
            make_trained(random, text, 0), make_trained(random, text, 1, false)};
    set.plans = {make_plan(TrainedQuery::classifier, 1. / 3, 32, .1)};
    set.plans[0].recall = .7;
    set.plans[0].output_error = .1 + .2;
    set.plan_texts = {"a", "b"};
    const tests::TemporaryFile file;
    write_partitions(set, file.path);
    const PartitionSet read = read_partitions(file.path);
    EXPECT_EQ(read.plan_texts, set.plan_texts);
    ASSERT_EQ(read.plans.size(), 1u);
    const ProbePlan& a = set.plans[0];
    const ProbePlan& b = read.find_plan(layer, 1);
    EXPECT_EQ(b.trained, a.trained);
    EXPECT_EQ(b.trained_share, a.trained_share);
    EXPECT_EQ(b.keys_per_cell, a.keys_per_cell);
    EXPECT_EQ(b.own_share, a.own_share);
    EXPECT_EQ(b.tokens, a.tokens);
    EXPECT_EQ(b.byte_budget, a.byte_budget);
    EXPECT_EQ(b.recall, a.recall);
    EXPECT_EQ(b.output_error, a.output_error);
    EXPECT_SENTENCE(read.find_plan(layer, 0), "no plan of layer 3, KV head 0");

    const tests::TemporaryFile refused;
    const auto refuses = [&](const ProbePlan& plan, const char* sentence) {
        PartitionSet bad = set;
        bad.plans.push_back(plan);
        EXPECT_SENTENCE(write_partitions(bad, refused.path), sentence);
        EXPECT_SENTENCE(read_partitions(refused.path), refused.path);
    };
    refuses(a, "two plans of layer 3, KV head 1");
    ProbePlan other = a;
    other.kv_head = 2;
    refuses(other, "no partition of layer 3, KV head 2");
    other = a;
    other.trained = TrainedQuery::blend;
    set.plans.clear();
    refuses(other, "is a blend, which was not trained");

    // What a file says is checked as well.
    SafetensorsFile content(file.path);
    const auto with = [&](const std::string& plans) {
        std::map<std::string, TensorView> tensors;
        for (const auto& [name, tensor] : content.tensors()) {
            tensors[name] = tensor;
        }
        auto metadata = content.metadata();
        metadata["plans"] = plans;
        write_safetensors(refused.path, tensors, metadata);
        return refused.path;
    };
    std::string plans = content.metadata().at("plans");
    EXPECT_SENTENCE(read_partitions(with("{}")), "plans is no list");
    EXPECT_SENTENCE(read_partitions(with("[{}]")), "'layer' is missing");
    const auto replaced = [&](const std::string& from, const std::string& to) {
        std::string text = plans;
        text.replace(text.find(from), from.size(), to);
        return text;
    };
    EXPECT_SENTENCE(
            read_partitions(with(replaced("classifier", "oracle"))),
            "no query assigner 'oracle'");
    EXPECT_SENTENCE(
            read_partitions(with(replaced("0.1", "7.5"))), "own_share = 7.5");
    EXPECT_SENTENCE(
            read_partitions(with(replaced("\"kv_head\":1", "\"kv_head\":7"))),
            "KV head 7");
}

TEST(LayerPlan, AnAdapterFollowsIt) {
    tests::Random random;
    const Trace text = Recorded(random).read();
    PartitionSet set;
    set.rope = text.rope;
    set.partitions = {
            make_trained(random, text, 0), make_trained(random, text, 1)};
    EXPECT_SENTENCE(LayerPlan(set, layer, 2), "no plan of layer 3, KV head 0");
    set.plans = {
            make_plan(TrainedQuery::none, 0, 20, .15),
            make_plan(TrainedQuery::mean, .2, 40, .1)};
    set.plans[0].kv_head = 0;
    const LayerPlan plan(set, layer, 2);
    EXPECT_EQ(plan.trained[0].size(), 0u);
    EXPECT_EQ(plan.trained[1].size(), 1u);
    EXPECT_EQ(
            plan.policy.head_split,
            (std::vector<std::vector<double>>{{.15}, {.2, .1}}));

    const tests::World world(random, 2 * group, 2, d, tokens, 5, NEEDS_POST_ROPE);
    AdapterParams params = world.params(4, 60);
    params.policy = plan.policy;
    AttentionAdapter adapter(params, plan.trained);
    EXPECT_SENTENCE(adapter.create(), "KV head 0 has no partition");
    EXPECT_SENTENCE(
            plan.own(KvView::token_major(
                             world.k.data(),
                             world.v.data(),
                             DType::float32,
                             tokens,
                             1,
                             d,
                             d),
                     4,
                     tokens),
            "the view has 1 KV heads, the plan 2");
    const int64_t prefill = 404;
    const auto own = plan.own(world.view(prefill), 4, prefill);
    EXPECT_EQ(own[0][0].ncell(), 20);
    EXPECT_EQ(own[1][0].ncell(), 10);
    const int64_t s = adapter.create(own);
    EXPECT_EQ(adapter.npartition(s, 0), 1);
    EXPECT_EQ(adapter.npartition(s, 1), 2);
    adapter.append(s, world.view(tokens));

    const ProbedCells probed =
            adapter.route({{s, world.view(tokens)}}, world.queries(tokens - 1));
    std::vector<float> out(2 * group * d), lse(2 * group);
    std::vector<AttendStats> stats(2 * group);
    adapter.attend(
            {{s, world.view(tokens)}},
            world.queries(tokens - 1),
            {out.data(), lse.data(), stats.data()});
    for (int h = 0; h < 2; h++) {
        const int first = h ? 12 : 20; // cells of the head's first partition
        std::vector<int64_t> keys(2), cells(2);
        std::set<int32_t> slots;
        for (int64_t i = probed.begin[h]; i < probed.begin[h + 1]; i++) {
            const int c = probed.cells[i], part = c >= first;
            const auto list = adapter.lists(s, h, part).slots(c - part * first);
            keys[part] += static_cast<int64_t>(list.size());
            cells[part]++;
            slots.insert(list.begin(), list.end());
        }
        const int64_t far = tokens - 64;
        EXPECT_GT(keys[0], 0);
        if (keys[0] > (h ? .2 : .15) * far) { // a single cell is read even so
            EXPECT_EQ(cells[0], 1);
        }
        EXPECT_LE(keys[1], (h ? .1 : 0) * far);
        EXPECT_EQ(keys[1] > 0, h == 1);
        // Output and LSE are of exactly these, sink and window.
        for (int g = h * group; g < (h + 1) * group; g++) {
            EXPECT_EQ(stats[g].keys_read, static_cast<int64_t>(slots.size()));
            std::vector<double> expected;
            double expected_lse;
            world.reference(
                    tokens - 1,
                    g,
                    [&](int64_t j) {
                        return j < 4 || j > tokens - 1 - 60 || slots.count(j);
                    },
                    expected,
                    expected_lse);
            EXPECT_LT(
                    tests::relative_error(out.data() + g * d, expected), 1e-5);
            EXPECT_NEAR(lse[g], expected_lse, 1e-4);
        }
    }
    // Cells of segments: in bulk as token by token, taken back, and in a file.
    set.plans[1] = make_segments(300, .2);
    const LayerPlan cut(set, layer, 2);
    params.policy = cut.policy;
    AttentionAdapter segmented(params, cut.trained);
    const auto own_again = cut.own(world.view(prefill), 4, prefill);
    const int64_t a = segmented.create(own_again), b = segmented.create(own_again);
    EXPECT_EQ(segmented.lists(a, 1).ncell(), 3 * 12);
    segmented.append(a, world.view(tokens));
    for (int64_t n = 1; n <= tokens; n++) {
        segmented.append(b, world.view(n));
    }
    tests::expect_same_state(segmented, a, b);
    segmented.truncate(a, 350, world.view(350));
    segmented.append(a, world.view(tokens));
    tests::expect_same_state(segmented, a, b);
    const tests::TemporaryFile saved;
    segmented.save(a, saved.path);
    tests::expect_same_state(segmented, segmented.load(saved.path), b);

    // A sequence with fewer keys than a cell should have gets one cell.
    EXPECT_EQ(plan.own(world.view(9), 4, 9)[0][0].ncell(), 1);
}

TEST(MeasurePlans, AgreesWithTheDefinitions) {
    tests::Random random;
    const Recorded recorded(random);
    const Trace text = recorded.read();
    const TrainedPartition trained = make_trained(random, text, 1);
    PlanParams params = small_params();
    const std::vector<ProbePlan> plans = {
            make_plan(TrainedQuery::classifier, .3, 0, 0),
            make_plan(TrainedQuery::mean, 1, 0, 0),
            make_plan(TrainedQuery::none, 0, 16, .2),
            make_plan(TrainedQuery::mean, .2, 16, .2),
            make_segments(200, 1)};
    const auto figures = measure_plans(text, trained, plans, params);
    ASSERT_EQ(figures.size(), plans.size());
    // All cells: dense attention, and the index on top.
    EXPECT_NEAR(figures[1].recall, 1, 1e-5);
    EXPECT_NEAR(figures[1].output_error, 0, 1e-5);
    EXPECT_EQ(figures[1].selectivity, 1);
    const double dense = 2. * 2 * tokens * d;
    const double own_cells = (tokens / 2 - 4) / 16;
    EXPECT_NEAR(
            figures[2].bytes - figures[2].selectivity,
            own_cells * (2 * d + 4) / dense,
            1e-12);

    // Cells of four segments.
    EXPECT_NEAR(figures[4].recall, 1, 1e-5);
    EXPECT_NEAR(figures[4].output_error, 0, 1e-5);
    EXPECT_GT(figures[4].bytes, 1 + 12 * 4 * 4 / dense);
    EXPECT_LE(figures[4].bytes, 1 + 12 * 4 * (2 * d + 2 + 4) / dense);

    // The classifier's plan once more, in double precision and cell by cell.
    std::vector<int64_t> position(tokens);
    std::iota(position.begin(), position.end(), 0);
    const RotaryEmbedding rotary(text.rope);
    const auto keys_pre = text.keys(layer, 1);
    auto keys = keys_pre;
    rotary.rotate(tokens, position.data(), keys.data());
    const auto values = text.values(layer, 1);
    std::vector<int32_t> cells(tokens);
    RoutingInput input;
    input.n = tokens;
    input.d = d;
    input.pre_rope = keys_pre.data();
    trained.partition.key->assign(input, nullptr, 1, cells.data(), nullptr);
    const double scale = 1 / std::sqrt(double(d));
    std::vector<double> read(group), far_mass(group);
    double error = 0, selectivity = 0;
    int64_t filled = 0; // cells, when the last token asks
    const int asking = 9;
    for (int t = 0; t < asking; t++) {
        const int64_t token = tokens / 2 + t * (tokens / 2 / asking);
        const int64_t end = token + 1 - params.window;
        std::vector<int64_t> counts(12);
        for (int64_t j = params.sink; j < end; j++) {
            counts[cells[j]]++;
        }
        filled = 12 - std::count(counts.begin(), counts.end(), 0);
        std::vector<float> scores(group * 12), shared(12), query(group * d);
        const std::vector<int32_t> heads = {0, 1};
        std::vector<std::vector<float>> rotated;
        for (int g = 0; g < group; g++) {
            const float* q =
                    recorded.q.data() + ((group + g) * tokens + token) * d;
            std::copy_n(q, d, query.data() + g * d);
            rotated.emplace_back(q, q + d);
            rotary.rotate(1, &token, rotated.back().data());
        }
        RoutingInput asked;
        asked.n = group;
        asked.d = d;
        asked.pre_rope = query.data();
        asked.head = heads.data();
        trained.partition.query->scores(asked, nullptr, scores.data());
        share_scores(
                group,
                12,
                scores.data(),
                counts.data(),
                static_cast<float>(scale),
                shared.data());
        const auto taken = take_cells(
                12,
                shared.data(),
                counts.data(),
                12,
                static_cast<int64_t>(.3 * (end - params.sink) + 1e-9),
                true);
        for (int g = 0; g < group; g++) {
            std::vector<double> dense_out(d), out(d);
            double dense_sum = 0, sum = 0, far = 0, far_read = 0;
            int64_t keys_read = 0;
            for (int64_t j = 0; j <= token; j++) {
                double s = 0;
                for (int i = 0; i < d; i++) {
                    s += double(rotated[g][i]) * keys[j * d + i];
                }
                const double w = std::exp(s * scale);
                const bool is_far = j >= params.sink && j < end;
                const bool is_read = !is_far ||
                        std::count(taken.begin(), taken.end(), cells[j]);
                keys_read += is_far && is_read;
                dense_sum += w;
                far += is_far ? w : 0;
                far_read += is_far && is_read ? w : 0;
                sum += is_read ? w : 0;
                for (int i = 0; i < d; i++) {
                    dense_out[i] += w * values[j * d + i];
                    out[i] += is_read ? w * values[j * d + i] : 0;
                }
            }
            read[g] += far_read / dense_sum;
            far_mass[g] += far / dense_sum;
            double difference = 0, norm = 0;
            for (int i = 0; i < d; i++) {
                const double o = dense_out[i] / dense_sum;
                difference += std::pow(out[i] / sum - o, 2);
                norm += o * o;
            }
            error += std::sqrt(difference / norm) / (asking * group);
            selectivity +=
                    double(keys_read) / (end - params.sink) / (asking * group);
        }
    }
    // Means of the cells that have keys, numbers of keys of all.
    EXPECT_NEAR(
            figures[1].bytes - 1, (filled * (2 * d + 2) + 12 * 4) / dense, 1e-12);
    EXPECT_NEAR(
            figures[0].recall,
            (read[0] / far_mass[0] + read[1] / far_mass[1]) / 2,
            1e-4);
    EXPECT_NEAR(figures[0].output_error, error, 1e-4);
    EXPECT_NEAR(figures[0].selectivity, selectivity, 1e-9);
    EXPECT_NEAR(
            figures[0].far_mass,
            (far_mass[0] + far_mass[1]) / (2 * asking),
            1e-4);

    // The last tokens of a lookup ask, and own cells know all before them.
    const auto lookups = measure_plans(text, trained, plans, params, true);
    EXPECT_NEAR(
            lookups[2].bytes - lookups[2].selectivity,
            int((tokens - 5 - 4) / 16) * (2 * d + 4) / dense,
            1e-12);

    params.window = 400;
    EXPECT_SENTENCE(
            measure_plans(text, trained, plans, params),
            "random: of 700 tokens, those from 350 on ask, but the first 404");
    params = small_params();
    params.asked = 700;
    EXPECT_SENTENCE(
            measure_plans(text, trained, plans, params, true),
            "those from 0 on ask");
    TrainedPartition elsewhere = trained;
    elsewhere.partition.rope.theta = 5;
    EXPECT_SENTENCE(
            measure_plans(text, elsewhere, plans, small_params()),
            "other RoPE parameters");
}

TEST(CandidatePlans, SpendTheBudget) {
    tests::Random random;
    const Trace text = Recorded(random).read();
    const TrainedPartition trained = make_trained(random, text, 1);
    PlanParams params = small_params();
    params.byte_budget = .4;
    const auto plans = candidate_plans(trained, tokens, params);
    EXPECT_EQ(plans.size(), 3u + 1 + 1 + 3); // alone, segments, own, both
    for (const ProbePlan& p : plans) {
        p.check();
        EXPECT_GT(p.trained_share + p.own_share, 0);
        EXPECT_LT(p.trained_share + p.own_share, .4);
        EXPECT_EQ(p.trained == TrainedQuery::none, p.trained_share == 0);
        EXPECT_EQ(p.keys_per_cell == 0, p.own_share == 0);
    }
    EXPECT_EQ(
            candidate_plans(make_trained(random, text, 1, false), tokens, params)
                    .size(),
            2u + 1 + 1 + 2);
    const auto first = measure_plans(text, trained, plans, params);
    const auto spent = spend_budget(plans, {first});
    const auto second = measure_plans(text, trained, spent, params);
    double before = 0, after = 0;
    for (size_t p = 0; p < plans.size(); p++) {
        before += std::abs(first[p].bytes - .4);
        after += std::abs(second[p].bytes - .4);
    }
    EXPECT_LT(after, before);

    params.byte_budget = 1e-4;
    EXPECT_SENTENCE(
            candidate_plans(trained, tokens, params),
            "byte_budget = 0.0001 leaves nothing for keys");
    params.byte_budget = 0;
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "byte_budget = 0");
    params = small_params();
    params.keys_per_cell = {0};
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "keys_per_cell");
    params = small_params();
    params.segments = {0};
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "segments has 0");
    params = small_params();
    params.splits = {1};
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "splits has 1");
    params = small_params();
    params.prefill = 1;
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "prefill = 1");
    params = small_params();
    params.asked = 0;
    EXPECT_SENTENCE(candidate_plans(trained, tokens, params), "asked = 0");
    EXPECT_SENTENCE(
            candidate_plans(TrainedPartition(), tokens, small_params()), "no key assigner");
    EXPECT_SENTENCE(
            candidate_plans(trained, INT64_MAX, small_params()), "tokens = 9223372036854775807");
    EXPECT_SENTENCE(
            planned_partition(TrainedPartition(), make_plan(TrainedQuery::mean, .1, 0, 0)),
            "no key assigner");
    EXPECT_SENTENCE(mean_figures({{}, {}}, 3), "plan = 3, a text has figures of 0");
}

TEST(ChoosePlan, TakesTheLeastLossWithinTheBudget) {
    const std::vector<ProbePlan> plans = {
            make_plan(TrainedQuery::mean, .1, 0, 0),
            make_plan(TrainedQuery::classifier, .1, 0, 0),
            make_plan(TrainedQuery::none, 0, 16, .1)};
    const auto figures = [](double recall, double error, double bytes) {
        PlanFigures f;
        f.recall = recall;
        f.output_error = error;
        f.bytes = bytes;
        return f;
    };
    using Figures = std::vector<std::vector<PlanFigures>>;
    const Figures texts = {
            {figures(.5, .3, .5), figures(.7, .3, .5), figures(.9, .2, .5)},
            {figures(.8, .1, .5), figures(.8, .2, .5), figures(.7, .1, .5)}};
    ProbePlan best = choose_plan(plans, texts);
    EXPECT_EQ(best.keys_per_cell, 16);
    EXPECT_NEAR(best.recall, .8, 1e-12);
    EXPECT_NEAR(best.output_error, .15, 1e-12);
    // A head that looks things up: own cells are worse at it than the
    // classifier, the means are as good but worse on the texts.
    const Figures lookups = {
            {figures(.96, .1, .5), figures(.95, .1, .5), figures(.9, .2, .5)}};
    EXPECT_EQ(
            choose_plan(plans, texts, lookups).trained,
            TrainedQuery::classifier);
    Figures harder = lookups;
    harder[0][1].recall = .5;
    EXPECT_EQ(choose_plan(plans, texts, harder).keys_per_cell, 16);
    // Without a classifier there is no bar.
    std::vector<ProbePlan> others = plans;
    others[1].trained = TrainedQuery::blend;
    EXPECT_EQ(choose_plan(others, texts, lookups).keys_per_cell, 16);
    // What reads more than its budget comes last, however good.
    Figures above = texts;
    above[0][2].bytes = .53;
    EXPECT_EQ(choose_plan(plans, above).trained, TrainedQuery::classifier);
    above[0][2].bytes = .51;
    EXPECT_EQ(choose_plan(plans, above).keys_per_cell, 16);

    EXPECT_SENTENCE(choose_plan({}, texts), "plans is empty");
    EXPECT_SENTENCE(choose_plan(plans, {}), "figures of no text");
    Figures wrong = texts;
    wrong[1][0].recall = NAN;
    EXPECT_SENTENCE(choose_plan(plans, wrong), "plan 0 are not finite: recall nan");
    above[1].pop_back();
    EXPECT_SENTENCE(choose_plan(plans, above), "for 2 plans, there are 3");
}

} // namespace
} // namespace faiss_saap
