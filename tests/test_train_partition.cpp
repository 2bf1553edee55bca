#include <faiss_saap/train_partition.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include <omp.h>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/ProbePolicy.h>

#include "common.h"
#include "planted_trace.h"

namespace faiss_saap {
namespace {

using tests::PlantedTrace;

TrainingParams small_params() {
    TrainingParams p;
    // Enough for k-means to keep most topics apart; two that share a cell fit
    // into the budget.
    p.ncell = 3 * PlantedTrace::kTopics;
    p.budget = .25;
    p.sink = PlantedTrace::sink;
    p.window = PlantedTrace::window;
    p.width = 32;
    p.steps = 300;
    p.batch = 32;
    p.warmup = 20;
    p.learning_rate = 5e-3f;
    p.evaluate_every = 50;
    p.held_out_queries = 64;
    return p;
}

TrainedPartition train(
        const std::vector<Trace>& texts,
        const TrainingParams& params,
        TrainingState* state = nullptr,
        const TrainingCallback& callback = {}) {
    return train_partition(
            texts, PlantedTrace::layer, 6, params, state, callback);
}

std::string file_of(const TrainedPartition& p) {
    PartitionSet set;
    set.rope = p.partition.rope;
    set.partitions = {p};
    const tests::TemporaryFile file;
    write_partitions(set, file.path);
    std::ifstream stream(file.path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
}

/// Far keys of one query and their mass per cell, in double precision.
struct Truth {
    std::vector<int64_t> count;
    std::vector<double> mass;
    int64_t far = 0;
    double far_mass = 0;
};

Truth truth_of(
        const PlantedTrace& trace,
        const RopeParams& rope,
        const std::vector<int32_t>& cells,
        int ncell,
        int head,
        int64_t token) {
    const int d = PlantedTrace::d;
    const float* query =
            trace.q.data() + (head * PlantedTrace::tokens + token) * d;
    std::vector<float> q(query, query + d);
    const RotaryEmbedding rotary(rope);
    rotary.rotate(1, &token, q.data());
    Truth truth;
    truth.count.resize(ncell);
    truth.mass.resize(ncell);
    double sum = 0;
    for (int64_t j = 0; j <= token; j++) {
        std::vector<float> k(
                trace.k.begin() + j * d, trace.k.begin() + (j + 1) * d);
        rotary.rotate(1, &j, k.data());
        double dot = 0;
        for (int i = 0; i < d; i++) {
            dot += double(q[i]) * k[i];
        }
        const double w = std::exp(dot / std::sqrt(double(d)));
        sum += w;
        if (j >= PlantedTrace::sink && j <= token - PlantedTrace::window) {
            truth.mass[cells[j]] += w;
            truth.count[cells[j]]++;
            truth.far++;
        }
    }
    for (double& m : truth.mass) {
        m /= sum;
        truth.far_mass += m;
    }
    return truth;
}

std::vector<int32_t> cells_of(
        const TrainedPartition& trained,
        const PlantedTrace& trace) {
    RoutingInput keys;
    keys.n = PlantedTrace::tokens;
    keys.d = PlantedTrace::d;
    keys.pre_rope = trace.k.data();
    std::vector<int32_t> cells(PlantedTrace::tokens);
    trained.partition.key->assign(keys, nullptr, 1, cells.data(), nullptr);
    return cells;
}

TEST(TrainPartition, FindsPlantedMassThatSymmetricAssignmentMisses) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 3);
    const TrainedPartition trained = train(texts, small_params());
    ASSERT_EQ(trained.heads.size(), size_t(PlantedTrace::group));
    for (const HeldOut& h : trained.heads) {
        EXPECT_GE(h.recall, .99);
        EXPECT_GT(h.far_mass, .1);
    }
    EXPECT_EQ(trained.kv_head, 6);

