/// Learns partitions with query classifiers from recorded attention.
#include <algorithm>
#include <cstdio>
#include <functional>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <unistd.h>

#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/gpu/train_partitions.h>
#include <faiss_saap/train_partition.h>

#include "common/TrainingCheckpoint.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options {
    std::vector<std::string> traces;
    std::vector<int> layers, kv_heads;
    std::string out, json, device = "cpu";
    bool resume = false, separate_inputs = false, separate_trunks = false, fp32 = false;
    bool fp32_centroids = false;
    double text_gib = 0;
    TrainingParams params;
};

/// Seconds between checkpoints: what an interruption loses at most.
constexpr double kCheckpointSeconds = 20;

using States = std::vector<TrainingState>;

/// The line that shows how far the training is, only on a terminal.
class TrainingLine {
   public:
    /// @param trainings  that follow each other
    TrainingLine(const Options& options, size_t trainings)
            : options_(options), trainings_(trainings) {}
    ~TrainingLine() {
        clear();
    }

    void begin(std::string what, size_t done) {
        what_ = std::move(what);
        done_ = done;
        first_step_ = -1;
        start_ = seconds_now();
    }

    void show(const States& states) {
        const double now = seconds_now();
        int64_t step = 0;
        double loss = 0, recall = 0;
        const auto n = static_cast<double>(states.size());
        for (const TrainingState& s : states) {
            step = std::max(step, s.step);
            loss += s.loss / n;
            recall += s.best_recall / n;
        }
        if (first_step_ < 0) { // a resumed head begins in the middle
            first_step_ = step - 1;
        }
        if (!isatty(STDERR_FILENO) || now - shown_ < .2) {
            return;
        }
        shown_ = now;
        const double each =
                (now - start_) / static_cast<double>(step - first_step_);
        const double steps = options_.params.steps;
        const double left = each *
                (steps - static_cast<double>(step) +
                 steps * static_cast<double>(trainings_ - done_ - 1));
        std::fprintf(
                stderr,
                "\r\033[K%s: step %lld of %d, loss %.3f, held-out recall %s, "
                "%.0f s left",
                what_.c_str(),
                static_cast<long long>(step),
                options_.params.steps,
                loss,
                recall < 0 ? "-" : fmt::format("{:.3f}", recall).c_str(),
                left);
    }

    void clear() {
        if (shown_ > 0) {
            std::fprintf(stderr, "\r\033[K");
            shown_ = 0;
        }
    }

   private:
    const Options& options_;
    size_t trainings_, done_ = 0;
    std::string what_;
    int64_t first_step_ = -1;
    double start_ = 0, shown_ = 0;
};

/// Whatever decides the result: a checkpoint of another training is refused.
nlohmann::json config_of(const Options& o, const PartitionSet& set) {
    const TrainingParams& p = o.params;
    return {{"texts", set.texts},
            {"model", set.model},
            {"rope_theta", set.rope.theta},
            {"rope_scaling", set.rope.scaling_text()},
            {"layers", o.layers},
            {"kv_heads", o.kv_heads},
            {"ncell", p.ncell},
            {"sink", p.sink},
            {"window", p.window},
            {"spherical", p.kmeans.spherical},
            {"niter", p.kmeans.niter},
            {"centroid_dtype", name(p.centroid_dtype)},
            {"keys_per_cell", p.keys_per_cell},
            {"width", p.width},
            {"depth", p.depth},
            {"share_input", p.share_input},
            {"share_trunk", p.share_trunk},
            {"dtype", name(p.dtype)},
            {"steps", p.steps},
            {"batch", p.batch},
            {"learning_rate", p.learning_rate},
            {"mass_power", p.mass_power},
            {"blend", p.blend},
            {"device", o.device},
            {"seed", p.seed}};
}

