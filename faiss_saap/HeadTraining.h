/// What every trainer of partitions does alike, whatever computes its steps.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <faiss_saap/AdamWParams.h>
#include <faiss_saap/TrainingText.h>
#include <faiss_saap/train_partition.h>

namespace faiss_saap {

/// Parts of a mini-batch, each drawn from one text. Their number is fixed, so
/// that nothing depends on what they are computed with.
constexpr int kTrainingParts = 8;

/// Tokens of one text, ascending.
struct TokensOfText {
    int text = 0; ///< among the training texts
    std::vector<int64_t> at;
};

/// The training of one KV head but for its mini-batches: texts and what is held
/// out of them, cells, draws, schedule, evaluation, result. train_partition()
/// and gpu::train_partitions() are loops around it:
///
///     HeadTraining training(texts, layer, kv_head, params, state);
///     if (state.centroids.empty()) training.cluster();
///     training.begin();
///     while (!training.finished()) {
///         ... a step from `state`, with what draw() and adamw() say ...
///         if (training.evaluation_is_due()) training.keep_the_best();
///     }
///     return training.result();
///
/// Public members are for reading, but for `state` and cells of `texts`.
struct HeadTraining {
    const TrainingParams& params; ///< the caller's, must outlive the training
    TrainingState& state;         ///< likewise
    int layer, kv_head;
    RotaryEmbedding rotary;
    float scale = 0; ///< of attention
    ClassifierShape shape;
    std::vector<TrainingText> texts;
    int training_texts = 0; ///< the first ones; the last text is held out, or
                            ///< the last quarter of a single one
    /// Mean and 1 / deviation of each component of each head's queries, size
    /// group * d: the network is trained on standardised ones. Heads that share the
    /// input matrix have one deviation, of their mean variance.
    std::vector<float> mean, factor;
    std::vector<double> far_mass; ///< per head, of the held-out text

    /// @throws faiss::FaissException as train_partition()
    HeadTraining(
            const std::vector<Trace>& texts,
            int layer,
            int kv_head,
            const TrainingParams& params,
            TrainingState& state);

    /// De-rotated keys of the training texts that k-means sees, size n * d.
    std::vector<float> keys_to_cluster() const;
    /// Sets the centroids by k-means of these.
    void cluster();
    /// Sets them to size ncell * d others, rounded to params.centroid_dtype.
    void set_centroids(std::vector<float> centroids);

    /// Once there are centroids: what is missing of the texts' cells, targets of
    /// the held-out tokens, and the first parameters unless there are some.
    /// @throws faiss::FaissException when the state is not of such a training
    void begin();

    /// Part 0 .. kTrainingParts - 1 of mini-batch `step`, of params.batch tokens
    /// in all. Depends on nothing else, so that a resumed training draws what an
    /// uninterrupted one would.
    TokensOfText draw(int64_t step, int part) const;
    /// Of a query in the loss, but for a factor that all have: its far mass over
    /// the head's, to params.mass_power.
    float weight(int head, float total) const;
    /// Warm-up, then a cosine.
    AdamWParams adamw(int64_t step) const;

    bool finished() const;
    bool evaluation_is_due() const;
    /// Asks the held-out tokens, keeps the parameters if none did better, and
    /// ends the training where none has for long.
    void keep_the_best();

    TrainedPartition result() const;

   private:
    void split();
    void standardise();
    std::shared_ptr<const CellAssigner> centroid_assigner() const;
    void held_out_targets();
    void initialise();
    float learning_rate(int64_t step) const;
    std::shared_ptr<const QueryClassifier> folded(
            std::vector<float> parameters) const;
    std::vector<HeldOut> evaluate(const QueryClassifier& classifier) const;
    CellBalance balance() const;
    std::vector<BlendWeights> blend(
            const std::shared_ptr<const QueryClassifier>& classifier) const;
    std::vector<BlendExample> blend_examples(
            const TrainingText& text,
            const BlendAssigner& assigner) const;

    int64_t held_out_begin_ = 0;
    std::shared_ptr<const CellAssigner> key_;
    TargetBatch held_out_;
};

} // namespace faiss_saap
