#include <faiss_saap/HeadTraining.h>

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

#include "blas.h"
#include "check.h"
#include "parallel_for.h"

namespace faiss_saap {

namespace {

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

/// The first of texts that belong together and have this head.
const Trace& first_of(
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
    return first;
}

} // namespace

HeadTraining::HeadTraining(
        const std::vector<Trace>& traces,
        int of_layer,
        int of_kv_head,
        const TrainingParams& with,
        TrainingState& from)
        : params(with),
          state(from),
          layer(of_layer),
          kv_head(of_kv_head),
          rotary(first_of(traces, of_layer, of_kv_head).rope) {
    params.check();
    scale = params.scale > 0
            ? params.scale
            : 1 / std::sqrt(static_cast<float>(traces.front().d));
    shape.d = traces.front().d;
    shape.group = traces.front().group();
    shape.ncell = params.ncell;
    shape.width = params.width;
    shape.depth = params.depth;
    shape.share_input = params.share_input;
    shape.share_trunk = params.share_trunk;
    shape.check();
    std::vector<std::unique_ptr<TrainingText>> read(traces.size());
    parallel_for(static_cast<int64_t>(traces.size()), [&](int64_t t) {
        read[t] = std::make_unique<TrainingText>(
                traces[t], layer, kv_head, params.sink, params.window);
    });
    for (auto& text : read) {
        texts.push_back(std::move(*text));
    }
    split();
    standardise();
    const auto size = static_cast<size_t>(parameter_count(shape));
    for (const auto* x :
         {&state.parameters, &state.first, &state.second, &state.best}) {
        FAISS_THROW_IF_NOT_FMT(
                x->size() == (state.parameters.empty() ? 0 : size),
                "the training state holds %zd parameters, this network "
                "has %zd",
                x->size(),
                size);
    }
}

/// The last text is held out, or the last quarter of a single one.
void HeadTraining::split() {
    TrainingText& last = texts.back();
    training_texts = static_cast<int>(texts.size()) - 1;
    held_out_begin_ = last.begin;
    if (training_texts == 0) {
        training_texts = 1;
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

/// Mean and deviation of each component of the heads' queries: the
/// network is trained on standardised queries, at one learning rate.
void HeadTraining::standardise() {
    const int d = shape.d, group = shape.group;
    // Of each text, so that the order of the sums is that of the texts.
    std::vector<std::vector<double>> sums(training_texts), squares(sums);
    parallel_for(training_texts, [&](int64_t t) {
        const TrainingText& text = texts[t];
        sums[t].resize(group * d);
        squares[t].resize(group * d);
        for (int64_t i = text.begin; i < text.end; i++) {
            const float* q = text.queries.data() + i * group * d;
            for (int j = 0; j < group * d; j++) {
                sums[t][j] += q[j];
                squares[t][j] += double(q[j]) * q[j];
            }
        }
    });
    std::vector<double> sum(group * d), square(group * d);
    double n = 0;
    for (int t = 0; t < training_texts; t++) {
        for (int j = 0; j < group * d; j++) {
            sum[j] += sums[t][j];
            square[j] += squares[t][j];
        }
        n += static_cast<double>(texts[t].end - texts[t].begin);
    }
    mean.resize(group * d);
    factor.resize(group * d);
    std::vector<double> variance(group * d);
    for (int j = 0; j < group * d; j++) {
        const double average = sum[j] / n;
        variance[j] = square[j] / n - average * average;
        mean[j] = static_cast<float>(average);
    }
    for (int j = 0; j < group * d; j++) {
        double of_heads = 0; // which one matrix has to serve
        for (int g = 0; g < group; g++) {
            of_heads += variance[g * d + j % d] / group;
        }
        factor[j] = static_cast<float>(
                1 / std::sqrt(std::max(shape.share_input ? of_heads : variance[j], 1e-12)));
    }
}

std::vector<float> HeadTraining::keys_to_cluster() const {
    const int d = shape.d;
    // The i-th of n evenly spaced ones, over all texts in turn.
    int64_t all = 0;
    for (int t = 0; t < training_texts; t++) {
        all += texts[t].end - params.sink;
    }
    const int64_t n = std::min(all, int64_t(params.keys_per_cell) * params.ncell);
    std::vector<float> keys(n * d);
    int64_t i = 0, first = 0; // of the text
    for (int t = 0; t < training_texts; t++) {
        const TrainingText& text = texts[t];
        const int64_t end = first + text.end - params.sink;
        for (; i < n && i * all / n < end; i++) {
            const int64_t token = params.sink + i * all / n - first;
            std::copy_n(
                    text.keys_pre.data() + token * d, d, keys.data() + i * d);
        }
        first = end;
    }
    return keys;
}

void HeadTraining::cluster() {
    const std::vector<float> keys = keys_to_cluster();
    const int d = shape.d;
    const int64_t n = static_cast<int64_t>(keys.size()) / d;
    KMeansParams kmeans = params.kmeans;
    kmeans.seed = params.seed;
    const Partition cells = kmeans_partition(
            n, d, keys.data(), params.ncell, NEEDS_PRE_ROPE, kmeans);
    const auto& quantizer =
            static_cast<const QuantizerAssigner&>(*cells.key).quantizer;
    const auto& flat = static_cast<const faiss::IndexFlat&>(*quantizer);
    set_centroids(std::vector<float>(
            flat.get_xb(), flat.get_xb() + int64_t(params.ncell) * d));
}

void HeadTraining::set_centroids(std::vector<float> centroids) {
    state.centroids = std::move(centroids);
    const auto size = static_cast<int64_t>(state.centroids.size());
    round_to(params.centroid_dtype, size, state.centroids.data());
}

std::shared_ptr<const CellAssigner> HeadTraining::centroid_assigner() const {
    FAISS_THROW_IF_NOT_FMT(
            state.centroids.size() == size_t(params.ncell) * shape.d,
            "the training state holds centroids of %zd floats, %d cells "
            "of d = %d need %zd",
            state.centroids.size(),
            params.ncell,
            shape.d,
            size_t(params.ncell) * shape.d);
    auto flat = std::make_shared<faiss::IndexFlat>(
            shape.d,
            params.kmeans.spherical ? faiss::METRIC_INNER_PRODUCT
                                     : faiss::METRIC_L2);
    flat->add(params.ncell, state.centroids.data());
    return std::make_shared<QuantizerAssigner>(flat, NEEDS_PRE_ROPE);
}

void HeadTraining::begin() {
    key_ = centroid_assigner();
    for (TrainingText& text : texts) {
        if (text.cells.empty()) {
            text.assign_cells(*key_);
        }
    }
    held_out_targets();
    if (state.parameters.empty()) {
        initialise();
    }
}

CellBalance HeadTraining::balance() const {
    std::vector<int64_t> cells;
    for (int t = 0; t < training_texts; t++) {
        const auto& of_text = texts[t].cells;
        cells.insert(
                cells.end(),
                of_text.begin() + params.sink,
                of_text.begin() + texts[t].end);
    }
    std::vector<int64_t> counts(params.ncell);
    for (int64_t c : cells) {
        counts[c]++;
    }
    CellBalance b;
    b.keys = static_cast<int64_t>(cells.size());
    b.largest = *std::max_element(counts.begin(), counts.end());
    b.empty = static_cast<int>(
            std::count(counts.begin(), counts.end(), 0));
    b.imbalance = faiss::imbalance_factor(
            static_cast<int>(cells.size()), params.ncell, cells.data());
    return b;
}

/// Replays the training texts, as decoding would see them, and asks at
/// evenly spaced tokens.
std::vector<BlendWeights> HeadTraining::blend(
        const std::shared_ptr<const QueryClassifier>& classifier) const {
    const int group = shape.group;
    const BlendAssigner untrained(
            classifier, std::vector<BlendWeights>(group), scale);
    std::vector<std::vector<BlendExample>> of_text(training_texts);
    parallel_for(training_texts, [&](int64_t t) {
        of_text[t] = blend_examples(texts[t], untrained);
    });
    std::vector<BlendWeights> weights(group);
    parallel_for(group, [&](int64_t g) {
        std::vector<BlendExample> examples;
        for (auto& text : of_text) {
            for (size_t i = g; i < text.size(); i += group) {
                examples.push_back(std::move(text[i]));
            }
        }
        weights[g] = fit_blend(examples, scale);
    });
    return weights;
}

/// Of one text: query heads of a token one after the other.
std::vector<BlendExample> HeadTraining::blend_examples(
        const TrainingText& text,
        const BlendAssigner& assigner) const {
    const int d = shape.d, group = shape.group, ncell = shape.ncell;
    const int64_t there = text.end - text.begin;
    const int64_t n = std::min<int64_t>(params.blend_queries, there);
    std::vector<int32_t> head(group);
    std::iota(head.begin(), head.end(), 0);
    CellLists lists(ncell, d, params.sink, true, nullptr, true);
    TargetBatch targets;
    std::vector<BlendExample> examples;
    std::vector<float> all(size_t(group) * kBlendFeatures * ncell);
    for (int64_t i = 0; i < n; i++) {
        // The last of each n-th, so that there are far keys.
        const int64_t token = text.begin + (i + 1) * there / n - 1;
        text.targets(rotary, scale, ncell, 1, &token, targets);
        for (int64_t j = params.sink + lists.size();
             j < token + 1 - params.window;
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
void HeadTraining::held_out_targets() {
    const TrainingText& text = texts.back();
    const int64_t there = text.tokens - held_out_begin_;
    const int64_t n = std::min<int64_t>(params.held_out_queries, there);
    std::vector<int64_t> at(n);
    for (int64_t i = 0; i < n; i++) {
        at[i] = held_out_begin_ + i * there / n;
    }
    text.targets(
            rotary, scale, shape.ncell, n, at.data(), held_out_);
    for (int g = 0; g < shape.group; g++) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) {
            sum += held_out_.total[g * n + i];
        }
        far_mass.push_back(sum / n);
    }
}

void HeadTraining::initialise() {
    auto random = random_at(params, layer, kv_head, -1, 0);
    state.parameters.assign(parameter_count(shape), 0.0f);
    for (const ClassifierLayer& layer : classifier_layers(shape)) {
        // Blocks begin near the identity, cells near even.
        const bool small = layer.name.find("in") != 0 &&
                layer.name.find("up") == std::string::npos;
        std::normal_distribution<float> normal(
                0,
                (small ? .1f : 1.0f) /
                        std::sqrt(static_cast<float>(layer.cols)));
        for (int64_t i = 0; i < layer.weights(); i++) {
            state.parameters[layer.weight + i] = normal(random);
        }
    }
    state.first.assign(state.parameters.size(), 0.0f);
    state.second.assign(state.parameters.size(), 0.0f);
    state.best = state.parameters;
}

float HeadTraining::weight(int head, float total) const {
    if (far_mass[head] <= 0) {
        return total > 0 ? 1.0f : 0.0f;
    }
    return std::pow(
            total / static_cast<float>(far_mass[head]),
            params.mass_power);
}

TokensOfText HeadTraining::draw(int64_t step, int part) const {
    const auto tokens = [&](int p) {
        return int64_t(params.batch) * p / kTrainingParts;
    };
    auto random = random_at(params, layer, kv_head, step, part);
    TokensOfText drawn;
    drawn.text = static_cast<int>(random() % training_texts);
    const TrainingText& text = texts[drawn.text];
    // Fewer tokens than parts leave some of them empty.
    drawn.at.resize(tokens(part + 1) - tokens(part));
    for (int64_t& i : drawn.at) {
        i = text.begin +
                static_cast<int64_t>(
                        random() %
                        static_cast<uint64_t>(text.end - text.begin));
    }
    std::sort(drawn.at.begin(), drawn.at.end());
    return drawn;
}

AdamWParams HeadTraining::adamw(int64_t step) const {
    AdamWParams p;
    p.decay = params.weight_decay;
    p.rate = learning_rate(step);
    const double done = static_cast<double>(step + 1);
    p.correction1 = static_cast<float>(1 / (1 - std::pow(p.beta1, done)));
    p.correction2 = static_cast<float>(1 / (1 - std::pow(p.beta2, done)));
    return p;
}

float HeadTraining::learning_rate(int64_t step) const {
    if (step < params.warmup) {
        return params.learning_rate * static_cast<float>(step + 1) /
                static_cast<float>(params.warmup);
    }
    const double along = static_cast<double>(step - params.warmup) /
            std::max(1, params.steps - params.warmup);
    return static_cast<float>(
            params.learning_rate * .5 * (1 + std::cos(M_PI * along)));
}

/// The classifier of these parameters for queries as they come, with
/// scores in the unit of q.k.
std::shared_ptr<const QueryClassifier> HeadTraining::folded(
        std::vector<float> parameters) const {
    const auto layers = classifier_layers(shape);
    const ClassifierLayer& in = layers.front();
    for (int t = 0; t < in.networks; t++) {
        for (int r = 0; r < in.rows; r++) {
            float* w = parameters.data() + in.weight +
                    (int64_t(t) * in.rows + r) * in.cols;
            for (int j = 0; j < in.cols; j++) {
                w[j] *= factor[t * in.cols + j]; // alike for heads that share it
            }
            for (int g = t; g < (in.networks > 1 ? t + 1 : shape.group); g++) {
                double shift = 0;
                for (int j = 0; j < in.cols; j++) {
                    shift += double(w[j]) * mean[g * in.cols + j];
                }
                parameters[in.bias + int64_t(g) * in.rows + r] -=
                        static_cast<float>(shift);
            }
        }
    }
    const ClassifierLayer& out = layers.back();
    for (int64_t i = out.weight; i < out.bias + out.biases(); i++) {
        parameters[i] /= scale;
    }
    return std::make_shared<QueryClassifier>(
            shape, parameters.data(), params.dtype);
}

std::vector<HeldOut> HeadTraining::evaluate(
        const QueryClassifier& classifier) const {
    const TargetBatch& b = held_out_;
    const auto n = static_cast<int64_t>(b.far.size());
    const int ncell = shape.ncell;
    std::vector<double> read(shape.group * n), best(shape.group * n);
    constexpr int64_t kBlock = 16;
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    parallel_for(shape.group * blocks, [&](int64_t block) {
        const int64_t g = block / blocks, first = block % blocks * kBlock;
        const int64_t m = std::min(kBlock, n - first);
        const std::vector<int32_t> head(m, static_cast<int32_t>(g));
        RoutingInput input;
        input.n = m;
        input.d = shape.d;
        input.pre_rope = b.x.data() + (g * n + first) * shape.d;
        input.head = head.data();
        std::vector<float> scores(m * ncell), per_key(ncell);
        classifier.scores(input, nullptr, scores.data());
        std::vector<int64_t> counts(ncell);
        for (int64_t i = 0; i < m; i++) {
            const int64_t row = g * n + first + i;
            const float* mass = b.mass.data() + row * ncell;
            const float* log_count =
                    b.log_count.data() + (first + i) * ncell;
            for (int c = 0; c < ncell; c++) {
                counts[c] = std::lround(std::exp(log_count[c]));
                per_key[c] = counts[c] ? mass[c] / counts[c] : -INFINITY;
            }
            const auto limit =
                    static_cast<int64_t>(params.budget * b.far[first + i]);
            const auto taken = [&](const float* s) {
                double sum = 0;
                for (int32_t c : take_cells(
                             ncell, s, counts.data(), ncell, limit, false)) {
                    sum += mass[c];
                }
                return sum;
            };
            read[row] = taken(scores.data() + i * ncell);
            best[row] = taken(per_key.data());
        }
    });
    std::vector<HeldOut> heads;
    for (int g = 0; g < shape.group; g++) {
        const auto sum = [&](const auto& x) {
            return std::accumulate(
                    x.begin() + g * n, x.begin() + (g + 1) * n, 0.0);
        };
        const double total = sum(b.total);
        HeldOut h;
        h.recall = total > 0 ? sum(read) / total : 0;
        h.ceiling = total > 0 ? sum(best) / total : 0;
        h.far_mass = total / n;
        heads.push_back(h);
    }
    return heads;
}

bool HeadTraining::finished() const {
    return state.finished || state.step >= params.steps;
}

bool HeadTraining::evaluation_is_due() const {
    return state.step % params.evaluate_every == 0 || state.step == params.steps;
}

void HeadTraining::keep_the_best() {
    const BlasOnOneThread one_thread;
    double recall = 0;
    for (const HeldOut& h : evaluate(*folded(state.parameters))) {
        recall += h.recall / shape.group;
    }
    if (recall > state.best_recall) {
        state.best_recall = recall;
        state.best = state.parameters;
        state.best_step = state.step;
    }
    state.finished = state.step - state.best_step >=
            int64_t(params.patience) * params.evaluate_every;
}

TrainedPartition HeadTraining::result() const {
    const BlasOnOneThread one_thread;
    TrainedPartition r;
    r.layer = layer;
    r.kv_head = kv_head;
    r.partition.rope = rotary.params;
    r.partition.key = key_;
    const auto classifier = folded(state.best);
    r.partition.query = classifier;
    r.balance = balance();
    r.heads = evaluate(*classifier);
    r.steps = state.best_step;
    r.scale = scale;
    if (params.blend) {
        r.blend = blend(classifier);
    }
    return r;
}

} // namespace faiss_saap
