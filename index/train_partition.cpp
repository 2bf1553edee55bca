#include <faiss_saap/train_partition.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include <faiss/IndexFlat.h>
#include <faiss/utils/utils.h>

#include <faiss_saap/CellLists.h>
#include <faiss_saap/ProbePolicy.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/classifier_loss.h>

#include "TrainingText.h"
#include "blas.h"
#include "check.h"
#include "classifier_kernels.h"
#include "parallel_for.h"

namespace faiss_saap {

namespace {

/// Parts of a mini-batch, each drawn from one text: what threads share. Their
/// number is fixed, so that sums do not depend on that of the threads.
constexpr int kParts = 8;

/// Random numbers that depend on where they are used, so that a resumed
/// training draws what an uninterrupted one would.
std::mt19937_64 random_at(
        const TrainingParams& params,
        int layer,
        int kv_head,
        int64_t step,
        int part) {
    std::seed_seq seed{
            int64_t(params.seed), int64_t(layer), int64_t(kv_head), step,
            int64_t(part)};
    return std::mt19937_64(seed);
}

void check_together(
        const std::vector<Trace>& texts,
        int layer,
        int kv_head) {
    FAISS_THROW_IF_NOT_MSG(!texts.empty(), "there are no texts to train on");
    const Trace& first = texts.front();
    for (const Trace& t : texts) {
        const char* name = t.text.c_str();
        FAISS_THROW_IF_NOT_FMT(
                t.d == first.d && t.group() == first.group(),
                "text '%s': head dimension %d and %d query heads per KV head, "
                "text '%s' has %d and %d",
                name,
                t.d,
                t.group(),
                first.text.c_str(),
                first.d,
                first.group());
        FAISS_THROW_IF_NOT_FMT(
                t.model == first.model,
                "text '%s' was recorded with model '%s', text '%s' with '%s'",
                name,
                t.model.c_str(),
                first.text.c_str(),
                first.model.c_str());
        FAISS_THROW_IF_NOT_FMT(
                t.rope == first.rope,
                "text '%s': RoPE theta %g, scaling '%s'; text '%s' has %g, "
                "'%s'",
                name,
                t.rope.theta,
                t.rope.scaling_text().c_str(),
                first.text.c_str(),
                first.rope.theta,
                first.rope.scaling_text().c_str());
        FAISS_THROW_IF_NOT_FMT(
                std::count(t.layers.begin(), t.layers.end(), layer),
                "text '%s' has no layer %d",
                name,
                layer);
        t.kv_index(kv_head);
    }
}

class Training {
   public:
    Training(
            const std::vector<Trace>& traces,
            int layer,
            int kv_head,
            const TrainingParams& params,
            TrainingState& state)
            : params_(params),
              layer_(layer),
              kv_head_(kv_head),
              rope_(traces.front().rope),
              rotary_(rope_),
              scale_(params.scale > 0
                             ? params.scale
                             : 1 / std::sqrt(
                                       static_cast<float>(traces[0].d))),
              state_(state) {
        shape_.d = traces.front().d;
        shape_.group = traces.front().group();
        shape_.ncell = params.ncell;
        shape_.width = params.width;
        shape_.depth = params.depth;
        shape_.share_trunk = params.share_trunk;
        shape_.check();
        for (const Trace& t : traces) {
            texts_.emplace_back(t, layer, kv_head, params.sink, params.window);
        }
        split();
        standardise();
        if (state_.centroids.empty()) {
            cluster();
        }
        key_ = centroid_assigner();
        for (TrainingText& text : texts_) {
            text.assign_cells(*key_);
        }
        held_out_ = std::make_unique<TargetBatch>();
        held_out_targets();
        if (state_.parameters.empty()) {
            initialise();
        }
        const auto size = static_cast<size_t>(parameter_count(shape_));
        for (const auto* x :
             {&state_.parameters, &state_.first, &state_.second, &state_.best}) {
            FAISS_THROW_IF_NOT_FMT(
                    x->size() == size,
                    "the training state holds %zd parameters, this network "
                    "has %zd",
                    x->size(),
                    size);
        }
    }

    void run(const TrainingCallback& callback) {
        const BlasOnOneThread one_thread;
        while (!state_.finished && state_.step < params_.steps) {
            step();
            if (state_.step % params_.evaluate_every == 0 ||
                state_.step == params_.steps) {
                keep_the_best();
            }
            if (callback) {
                callback(state_);
            }
        }
    }