void report_head(
        const TrainedPartition& p,
        const Options& options,
        double seconds,
        nlohmann::json& rows,
        std::vector<std::vector<std::string>>& table) {
    const auto group = static_cast<int>(p.heads.size());
    for (int g = 0; g < group; g++) {
        const HeldOut& h = p.heads[g];
        const bool little = h.far_mass < kLittleFarMass;
        rows.push_back(
                {{"layer", p.layer},
                 {"kv_head", p.kv_head},
                 {"query_head", p.kv_head * group + g},
                 {"ncell", p.partition.ncell()},
                 {"budget", options.params.budget},
                 {"mass_recall", h.recall},
                 {"ceiling", h.ceiling},
                 {"far_mass", h.far_mass},
                 {"little_far_mass", little},
                 {"largest_cell", p.balance.largest},
                 {"empty_cells", p.balance.empty},
                 {"imbalance", p.balance.imbalance},
                 {"keys", p.balance.keys},
                 {"steps", p.steps},
                 {"bytes", p.partition.query->bytes_read()},
                 {"seconds", seconds / group}});
        table.push_back(
                {fmt::format("{}", p.layer),
                 fmt::format("{}", p.kv_head),
                 fmt::format("{}", p.kv_head * group + g),
                 fmt::format("{:.3f}", h.recall),
                 fmt::format("{:.3f}", h.ceiling),
                 fmt::format("{:.4f}{}", h.far_mass, little ? " (little)" : ""),
                 fmt::format("{}", p.steps),
                 fmt::format("{}", p.balance.largest),
                 fmt::format("{:.2f}", p.balance.imbalance),
                 fmt::format("{:.1f}", seconds / group)});
    }
    if (p.heads.empty()) {
        return;
    }
    for (int g = 0; g < group; g++) {
        if (p.heads[g].far_mass < kLittleFarMass) {
            fmt::print(
                    "layer {}, query head {}: a far mass of {:.1e} on the "
                    "held-out text is hardly anything to learn from\n",
                    p.layer,
                    p.kv_head * group + g,
                    p.heads[g].far_mass);
        }
    }
}

/// Trains KV heads of a layer together.
std::vector<TrainedPartition> train(
        const Options& options,
        const std::vector<Trace>& texts,
        int layer,
        const std::vector<int>& kv_heads,
        States& states,
        const std::function<void(const States&)>& callback) {
    if (options.device == "cpu") {
        states.resize(1);
        return {train_partition(
                texts,
                layer,
                kv_heads.front(),
                options.params,
                states.data(),
                [&](const TrainingState&) { callback(states); })};
    }
#ifdef FAISS_SAAP_WITH_CUDA
    gpu::TrainingDevice device;
    device.text_bytes = static_cast<size_t>(options.text_gib * (1u << 30));
    return gpu::train_partitions(
            texts, layer, kv_heads, options.params, &states, callback, device);
#else
    FAISS_THROW_MSG("device = cuda: this is a build without CUDA");
#endif
}

