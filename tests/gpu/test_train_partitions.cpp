#include <faiss_saap/gpu/train_partitions.h>

#include <cmath>
#include <fstream>
#include <iterator>

#include <faiss_saap/HeadTraining.h>
#include <faiss_saap/PartitionSet.h>

#include "../planted_trace.h"
#include "device_test.h"

namespace faiss_saap {
namespace {

using tests::PlantedTrace;

TrainingParams small_params() {
    TrainingParams p;
    p.ncell = 3 * PlantedTrace::kTopics;
    p.budget = .25;
    p.sink = PlantedTrace::sink;
    p.window = PlantedTrace::window;
    p.width = 32;
    p.steps = 300;
    p.batch = 37; // parts of 4 and 5 tokens
    p.warmup = 20;
    p.learning_rate = 5e-3f;
    p.evaluate_every = 50;
    p.held_out_queries = 64;
    return p;
}

TrainedPartition train(
        const std::vector<Trace>& texts,
        const TrainingParams& params,
        std::vector<TrainingState>* states = nullptr,
        const gpu::LayerCallback& callback = {},
        size_t text_bytes = 0,
        bool tf32 = true) {
    gpu::TrainingDevice device;
    device.text_bytes = text_bytes;
    device.tf32 = tf32;
    return gpu::train_partitions(
                   texts, PlantedTrace::layer, {6}, params, states, callback, device)
            .at(0);
}

std::string file_of(const std::vector<TrainedPartition>& partitions) {
    PartitionSet set;
    set.rope = partitions[0].partition.rope;
    set.partitions = partitions;
    const tests::TemporaryFile file;
    write_partitions(set, file.path);
    std::ifstream stream(file.path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
}

class GpuTraining : public tests::DeviceTest {};

TEST_F(GpuTraining, FindsPlantedMass) {
    tests::Random random;
    const TrainedPartition trained =
            train(tests::planted_texts(random, 3), small_params());
    ASSERT_EQ(trained.heads.size(), size_t(PlantedTrace::group));
    for (const HeldOut& h : trained.heads) {
        EXPECT_GE(h.recall, .99);
        EXPECT_GT(h.far_mass, .1);
    }
    EXPECT_EQ(trained.kv_head, 6);
    EXPECT_EQ(trained.blend.size(), size_t(PlantedTrace::group));
}

/// Loss and gradient of the output biases of the first mini-batch, in double
/// precision and from the definitions.
struct FirstStep {
    double loss = 0;
    std::vector<double> bias;
};

FirstStep first_step(
        const std::vector<PlantedTrace>& traces,
        const HeadTraining& training) {
    const ClassifierShape& shape = training.shape;
    const auto layers = classifier_layers(shape);
    const int d = shape.d, ncell = shape.ncell;
    const float* all = training.state.parameters.data();
    const auto apply = [&](const ClassifierLayer& l,
                           int head,
                           const std::vector<double>& x) {
        const int matrix = l.networks > 1 ? head : 0;
        const int of_bias = l.bias_networks > 1 ? head : 0;
        std::vector<double> y(l.rows);
        for (int r = 0; r < l.rows; r++) {
            y[r] = all[l.bias + of_bias * l.rows + r];
            for (int c = 0; c < l.cols; c++) {
                y[r] += double(all[l.weight +
                                   (int64_t(matrix) * l.rows + r) * l.cols + c]) *
                        x[c];
            }
        }
        return y;
    };
    FirstStep step;
    step.bias.resize(ncell);
    for (int part = 0; part < kTrainingParts; part++) {
        const TokensOfText drawn = training.draw(0, part);
        const PlantedTrace& trace = traces[drawn.text];
        const auto& cells = training.texts[drawn.text].cells;
        for (int64_t token : drawn.at) {
            for (int g = 0; g < shape.group; g++) {
                const float* pre =
                        trace.q.data() + (g * PlantedTrace::tokens + token) * d;
                std::vector<float> q(pre, pre + d);
                training.rotary.rotate(1, &token, q.data());
                std::vector<double> mass(ncell), count(ncell), x(d);
                double sum = 0, total = 0;
                for (int64_t j = 0; j <= token; j++) {
                    std::vector<float> k(
                            trace.k.begin() + j * d, trace.k.begin() + (j + 1) * d);
                    training.rotary.rotate(1, &j, k.data());
                    double dot = 0;
                    for (int i = 0; i < d; i++) {
                        dot += double(q[i]) * k[i];
                    }
                    const double w = std::exp(dot * training.scale);
                    sum += w;
                    if (j >= PlantedTrace::sink && j <= token - PlantedTrace::window) {
                        mass[cells[j]] += w;
                        count[cells[j]]++;
                    }
                }
                for (double& m : mass) {
                    m /= sum;
                    total += m;
                }
                for (int i = 0; i < d; i++) {
                    x[i] = (double(pre[i]) - training.mean[g * d + i]) *
                            training.factor[g * d + i];
                }
                auto h = apply(layers[0], g, x);
                for (double& unit : h) { // of the default network, which has no block
                    unit = std::max(unit, 0.0);
                }
                const auto z = apply(layers.back(), g, h);
                double norm = 0;
                for (int c = 0; c < ncell; c++) {
                    norm += count[c] * std::exp(z[c]);
                }
                const double weight =
                        std::pow(
                                total / training.far_mass[g],
                                training.params.mass_power) /
                        (training.params.batch * shape.group);
                for (int c = 0; c < ncell; c++) {
                    const double p = count[c] * std::exp(z[c]) / norm;
                    step.bias[c] += weight * (p - mass[c] / total);
                    step.loss -= mass[c] > 0
                            ? weight * mass[c] / total * std::log(p)
                            : 0;
                }
            }
        }
    }
    return step;
}

TEST_F(GpuTraining, FirstStepIsThatOfTheDefinitions) {
    tests::Random random;
    std::vector<PlantedTrace> traces;
    std::vector<Trace> texts;
    for (int t = 0; t < 3; t++) {
        traces.emplace_back(random, PlantedTrace::centres());
        for (float& q : traces.back().q) {
            q *= .1f; // mass in many cells
        }
        texts.push_back(traces.back().read());
    }
    auto params = small_params();
    params.steps = params.evaluate_every = 1;
    params.learning_rate = 0;
    params.blend = false;
    std::vector<TrainingState> states;
    train(texts, params, &states, {}, 0, false);
    HeadTraining training(texts, PlantedTrace::layer, 6, params, states[0]);
    training.begin();
    const FirstStep expected = first_step(traces, training);
    EXPECT_NEAR(states[0].loss, expected.loss, 1e-4 * expected.loss);
    const ClassifierLayer out = classifier_layers(training.shape).back();
    for (int c = 0; c < params.ncell; c++) {
        EXPECT_NEAR(states[0].first[out.bias + c] / .1, expected.bias[c], 2e-6) << c;
    }
}

TEST_F(GpuTraining, StepsAreThoseOfTheCpu) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 3);
    for (const bool share : {true, false}) {
        for (const int depth : {0, 2}) {
            auto params = small_params();
            params.share_trunk = share;
            params.depth = depth;
            params.share_input = share && depth == 0;
            params.steps = params.evaluate_every = 3;
            params.blend = false;
            TrainingState cpu;
            train_partition(texts, PlantedTrace::layer, 6, params, &cpu);
            // On the device, and read from the host.
            for (const size_t bytes : {size_t(0), size_t(1) << 19, size_t(1)}) {
                std::vector<TrainingState> device(1);
                device[0].centroids = cpu.centroids;
                train(texts, params, &device, {}, bytes, false);
                ASSERT_EQ(device[0].first.size(), cpu.first.size());
                float largest = 0;
                for (float g : cpu.first) {
                    largest = std::max(largest, std::fabs(g));
                }
                for (size_t i = 0; i < cpu.first.size(); i++) {
                    ASSERT_NEAR(device[0].first[i], cpu.first[i], 1e-4 * largest) << i;
                }
                EXPECT_NEAR(device[0].loss, cpu.loss, 1e-4 * cpu.loss);
                EXPECT_EQ(device[0].step, 3);
            }
        }
    }
}

TEST_F(GpuTraining, SameSeedSameFileWhereverTextsLie) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 3);
    auto params = small_params();
    params.steps = 40;
    params.evaluate_every = 15;
    const auto once = file_of({train(texts, params)});
    EXPECT_TRUE(once == file_of({train(texts, params)}));
    EXPECT_TRUE(once == file_of({train(texts, params, nullptr, {}, 1 << 19)}));
    params.seed++;
    EXPECT_FALSE(once == file_of({train(texts, params)}));
}