    // A text of its own, evaluated without the trainer's code.
    const PlantedTrace unseen(random, PlantedTrace::centres());
    const auto cells = cells_of(trained, unseen);
    const int ncell = trained.partition.ncell();
    double read = 0, read_symmetric = 0, far = 0;
    for (int64_t token = 2400; token < PlantedTrace::tokens; token += 37) {
        for (int32_t head = 0; head < PlantedTrace::group; head++) {
            const Truth truth = truth_of(
                    unseen, texts[0].rope, cells, ncell, head, token);
            RoutingInput query;
            query.n = 1;
            query.d = PlantedTrace::d;
            query.pre_rope = unseen.q.data() +
                    (head * PlantedTrace::tokens + token) * PlantedTrace::d;
            query.head = &head;
            const auto mass_read = [&](const CellAssigner& assigner) {
                std::vector<float> scores(ncell);
                assigner.scores(query, nullptr, scores.data());
                double sum = 0;
                for (int32_t c : take_cells(
                             ncell,
                             scores.data(),
                             truth.count.data(),
                             ncell,
                             truth.far / 4,
                             false)) {
                    sum += truth.mass[c];
                }
                return sum;
            };
            read += mass_read(*trained.partition.query);
            read_symmetric += mass_read(*trained.partition.key);
            far += truth.far_mass;
        }
    }
    EXPECT_GE(read / far, .99);
    EXPECT_LE(read_symmetric / far, .1);
}

TEST(TrainPartition, BlendsComeAfterTheClassifier) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 2);
    auto params = small_params();
    const TrainedPartition with = train(texts, params);
    ASSERT_EQ(with.blend.size(), size_t(PlantedTrace::group));
    const Partition blended = with.blended();
    blended.check();
    EXPECT_TRUE(blended.query->needs & NEEDS_NEWEST_KEYS);
    EXPECT_EQ(blended.key, with.partition.key);
    params.blend = false;
    const TrainedPartition without = train(texts, params);
    EXPECT_TRUE(without.blend.empty());
    EXPECT_SENTENCE(without.blended(), "no weights of a blend");
    // The classifier is the same either way.
    TrainedPartition stripped = with;
    stripped.blend.clear();
    EXPECT_TRUE(file_of(stripped) == file_of(without));
}

TEST(TrainPartition, CentroidsInBfloat16TakeHalfTheFile) {
    tests::Random random;
    auto params = small_params();
    params.steps = 1;
    const auto texts = tests::planted_texts(random, 2);
    PartitionSet set;
    set.partitions = {train(texts, params)};
    set.rope = set.partitions[0].partition.rope;
    const tests::TemporaryFile file;
    write_partitions(set, file.path);
    EXPECT_EQ(
            SafetensorsFile(file.path).tensor("layer.4.kv.6.centroids").dtype,
            "BF16");
    const PartitionSet read = read_partitions(file.path);
    // What was trained and what is read put every key into the same cell.
    const PlantedTrace keys(random, PlantedTrace::centres());
    EXPECT_EQ(
            cells_of(set.partitions[0], keys),
            cells_of(read.partitions[0], keys));
    params.centroid_dtype = DType::float32;
    set.partitions = {train(texts, params)};
    write_partitions(set, file.path);
    EXPECT_EQ(
            SafetensorsFile(file.path).tensor("layer.4.kv.6.centroids").dtype,
            "F32");
}

