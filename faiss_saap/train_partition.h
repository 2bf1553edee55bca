/// Training a partition with a query classifier on recorded attention.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/Partition.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/Trace.h>

namespace faiss_saap {

/// How a partition is trained. Far keys of a query at token i are those from
/// `sink` to i - `window`; only their attention mass is a target.
struct TrainingParams {
    int ncell = 1024;
    int64_t sink = 16;    ///< first tokens, always attended: no targets
    int64_t window = 256; ///< most recent tokens, likewise
    float scale = 0;      ///< attention scale; 0: 1 / sqrt(d)

    KMeansParams kmeans;  ///< of the de-rotated keys
    /// Centroids are rounded to it before anything is put into their cells. What
    /// bfloat16 holds is stored and read in half the bytes of float32.
    DType centroid_dtype = DType::bfloat16;
    /// keys that k-means sees per cell at most, evenly spaced
    int keys_per_cell = 256;

    int width = ClassifierShape().width; ///< of the classifier, and what follows
    int depth = ClassifierShape().depth;
    bool share_input = ClassifierShape().share_input;
    bool share_trunk = ClassifierShape().share_trunk;
    DType dtype = DType::bfloat16; ///< its weights in the result

    int steps = 1000;            ///< mini-batches at most
    int batch = 512;             ///< tokens of a mini-batch, every head asks
    int warmup = 100;            ///< steps with a rising learning rate
    float learning_rate = 2e-3f; ///< then falling to 0 along a cosine
    float weight_decay = .01f;   ///< AdamW's
    /// a query counts by its far mass to this power: 1 is what mass recall
    /// measures, 0 treats all alike
    float mass_power = .5f;

    int held_out_queries = 256;  ///< tokens asked when the held-out text is
    double budget = .05;         ///< share of far keys read there
    int evaluate_every = 200;    ///< steps between such evaluations
    int patience = 5;            ///< evaluations without gain before stopping

    bool blend = true;           ///< weights for a BlendAssigner afterwards
    int blend_queries = 48;      ///< tokens of each text that ask for them
    int seed = 1234;

    /// @throws faiss::FaissException naming the field that is out of range
    void check() const;
};

/// Sizes of the cells over the training keys.
struct CellBalance {
    int64_t keys = 0, largest = 0;
    int empty = 0;        ///< cells without keys
    double imbalance = 0; ///< imbalance factor as Faiss defines it; 1 is even
};

/// How one query head of a trained partition does on the held-out text.
struct HeldOut {
    double recall = 0;   ///< mass recall at `budget`
    double ceiling = 0;  ///< that of the partition
    double far_mass = 0; ///< mean attention mass of the far keys
};

/// Far mass under which a head has hardly anything to learn from.
constexpr double kLittleFarMass = 1e-3;

/// The partition of one KV head, and what is known about it.
struct TrainedPartition {
    int layer = 0, kv_head = 0; ///< the model's numbers
    /// key: centroids; query: a QueryClassifier
    Partition partition;
    CellBalance balance;
    std::vector<HeldOut> heads; ///< one per query head of the group
    int64_t steps = 0;          ///< after which the parameters were kept
    /// of a BlendAssigner, one per query head; empty where not trained
    std::vector<BlendWeights> blend;
    float scale = 0;            ///< attention scale that they were trained for

    /// The same cells with a BlendAssigner over the classifier for queries.
    /// Needs statistics of the sequence, as an AttentionAdapter keeps them.
    /// @throws faiss::FaissException without weights
    Partition blended() const;
};

/// Everything that going on needs.
struct TrainingState {
    int64_t step = 0;             ///< mini-batches done
    std::vector<float> centroids; ///< size ncell * d
    std::vector<float> parameters, first, second; ///< and AdamW's moments
    std::vector<float> best;      ///< parameters of the best evaluation
    double best_recall = -1;
    int64_t best_step = 0;
    double loss = 0;              ///< mean of recent mini-batches
    bool finished = false;        ///< stopped early
};

/// Called after every mini-batch. What it throws ends the training.
using TrainingCallback = std::function<void(const TrainingState&)>;

/// Learns cells by k-means on the de-rotated keys of the texts, then a
/// classifier by soft-target cross-entropy against true attention weights
/// summed per cell (arXiv 2502.08246). Mini-batches are drawn over texts and
/// positions and their targets computed on the fly, in blocks of a few queries.
///
/// The last text is held out: neither k-means nor the classifier sees it, and
/// the parameters that did best on it are kept. Of a single text, the last
/// quarter is held out.
///
/// Weights of a BlendAssigner follow, from a replay of the texts: at each of
/// some tokens, statistics are those of the keys that were far keys then. The
/// held-out text takes no part.
///
/// The same texts, parameters and seed give the same result, on any number of
/// threads. Memory: keys and queries of all texts as float, and about
/// 8 * parameter_count() floats.
///
/// @param texts    traces of one model with equal RoPE parameters
/// @param layer    the model's number, as kv_head
/// @param state    null, or where to go on; holds the last state afterwards
/// @param callback may be empty
/// @throws faiss::FaissException naming the text or the parameter that is
///         wrong: no far keys, fewer keys than cells, values that are not
///         finite, traces that do not belong together
TrainedPartition train_partition(
        const std::vector<Trace>& texts,
        int layer,
        int kv_head,
        const TrainingParams& params = {},
        TrainingState* state = nullptr,
        const TrainingCallback& callback = {});

} // namespace faiss_saap
