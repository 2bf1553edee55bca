#include <faiss_saap/train_partition.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <utility>

#include <faiss_saap/HeadTraining.h>
#include <faiss_saap/classifier_loss.h>

#include "blas.h"
#include "check.h"
#include "classifier_kernels.h"
#include "parallel_for.h"

namespace faiss_saap {

namespace {

/// Mini-batches on the CPU: threads share its parts.
class CpuSteps {
   public:
    explicit CpuSteps(HeadTraining& training) : training_(training) {}

    void step() {
        TrainingState& state = training_.state;
        std::vector<double> losses(kTrainingParts);
        parallel_for(kTrainingParts, [&](int64_t part) {
            parts_[part].gradient.assign(state.parameters.size(), 0.0f);
            losses[part] = part_of_step(static_cast<int>(part));
        });
        const AdamWParams adamw = training_.adamw(state.step);
        constexpr int64_t kBlock = 16384;
        const auto size = static_cast<int64_t>(state.parameters.size());
        parallel_for((size + kBlock - 1) / kBlock, [&](int64_t block) {
            const int64_t begin = block * kBlock;
            const int64_t n = std::min(kBlock, size - begin);
            float* sum = parts_[0].gradient.data() + begin;
            for (int p = 1; p < kTrainingParts; p++) {
                const float* g = parts_[p].gradient.data() + begin;
                for (int64_t i = 0; i < n; i++) {
                    sum[i] += g[i];
                }
            }
            adamw_step(
                    n,
                    adamw,
                    sum,
                    state.parameters.data() + begin,
                    state.first.data() + begin,
                    state.second.data() + begin);
        });
        double loss = 0;
        for (double l : losses) {
            loss += l;
        }
        state.loss = state.step == 0 ? loss : .98 * state.loss + .02 * loss;
        state.step++;
    }

   private:
    struct Part {
        TargetBatch targets;
        std::vector<float> weight, gradient;
        ClassifierWorkspace workspace;
    };

    /// Draws tokens of one text and adds up their gradient.
    double part_of_step(int part) {
        const HeadTraining& t = training_;
        const TokensOfText drawn = t.draw(t.state.step, part);
        const auto n = static_cast<int64_t>(drawn.at.size());
        if (n == 0) {
            return 0;
        }
        const int d = t.shape.d, group = t.shape.group;
        Part& p = parts_[part];
        t.texts[drawn.text].targets(
                t.rotary, t.scale, t.shape.ncell, n, drawn.at.data(), p.targets);
        p.weight.resize(group * n);
        for (int g = 0; g < group; g++) {
            for (int64_t i = g * n; i < (g + 1) * n; i++) {
                float* x = p.targets.x.data() + i * d;
                for (int j = 0; j < d; j++) {
                    x[j] = (x[j] - t.mean[g * d + j]) * t.factor[g * d + j];
                }
                p.weight[i] = t.weight(g, p.targets.total[i]) /
                        (t.params.batch * group);
            }
        }
        ClassifierBatch batch;
        batch.n = n;
        batch.x = p.targets.x.data();
        batch.mass = p.targets.mass.data();
        batch.total = p.targets.total.data();
        batch.log_count = p.targets.log_count.data();
        batch.weight = p.weight.data();
        return classifier_loss(
                t.shape,
                t.state.parameters.data(),
                batch,
                p.gradient.data(),
                p.workspace);
    }

    HeadTraining& training_;
    Part parts_[kTrainingParts];
};

} // namespace

void TrainingParams::check() const {
    const auto at_least = [](const char* name, double value, double least) {
        FAISS_THROW_IF_NOT_FMT(
                value >= least && std::isfinite(value),
                "training: %s = %g must be at least %g",
                name,
                value,
                least);
    };
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= 65536,
            "training: ncell = %d must be between 1 and 65536",
            ncell);
    for (const auto& [name, tokens] : {std::pair("sink", sink), std::pair("window", window)}) {
        FAISS_THROW_IF_NOT_FMT(
                tokens >= 0 && tokens <= INT32_MAX,
                "training: %s = %" PRId64 " must be between 0 and 2^31 - 1",
                name,
                tokens);
    }
    at_least("scale", scale, 0);
    at_least("keys_per_cell", keys_per_cell, 1);
    at_least("steps", steps, 1);
    at_least("batch", batch, 1);
    at_least("warmup", warmup, 0);
    at_least("learning_rate", learning_rate, 0);
    at_least("weight_decay", weight_decay, 0);
    at_least("mass_power", mass_power, 0);
    at_least("held_out_queries", held_out_queries, 1);
    at_least("evaluate_every", evaluate_every, 1);
    at_least("patience", patience, 1);
    at_least("blend_queries", blend_queries, 1);
    FAISS_THROW_IF_NOT_FMT(
            budget > 0 && budget <= 1,
            "training: budget = %g must be above 0 and at most 1",
            budget);
    FAISS_THROW_IF_NOT_FMT(
            dtype == DType::float32 || dtype == DType::bfloat16,
            "training: dtype = %s must be float32 or bfloat16",
            name(dtype));
}

Partition TrainedPartition::blended() const {
    const auto classifier =
            std::dynamic_pointer_cast<const QueryClassifier>(partition.query);
    FAISS_THROW_IF_NOT_FMT(
            classifier && !blend.empty(),
            "the partition of layer %d, KV head %d has no weights of a blend",
            layer,
            kv_head);
    Partition p = partition;
    p.query = std::make_shared<BlendAssigner>(classifier, blend, scale);
    return p;
}

TrainedPartition train_partition(
        const std::vector<Trace>& texts,
        int layer,
        int kv_head,
        const TrainingParams& params,
        TrainingState* state,
        const TrainingCallback& callback) {
    TrainingState own;
    HeadTraining training(texts, layer, kv_head, params, state ? *state : own);
    if (training.state.centroids.empty()) {
        training.cluster();
    }
    training.begin();
    CpuSteps steps(training);
    const BlasOnOneThread one_thread;
    while (!training.finished()) {
        steps.step();
        if (training.evaluation_is_due()) {
            training.keep_the_best();
        }
        if (callback) {
            callback(training.state);
        }
    }
    return training.result();
}

} // namespace faiss_saap