    TrainedPartition result() const {
        TrainedPartition r;
        r.layer = layer_;
        r.kv_head = kv_head_;
        r.partition.rope = rope_;
        r.partition.key = key_;
        const auto classifier = folded(state_.best);
        r.partition.query = classifier;
        r.balance = balance();
        r.heads = evaluate(*classifier);
        r.steps = state_.best_step;
        r.scale = scale_;
        if (params_.blend) {
            r.blend = blend(classifier);
        }
        return r;
    }

   private:
    /// The last text is held out, or the last quarter of a single one.
    void split() {
        TrainingText& last = texts_.back();
        training_texts_ = static_cast<int>(texts_.size()) - 1;
        held_out_begin_ = last.begin;
        if (training_texts_ == 0) {
            training_texts_ = 1;
            held_out_begin_ = last.end - (last.end - last.begin) / 4;
            last.end = held_out_begin_;
            FAISS_THROW_IF_NOT_FMT(
                    last.begin < last.end && held_out_begin_ < last.tokens,
                    "text '%s': %" PRId64 " tokens with far keys are too few "
                    "to hold a quarter of them out",
                    last.name.c_str(),
                    last.tokens - last.begin);
        }
    }

    /// Mean and deviation of each component of each head's queries: the
    /// network is trained on standardised queries, at one learning rate.
    void standardise() {
        const int d = shape_.d, group = shape_.group;
        std::vector<double> sum(group * d), square(group * d);
        double n = 0;
        for (int t = 0; t < training_texts_; t++) {
            const TrainingText& text = texts_[t];
            for (int64_t i = text.begin; i < text.end; i++) {
                const float* q = text.queries.data() + i * group * d;
                for (int j = 0; j < group * d; j++) {
                    sum[j] += q[j];
                    square[j] += double(q[j]) * q[j];
                }
            }
            n += static_cast<double>(text.end - text.begin);
        }
        mean_.resize(group * d);
        factor_.resize(group * d);
        for (int j = 0; j < group * d; j++) {
            const double mean = sum[j] / n;
            const double variance =
                    std::max(square[j] / n - mean * mean, 1e-12);
            mean_[j] = static_cast<float>(mean);
            factor_[j] = static_cast<float>(1 / std::sqrt(variance));
        }
    }

    void cluster() {
        const int d = shape_.d;
        std::vector<float> keys;
        for (int t = 0; t < training_texts_; t++) {
            const TrainingText& text = texts_[t];
            keys.insert(
                    keys.end(),
                    text.keys_pre.begin() + params_.sink * d,
                    text.keys_pre.begin() + text.end * d);
        }
        int64_t n = static_cast<int64_t>(keys.size()) / d;
        const int64_t most = int64_t(params_.keys_per_cell) * params_.ncell;
        if (n > most) {
            for (int64_t i = 0; i < most; i++) {
                std::copy_n(
                        keys.begin() + i * n / most * d,
                        d,
                        keys.begin() + i * d);
            }
            n = most;
        }
        KMeansParams kmeans = params_.kmeans;
        kmeans.seed = params_.seed;
        const Partition cells = kmeans_partition(
                n, d, keys.data(), params_.ncell, NEEDS_PRE_ROPE, kmeans);
        const auto& quantizer =
                static_cast<const QuantizerAssigner&>(*cells.key).quantizer;
        const auto& flat = static_cast<const faiss::IndexFlat&>(*quantizer);
        state_.centroids.assign(
                flat.get_xb(), flat.get_xb() + int64_t(params_.ncell) * d);
        if (params_.centroid_dtype != DType::float32) {
            const auto size = static_cast<int64_t>(state_.centroids.size());
            std::vector<uint16_t> rounded(size);
            from_float(
                    params_.centroid_dtype,
                    state_.centroids.data(),
                    size,
                    rounded.data());
            to_float(
                    params_.centroid_dtype,
                    rounded.data(),
                    size,
                    state_.centroids.data());
        }
    }

    std::shared_ptr<const CellAssigner> centroid_assigner() const {
        FAISS_THROW_IF_NOT_FMT(
                state_.centroids.size() == size_t(params_.ncell) * shape_.d,
                "the training state holds centroids of %zd floats, %d cells "
                "of d = %d need %zd",
                state_.centroids.size(),
                params_.ncell,
                shape_.d,
                size_t(params_.ncell) * shape_.d);
        auto flat = std::make_shared<faiss::IndexFlat>(
                shape_.d,
                params_.kmeans.spherical ? faiss::METRIC_INNER_PRODUCT
                                         : faiss::METRIC_L2);
        flat->add(params_.ncell, state_.centroids.data());
        return std::make_shared<QuantizerAssigner>(flat, NEEDS_PRE_ROPE);
    }