TEST_F(GpuTraining, ResumedEqualsUninterrupted) {
    tests::Random random;
    const auto texts = tests::planted_texts(random, 2);
    auto params = small_params();
    params.steps = 60;
    params.evaluate_every = 20;
    struct Interrupted {};
    std::vector<TrainingState> states;
    const auto interrupt = [](const std::vector<TrainingState>& s) {
        if (s.at(0).step == 40) {
            throw Interrupted();
        }
    };
    EXPECT_THROW(train(texts, params, &states, interrupt), Interrupted);
    auto resumed = states; // all of it is plain data
    int evaluations = 0;
    const auto partition =
            train(texts, params, &resumed, [&](const std::vector<TrainingState>& s) {
                EXPECT_EQ(s.at(0).step, 60);
                evaluations++;
            });
    EXPECT_EQ(evaluations, 1);
    EXPECT_TRUE(file_of({partition}) == file_of({train(texts, params)}));

    auto wrong = states;
    wrong[0].centroids.pop_back();
    EXPECT_SENTENCE(train(texts, params, &wrong), "centroids of");
    wrong = states;
    wrong[0].first.pop_back();
    EXPECT_SENTENCE(train(texts, params, &wrong), "training state holds");
    wrong.resize(2);
    EXPECT_SENTENCE(train(texts, params, &wrong), "2 states are not one for each");
}