TEST(TrainPartition, FarMassAndBalanceAreThoseOfTheDefinitions) {
    tests::Random random;
    const PlantedTrace a(random, PlantedTrace::centres());
    const PlantedTrace b(random, PlantedTrace::centres());
    auto params = small_params();
    params.steps = 1;
    const auto trained = train({a.read(), b.read()}, params);
    const auto held_out_cells = cells_of(trained, b);
    const int64_t begin = PlantedTrace::sink + PlantedTrace::window;
    const int64_t there = PlantedTrace::tokens - begin;
    for (int g = 0; g < PlantedTrace::group; g++) {
        double mass = 0;
        for (int64_t i = 0; i < params.held_out_queries; i++) {
            const int64_t token = begin + i * there / params.held_out_queries;
            mass += truth_of(b,
                             trained.partition.rope,
                             held_out_cells,
                             params.ncell,
                             g,
                             token)
                            .far_mass /
                    params.held_out_queries;
        }
        EXPECT_NEAR(trained.heads[g].far_mass, mass, 1e-4);
    }

    const auto cells = cells_of(trained, a);
    std::vector<int64_t> counts(params.ncell);
    double squares = 0;
    for (int64_t i = params.sink; i < PlantedTrace::tokens; i++) {
        counts[cells[i]]++;
    }
    for (int64_t c : counts) {
        squares += double(c) * c;
    }
    const double n = double(PlantedTrace::tokens - params.sink);
    EXPECT_EQ(trained.balance.keys, int64_t(n));
    EXPECT_EQ(
            trained.balance.largest,
            *std::max_element(counts.begin(), counts.end()));
    EXPECT_EQ(
            trained.balance.empty, std::count(counts.begin(), counts.end(), 0));
    EXPECT_NEAR(
            trained.balance.imbalance, squares * params.ncell / (n * n), 1e-6);
}

TEST(TrainPartition, SameSeedSameFileOnAnyNumberOfThreads) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 2);
    auto params = small_params();
    params.steps = 40;
    params.evaluate_every = 15;
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    const auto one = file_of(train(texts, params));
    omp_set_num_threads(3);
    const auto three = file_of(train(texts, params));
    omp_set_num_threads(threads);
    EXPECT_TRUE(one == three);
    params.seed++;
    EXPECT_FALSE(one == file_of(train(texts, params)));
}

TEST(TrainPartition, ResumedEqualsUninterrupted) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 2);
    auto params = small_params();
    params.steps = 60;
    params.evaluate_every = 20;
    struct Interrupted {};
    TrainingState state;
    const auto interrupt = [](const TrainingState& s) {
        if (s.step == 33) {
            throw Interrupted();
        }
    };
    EXPECT_THROW(train(texts, params, &state, interrupt), Interrupted);
    EXPECT_EQ(state.step, 33);
    const TrainingState saved = state; // all of it is plain data
    TrainingState resumed = saved;
    int64_t first = -1;
    const auto partition =
            train(texts, params, &resumed, [&](const TrainingState& s) {
                first = first < 0 ? s.step : first;
            });
    EXPECT_EQ(first, 34);
    EXPECT_TRUE(file_of(partition) == file_of(train(texts, params)));

    TrainingState wrong = saved;
    wrong.first.pop_back();
    EXPECT_SENTENCE(train(texts, params, &wrong), "training state holds");
    wrong = saved;
    wrong.centroids.pop_back();
    EXPECT_SENTENCE(train(texts, params, &wrong), "centroids of");
}

TEST(TrainPartition, StopsWhenTheHeldOutTextGainsNoMore) {
    tests::Random random;
    auto params = small_params();
    params.steps = 100000;
    params.evaluate_every = 20;
    params.patience = 2;
    TrainingState state;
    const auto trained = train(tests::planted_texts(random, 2), params, &state);
    EXPECT_LT(state.step, params.steps);
    EXPECT_TRUE(state.finished);
    EXPECT_EQ(trained.steps, state.best_step);
    EXPECT_EQ(state.step, state.best_step + 40);
}

TEST(TrainPartition, OfASingleTextTheLastQuarterIsHeldOut) {
    tests::Random random;
    auto params = small_params();
    const auto trained = train(tests::planted_texts(random, 1), params);
    // Keys of the held-out quarter are not among those of k-means.
    const int64_t far =
            PlantedTrace::tokens - PlantedTrace::sink - PlantedTrace::window;
    EXPECT_EQ(
            trained.balance.keys,
            PlantedTrace::tokens - far / 4 - PlantedTrace::sink);
    for (const HeldOut& h : trained.heads) {
        EXPECT_GE(h.recall, .99);
    }
}