    CellBalance balance() const {
        std::vector<int64_t> cells;
        for (int t = 0; t < training_texts_; t++) {
            const auto& of_text = texts_[t].cells;
            cells.insert(
                    cells.end(),
                    of_text.begin() + params_.sink,
                    of_text.begin() + texts_[t].end);
        }
        std::vector<int64_t> counts(params_.ncell);
        for (int64_t c : cells) {
            counts[c]++;
        }
        CellBalance b;
        b.keys = static_cast<int64_t>(cells.size());
        b.largest = *std::max_element(counts.begin(), counts.end());
        b.empty = static_cast<int>(
                std::count(counts.begin(), counts.end(), 0));
        b.imbalance = faiss::imbalance_factor(
                static_cast<int>(cells.size()), params_.ncell, cells.data());
        return b;
    }

    /// Replays the training texts, as decoding would see them, and asks at
    /// evenly spaced tokens.
    std::vector<BlendWeights> blend(
            const std::shared_ptr<const QueryClassifier>& classifier) const {
        const int group = shape_.group;
        const BlendAssigner untrained(
                classifier, std::vector<BlendWeights>(group), scale_);
        std::vector<std::vector<BlendExample>> of_text(training_texts_);
        parallel_for(training_texts_, [&](int64_t t) {
            of_text[t] = blend_examples(texts_[t], untrained);
        });
        std::vector<BlendWeights> weights(group);
        parallel_for(group, [&](int64_t g) {
            std::vector<BlendExample> examples;
            for (auto& text : of_text) {
                for (size_t i = g; i < text.size(); i += group) {
                    examples.push_back(std::move(text[i]));
                }
            }
            weights[g] = fit_blend(examples, scale_);
        });
        return weights;
    }

    /// Of one text: query heads of a token one after the other.
    std::vector<BlendExample> blend_examples(
            const TrainingText& text,
            const BlendAssigner& assigner) const {
        const int d = shape_.d, group = shape_.group, ncell = shape_.ncell;
        const int64_t there = text.end - text.begin;
        const int64_t n = std::min<int64_t>(params_.blend_queries, there);
        std::vector<int32_t> head(group);
        std::iota(head.begin(), head.end(), 0);
        CellLists lists(ncell, d, params_.sink, true, nullptr, true);
        TargetBatch targets;
        std::vector<BlendExample> examples;
        std::vector<float> all(size_t(group) * kBlendFeatures * ncell);
        for (int64_t i = 0; i < n; i++) {
            // The last of each n-th, so that there are far keys.
            const int64_t token = text.begin + (i + 1) * there / n - 1;
            text.targets(rotary_, scale_, ncell, 1, &token, targets);
            for (int64_t j = params_.sink + lists.size();
                 j < token + 1 - params_.window;
                 j++) {
                lists.append(text.cells[j], text.keys_post.data() + j * d, j);
            }
            const std::vector<int64_t> position(group, token);
            RoutingInput input;
            input.n = group;
            input.d = d;
            input.pre_rope = targets.x.data();
            input.post_rope = targets.rotated.data();
            input.position = position.data();
            input.head = head.data();
            const CellStats stats = lists.stats();
            assigner.features(input, &stats, all.data());
            for (int g = 0; g < group; g++) {
                BlendExample e;
                e.weight = weight(g, targets.total[g]);
                for (int f = 0; f < kBlendFeatures; f++) {
                    const float* x = all.data() +
                            (size_t(g) * kBlendFeatures + f) * ncell;
                    for (int c = 0; c < ncell; c++) {
                        if (stats.count[c]) {
                            e.features.push_back(x[c]);
                        }
                    }
                }
                for (int c = 0; c < ncell; c++) {
                    if (stats.count[c]) {
                        e.mass.push_back(
                                targets.mass[size_t(g) * ncell + c]);
                        e.count.push_back(static_cast<float>(stats.count[c]));
                    }
                }
                examples.push_back(std::move(e));
            }
        }
        return examples;
    }

    /// Targets of evenly spaced tokens of the held-out text, and the far mass
    /// by which queries of a head are weighted.
    void held_out_targets() {
        const TrainingText& text = texts_.back();
        const int64_t there = text.tokens - held_out_begin_;
        const int64_t n = std::min<int64_t>(params_.held_out_queries, there);
        std::vector<int64_t> at(n);
        for (int64_t i = 0; i < n; i++) {
            at[i] = held_out_begin_ + i * there / n;
        }
        text.targets(
                rotary_, scale_, shape_.ncell, n, at.data(), *held_out_);
        for (int g = 0; g < shape_.group; g++) {
            double sum = 0;
            for (int64_t i = 0; i < n; i++) {
                sum += held_out_->total[g * n + i];
            }
            far_mass_.push_back(sum / n);
        }
    }