void run(Options options) {
    std::vector<Trace> texts;
    for (const std::string& path : options.traces) {
        texts.emplace_back(path);
    }
    if (options.kv_heads.empty()) {
        options.kv_heads = texts.front().kv_heads;
    }
    PartitionSet set;
    set.model = texts.front().model;
    set.rope = texts.front().rope;
    set.sink = options.params.sink;
    set.window = options.params.window;
    set.seed = options.params.seed;
    for (const Trace& t : texts) {
        set.texts.push_back(t.text);
    }
    TrainingCheckpoint checkpoint(
            options.out, config_of(options, set).dump());
    States states;
    if (options.resume) {
        checkpoint.read(set, states);
    }
    const size_t resumed = set.partitions.size();
    // KV heads that are trained together: one, or those of a layer.
    const size_t together =
            options.device == "cpu" ? 1 : options.kv_heads.size();
    const size_t trainings =
            options.layers.size() * options.kv_heads.size() / together;
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    {
        TrainingLine line(options, trainings);
        size_t done = 0;
        for (int layer : options.layers) {
            for (size_t h = 0; h < options.kv_heads.size(); h += together) {
                const size_t first = done++ * together;
                if (first < resumed) {
                    for (size_t i = first; i < first + together; i++) {
                        report_head(set.partitions[i], options, 0, rows, table);
                    }
                    continue;
                }
                const auto begin = options.kv_heads.begin() + int64_t(h);
                const std::vector<int> kv_heads(begin, begin + int64_t(together));
                line.begin(
                        together > 1
                                ? fmt::format("layer {}", layer)
                                : fmt::format(
                                          "layer {}, KV head {}",
                                          layer,
                                          kv_heads.front()),
                        done - 1);
                const double start = seconds_now();
                double written = start;
                const auto trained = train(
                        options,
                        texts,
                        layer,
                        kv_heads,
                        states,
                        [&](const States& s) {
                            line.show(s);
                            if (seconds_now() - written > kCheckpointSeconds) {
                                checkpoint.write(set, s);
                                written = seconds_now();
                            }
                        });
                line.clear();
                const double seconds = (seconds_now() - start) / double(together);
                for (const TrainedPartition& p : trained) {
                    set.partitions.push_back(p);
                    report_head(p, options, seconds, rows, table);
                }
                states.clear();
                checkpoint.write(set, states);
            }
        }
    }
    write_partitions(set, options.out);
    checkpoint.remove();
    print_table(
            {"layer",
             "kv head",
             "query head",
             "recall",
             "ceiling",
             "far mass",
             "steps",
             "largest cell",
             "imbalance",
             "seconds"},
            table);
    if (!options.json.empty()) {
        write_json(options.json, config_of(options, set), rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    TrainingParams& p = o.params;
    CLI::App app{
            "Learns partitions of the de-rotated keys and, for each, a "
            "classifier that sends queries to the cells that hold their "
            "attention mass. Prints, per query head, the mass recall at 5 % of "
            "the far keys of the last text, which is held out (of a single "
            "text, its last quarter), and what the partition would allow."};
    add_input(app, "--trace", o.traces, "traces; the last one is held out")
            ->required()
            ->delimiter(',');
    app.add_option("--layers", o.layers, "layers, comma-separated")
            ->required()
            ->delimiter(',');
    app.add_option(
               "--kv-heads",
               o.kv_heads,
               "KV heads, comma-separated; all of the first trace by default")
            ->delimiter(',');
    app.add_option("--ncell", p.ncell, "cells of each partition")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    add_output(app, "--out", o.out, "file for the partitions (.saap)")
            ->required();
    app.add_option("--sink", p.sink, "first tokens, no targets")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option("--window", p.window, "most recent tokens, no targets")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_flag(
            "--spherical",
            p.kmeans.spherical,
            "k-means by inner product with unit centroids instead of L2");
    app.add_flag(
            "--fp32-centroids",
            o.fp32_centroids,
            "centroids as float32 instead of bfloat16");
    app.add_option("--niter", p.kmeans.niter, "k-means iterations")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--width", p.width, "of the hidden layers")
            ->check(CLI::Range(1, 1024))
            ->capture_default_str();
    app.add_option(
               "--depth", p.depth, "residual blocks; 0: one rectified hidden layer")
            ->check(CLI::Range(0, 16))
            ->capture_default_str();
    app.add_flag(
            "--separate-inputs",
            o.separate_inputs,
            "an input matrix per query head instead of one for the group");
    app.add_flag(
            "--separate-trunks",
            o.separate_trunks,
            "a whole network per query head instead of one for the group");
    app.add_flag("--fp32", o.fp32, "weights as float32 instead of bfloat16");
    app.add_option("--steps", p.steps, "mini-batches at most")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--batch", p.batch, "tokens of a mini-batch")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option("--learning-rate", p.learning_rate, "of AdamW, at its peak")
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
    app.add_option(
               "--mass-power",
               p.mass_power,
               "a query counts by its far mass to this power")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_flag(
            "!--no-blend",
            p.blend,
            "the classifier alone, without weights for a BlendAssigner");
    app.add_option("--seed", p.seed, "of k-means, network and mini-batches")
            ->capture_default_str();
    app.add_flag(
            "--resume",
            o.resume,
            "go on where an interrupted training with the same options was");
    app.add_option("--device", o.device, "where to train")
            ->check(CLI::IsMember({"cpu", "cuda"}))
            ->capture_default_str();
    app.add_option(
               "--text-gib",
               o.text_gib,
               "GiB of a device's memory that a layer's texts may take, others "
               "are read from the host; 0: as they fit")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    p.share_input = !o.separate_inputs && !o.separate_trunks;
    p.share_trunk = !o.separate_trunks;
    p.centroid_dtype = o.fp32_centroids ? DType::float32 : DType::bfloat16;
    p.dtype = o.fp32 ? DType::float32 : DType::bfloat16;
    return run_program(app, [&] { run(o); });
}