TEST(TrainPartition, AHeadWithHardlyAnyFarMassIsTrainedAndTold) {
    tests::Random random;
    std::vector<Trace> texts;
    for (int t = 0; t < 2; t++) {
        PlantedTrace trace(random, PlantedTrace::centres());
        // Head 1 looks at itself: the key of its own token gets all its mass.
        for (int64_t i = 0; i < PlantedTrace::tokens * PlantedTrace::d; i++) {
            trace.q[PlantedTrace::tokens * PlantedTrace::d + i] =
                    200 * trace.k[i];
        }
        texts.push_back(trace.read());
    }
    const auto trained = train(texts, small_params());
    EXPECT_GE(trained.heads[0].recall, .99);
    EXPECT_LT(trained.heads[1].far_mass, kLittleFarMass);
    EXPECT_TRUE(std::isfinite(trained.heads[1].recall));
}

TEST(TrainPartition, WrongInput) {
    tests::Random random;
    const auto centres = PlantedTrace::centres();
    const PlantedTrace planted(random, centres);
    const std::vector<Trace> texts = {planted.read(), planted.read()};
    auto params = small_params();
    params.steps = 1;

    EXPECT_SENTENCE(train({}, params), "no texts");
    EXPECT_SENTENCE(
            train_partition(texts, 5, 6, params), "'planted' has no layer 5");
    EXPECT_SENTENCE(train_partition(texts, 4, 0, params), "KV head 0");
    auto half = params;
    half.dtype = DType::float16;
    EXPECT_SENTENCE(train(texts, half), "training: dtype = float16");
    auto wide = params;
    wide.window = PlantedTrace::tokens;
    EXPECT_SENTENCE(train(texts, wide), "3072 tokens leave no far keys");
    wide.window = PlantedTrace::tokens - PlantedTrace::sink;
    EXPECT_SENTENCE(train(texts, wide), "leave no far keys");
    wide.window -= 2; // far keys at two tokens only: no quarter of them
    EXPECT_SENTENCE(train({texts[0]}, wide), "too few to hold");
    auto cells = params;
    cells.ncell = 4000;
    EXPECT_SENTENCE(train(texts, cells), "ncell = 4000");

    PlantedTrace broken = planted;
    broken.k[77] = NAN;
    EXPECT_SENTENCE(train({texts[0], broken.read()}, params), "must be finite");
    broken = planted;
    broken.q[5000] = INFINITY;
    EXPECT_SENTENCE(train({broken.read(), texts[0]}, params), "must be finite");
    PlantedTrace other = planted;
    other.metadata["rope_scaling"] = "";
    EXPECT_SENTENCE(train({texts[0], other.read()}, params), "scaling ''");
    other = planted;
    other.metadata["model"] = "another";
    EXPECT_SENTENCE(train({texts[0], other.read()}, params), "'another'");

    const auto with = [&](auto change) {
        TrainingParams p = params;
        change(p);
        train(texts, p);
    };
    EXPECT_SENTENCE(with([](auto& p) { p.ncell = 0; }), "ncell = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.sink = -1; }), "sink = -1");
    EXPECT_SENTENCE(with([](auto& p) { p.window = int64_t(1) << 62; }), "window = 46");
    EXPECT_SENTENCE(with([](auto& p) { p.window = -1; }), "window = -1");
    EXPECT_SENTENCE(with([](auto& p) { p.steps = 0; }), "steps = 0");
    EXPECT_SENTENCE(
            with([](auto& p) { p.blend_queries = 0; }), "blend_queries = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.batch = 0; }), "batch = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.budget = 0; }), "budget = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.width = 0; }), "width = 0");
    EXPECT_SENTENCE(
            with([](auto& p) { p.learning_rate = NAN; }),
            "learning_rate = nan");
    EXPECT_SENTENCE(
            with([](auto& p) { p.dtype = DType::float16; }), "float16");
}

} // namespace
} // namespace faiss_saap