    void initialise() {
        auto random = random_at(params_, layer_, kv_head_, -1, 0);
        state_.parameters.assign(parameter_count(shape_), 0.0f);
        for (const ClassifierLayer& layer : classifier_layers(shape_)) {
            // Blocks begin near the identity, cells near even.
            const bool small = layer.name.find("in") != 0 &&
                    layer.name.find("up") == std::string::npos;
            std::normal_distribution<float> normal(
                    0,
                    (small ? .1f : 1.0f) /
                            std::sqrt(static_cast<float>(layer.cols)));
            for (int64_t i = 0; i < layer.weights(); i++) {
                state_.parameters[layer.weight + i] = normal(random);
            }
        }
        state_.first.assign(state_.parameters.size(), 0.0f);
        state_.second.assign(state_.parameters.size(), 0.0f);
        state_.best = state_.parameters;
    }

    float weight(int head, float total) const {
        if (far_mass_[head] <= 0) {
            return total > 0 ? 1.0f : 0.0f;
        }
        return std::pow(
                total / static_cast<float>(far_mass_[head]),
                params_.mass_power);
    }

    /// Draws tokens of one text and adds up their gradient.
    double part_of_step(int part, int64_t n) {
        auto random =
                random_at(params_, layer_, kv_head_, state_.step, part);
        const TrainingText& text = texts_[random() % training_texts_];
        std::vector<int64_t> at(n);
        for (int64_t& i : at) {
            i = text.begin +
                    static_cast<int64_t>(
                            random() %
                            static_cast<uint64_t>(text.end - text.begin));
        }
        std::sort(at.begin(), at.end());
        Part& p = parts_[part];
        text.targets(rotary_, scale_, shape_.ncell, n, at.data(), p.targets);
        const int d = shape_.d;
        p.weight.resize(shape_.group * n);
        for (int g = 0; g < shape_.group; g++) {
            for (int64_t i = g * n; i < (g + 1) * n; i++) {
                float* x = p.targets.x.data() + i * d;
                for (int j = 0; j < d; j++) {
                    x[j] = (x[j] - mean_[g * d + j]) * factor_[g * d + j];
                }
                p.weight[i] = weight(g, p.targets.total[i]) /
                        (params_.batch * shape_.group);
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
                shape_,
                state_.parameters.data(),
                batch,
                p.gradient.data(),
                p.workspace);
    }

    void step() {
        std::vector<double> losses(kParts);
        parallel_for(kParts, [&](int64_t part) {
            // Fewer tokens than parts leave some of them empty.
            const int64_t n = params_.batch * (part + 1) / kParts -
                    params_.batch * part / kParts;
            parts_[part].gradient.assign(state_.parameters.size(), 0.0f);
            losses[part] = n > 0 ? part_of_step(part, n) : 0.0;
        });
        AdamWParams adamw;
        adamw.decay = params_.weight_decay;
        adamw.rate = learning_rate(state_.step);
        const double done = static_cast<double>(state_.step + 1);
        adamw.correction1 =
                static_cast<float>(1 / (1 - std::pow(adamw.beta1, done)));
        adamw.correction2 =
                static_cast<float>(1 / (1 - std::pow(adamw.beta2, done)));
        constexpr int64_t kBlock = 16384;
        const auto size = static_cast<int64_t>(state_.parameters.size());
        parallel_for((size + kBlock - 1) / kBlock, [&](int64_t block) {
            const int64_t begin = block * kBlock;
            const int64_t n = std::min(kBlock, size - begin);
            float* sum = parts_[0].gradient.data() + begin;
            for (int p = 1; p < kParts; p++) {
                const float* g = parts_[p].gradient.data() + begin;
                for (int64_t i = 0; i < n; i++) {
                    sum[i] += g[i];
                }
            }
            adamw_step(
                    n,
                    adamw,
                    sum,
                    state_.parameters.data() + begin,
                    state_.first.data() + begin,
                    state_.second.data() + begin);
        });
        double loss = 0;
        for (double l : losses) {
            loss += l;
        }
        state_.loss = state_.step == 0 ? loss : .98 * state_.loss + .02 * loss;
        state_.step++;
    }

    float learning_rate(int64_t step) const {
        if (step < params_.warmup) {
            return params_.learning_rate * static_cast<float>(step + 1) /
                    static_cast<float>(params_.warmup);
        }
        const double along = static_cast<double>(step - params_.warmup) /
                std::max(1, params_.steps - params_.warmup);
        return static_cast<float>(
                params_.learning_rate * .5 * (1 + std::cos(M_PI * along)));
    }

    /// The classifier of these parameters for queries as they come, with
    /// scores in the unit of q.k.
    std::shared_ptr<const QueryClassifier> folded(
            std::vector<float> parameters) const {
        const auto layers = classifier_layers(shape_);
        const ClassifierLayer& in = layers.front();
        for (int g = 0; g < shape_.group; g++) {
            for (int r = 0; r < in.rows; r++) {
                const int64_t row = int64_t(g) * in.rows + r;
                float* w = parameters.data() + in.weight + row * in.cols;
                double shift = 0;
                for (int j = 0; j < in.cols; j++) {
                    w[j] *= factor_[g * in.cols + j];
                    shift += double(w[j]) * mean_[g * in.cols + j];
                }
                parameters[in.bias + row] -= static_cast<float>(shift);
            }
        }
        const ClassifierLayer& out = layers.back();
        for (int64_t i = out.weight; i < out.bias + out.biases(); i++) {
            parameters[i] /= scale_;
        }
        return std::make_shared<QueryClassifier>(
                shape_, parameters.data(), params_.dtype);
    }

    std::vector<HeldOut> evaluate(const QueryClassifier& classifier) const {
        const TargetBatch& b = *held_out_;
        const auto n = static_cast<int64_t>(b.far.size());
        const int ncell = shape_.ncell;
        std::vector<HeldOut> heads;
        for (int g = 0; g < shape_.group; g++) {
            const std::vector<int32_t> head(n, g);
            RoutingInput input;
            input.n = n;
            input.d = shape_.d;
            input.pre_rope = b.x.data() + g * n * shape_.d;
            input.head = head.data();
            std::vector<float> scores(n * ncell);
            classifier.scores(input, nullptr, scores.data());
            double read = 0, best = 0, total = 0;
            std::vector<int64_t> counts(ncell);
            std::vector<float> per_key(ncell);
            for (int64_t i = 0; i < n; i++) {
                const float* mass = b.mass.data() + (g * n + i) * ncell;
                for (int c = 0; c < ncell; c++) {
                    counts[c] = std::lround(
                            std::exp(b.log_count[i * ncell + c]));
                    per_key[c] = counts[c] ? mass[c] / counts[c] : -INFINITY;
                }
                const auto limit =
                        static_cast<int64_t>(params_.budget * b.far[i]);
                const auto taken = [&](const float* s) {
                    double sum = 0;
                    for (int32_t c : take_cells(
                                 ncell, s, counts.data(), ncell, limit, false)) {
                        sum += mass[c];
                    }
                    return sum;
                };
                read += taken(scores.data() + i * ncell);
                best += taken(per_key.data());
                total += b.total[g * n + i];
            }
            HeldOut h;
            h.recall = total > 0 ? read / total : 0;
            h.ceiling = total > 0 ? best / total : 0;
            h.far_mass = total / n;
            heads.push_back(h);
        }
        return heads;
    }

    void keep_the_best() {
        double recall = 0;
        for (const HeldOut& h : evaluate(*folded(state_.parameters))) {
            recall += h.recall / shape_.group;
        }
        if (recall > state_.best_recall) {
            state_.best_recall = recall;
            state_.best = state_.parameters;
            state_.best_step = state_.step;
        }
        state_.finished = state_.step - state_.best_step >=
                int64_t(params_.patience) * params_.evaluate_every;
    }

    struct Part {
        TargetBatch targets;
        std::vector<float> weight, gradient;
        ClassifierWorkspace workspace;
    };

    const TrainingParams& params_;
    int layer_, kv_head_;
    RopeParams rope_;
    RotaryEmbedding rotary_;
    float scale_;
    ClassifierShape shape_;
    TrainingState& state_;
    std::vector<TrainingText> texts_;
    int training_texts_ = 0;
    int64_t held_out_begin_ = 0;
    std::vector<float> mean_, factor_; ///< size group * d
    std::shared_ptr<const CellAssigner> key_;
    std::unique_ptr<TargetBatch> held_out_;
    std::vector<double> far_mass_; ///< per head, on the held-out text
    Part parts_[kParts];
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
    at_least("sink", static_cast<double>(sink), 0);
    at_least("window", static_cast<double>(window), 0);
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
    params.check();
    check_together(texts, layer, kv_head);
    TrainingState own;
    Training training(
            texts, layer, kv_head, params, state ? *state : own);
    training.run(callback);
    return training.result();
}

} // namespace faiss_saap