TEST_F(GpuTraining, StopsWhenTheHeldOutTextGainsNoMore) {
    tests::Random random;
    auto params = small_params();
    params.steps = 100000;
    params.evaluate_every = 20;
    params.patience = 2;
    std::vector<TrainingState> states;
    const auto trained = train(tests::planted_texts(random, 2), params, &states);
    EXPECT_TRUE(states[0].finished);
    EXPECT_EQ(trained.steps, states[0].best_step);
    EXPECT_EQ(states[0].step, states[0].best_step + 40);
}

TEST_F(GpuTraining, OfASingleTextTheLastQuarterIsHeldOut) {
    tests::Random random;
    const auto trained = train(tests::planted_texts(random, 1), small_params());
    const int64_t far =
            PlantedTrace::tokens - PlantedTrace::sink - PlantedTrace::window;
    EXPECT_EQ(
            trained.balance.keys,
            PlantedTrace::tokens - far / 4 - PlantedTrace::sink);
    for (const HeldOut& h : trained.heads) {
        EXPECT_GE(h.recall, .99);
    }
}

TEST_F(GpuTraining, RecallsAsMuchAsTheCpuOnARealTrace) {
    const std::vector<Trace> texts = {Trace(tests::given_trace())};
    TrainingParams params;
    params.ncell = 256;
    params.width = 64;
    params.steps = 300;
    params.batch = 256;
    params.blend = false;
    for (const int layer : {9, 21}) {
        TrainingState cpu;
        const auto on_cpu = train_partition(texts, layer, 0, params, &cpu);
        // With the same cells, and with those of k-means on the device.
        std::vector<TrainingState> same(1), own;
        same[0].centroids = cpu.centroids;
        const auto with_same =
                gpu::train_partitions(texts, layer, {0}, params, &same).at(0);
        const auto with_own =
                gpu::train_partitions(texts, layer, {0}, params, &own).at(0);
        double sum[3] = {};
        for (size_t g = 0; g < on_cpu.heads.size(); g++) {
            const double recall[] = {
                    on_cpu.heads[g].recall,
                    with_same.heads[g].recall,
                    with_own.heads[g].recall};
            std::printf(
                    "layer %d, head %zd: recall %.4f on the CPU, %.4f on the "
                    "device, %.4f with its own cells (ceiling %.4f, %.4f)\n",
                    layer,
                    g,
                    recall[0],
                    recall[1],
                    recall[2],
                    on_cpu.heads[g].ceiling,
                    with_own.heads[g].ceiling);
            EXPECT_NEAR(on_cpu.heads[g].ceiling, with_same.heads[g].ceiling, 1e-3);
            for (int i = 0; i < 3; i++) {
                sum[i] += recall[i] / static_cast<double>(on_cpu.heads.size());
            }
        }
        EXPECT_NEAR(sum[1], sum[0], .005) << layer;
        EXPECT_NEAR(sum[2], sum[0], .02) << layer; // other cells
    }
}

TEST_F(GpuTraining, WrongInput) {
    tests::Random random;
    const PlantedTrace planted(random, PlantedTrace::centres());
    const std::vector<Trace> texts = {planted.read(), planted.read()};
    auto params = small_params();
    params.steps = 1;
    EXPECT_SENTENCE(train({}, params), "no texts");
    auto wide = params;
    wide.window = PlantedTrace::tokens;
    EXPECT_SENTENCE(train(texts, wide), "3072 tokens leave no far keys");
    auto cells = params;
    cells.ncell = 4000;
    EXPECT_SENTENCE(train(texts, cells), "ncell = 4000");
    PlantedTrace broken = planted;
    broken.k[77] = NAN;
    EXPECT_SENTENCE(train({texts[0], broken.read()}, params), "must be finite");
    gpu::TrainingDevice nowhere;
    nowhere.device = 99;
    EXPECT_SENTENCE(
            gpu::train_partitions(texts, 4, {6}, params, nullptr, {}, nowhere),
            "device = 99");
    EXPECT_SENTENCE(gpu::train_partitions(texts, 4, {0}, params), "KV head 0");
    EXPECT_TRUE(gpu::train_partitions(texts, 4, {}, params).empty());
}

} // namespace
} // namespace faiss_saap
