/// One decode step of one layer: what the memory allows, dense attention, and
/// sparse attention with its stages, all in one run.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include <faiss/IndexFlat.h>
#include <fmt/core.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/attend_slots.h>

#include "common/CacheOptions.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

struct Options : CacheOptions {
    int sequences = 1, heads_q = 32, repeat = 21;
    double selectivity = 0.05, buffer_gib = 2;
    std::string json;
};

std::shared_ptr<QuantizerAssigner> flat_assigner(
        const std::vector<float>& centres,
        int d,
        faiss::MetricType metric) {
    auto flat = std::make_shared<faiss::IndexFlat>(d, metric);
    flat->add(static_cast<faiss::Index::idx_t>(centres.size()) / d, centres.data());
    return std::make_shared<QuantizerAssigner>(flat, NEEDS_POST_ROPE);
}

/// One sequence, its cache and what it asks.
struct Sequence {
    std::mt19937 random;
    SyntheticCache cache;
    const KvView& kv = cache.kv;
    std::unique_ptr<AttentionAdapter> adapter;
    int64_t id = 0;         ///< routed by centroids
    int64_t classified = 0; ///< the same cells, routed by a classifier
    std::vector<float> queries; ///< heads_q * d
    ProbedCells probed;
    std::vector<std::vector<int32_t>> slots; ///< per KV head, those it reads

    Sequence(const Options& o, unsigned seed)
            : random(seed), cache(o.shape(o.tokens), random) {
        std::normal_distribution<float> normal;
        HeadPartitions by_centroids, by_classifier;
        queries.resize(int64_t(o.heads_q) * o.d);
        const int group = o.heads_q / o.heads_kv;
        for (int h = 0; h < o.heads_kv; h++) {
            Partition p;
            p.key = flat_assigner(cache.centres[h], o.d, faiss::METRIC_L2);
            p.query = flat_assigner(
                    cache.centres[h], o.d, faiss::METRIC_INNER_PRODUCT);
            by_centroids.push_back({p});
            // Time does not depend on what a network has learnt.
            ClassifierShape shape;
            shape.d = o.d;
            shape.group = group;
            shape.ncell = o.ncell;
            std::vector<float> parameters(parameter_count(shape));
            for (float& f : parameters) {
                f = 0.1f * normal(random);
            }
            p.query = std::make_shared<QueryClassifier>(
                    shape, parameters.data());
            p.rope.d = o.d;
            by_classifier.push_back({p});
            // The group looks for the same few things.
            std::vector<float> topic(o.d);
            for (float& f : topic) {
                f = normal(random);
            }
            for (int64_t i = 0; i < int64_t(group) * o.d; i++) {
                queries[int64_t(h) * group * o.d + i] =
                        topic[i % o.d] + 0.5f * normal(random);
            }
        }
        AdapterParams params;
        params.heads_q = o.heads_q;
        params.heads_kv = o.heads_kv;
        params.d = o.d;
        params.sink = o.sink;
        params.window = o.window;
        params.policy.nprobe = o.ncell;
        params.policy.max_selectivity = o.selectivity;
        adapter = std::make_unique<AttentionAdapter>(params);
        id = adapter->create(by_centroids);
        classified = adapter->create(by_classifier);
        // The last token stays out: the step appends it.
        KvView prefix = kv;
        prefix.length--;
        adapter->append(id, prefix);
        adapter->append(classified, kv);
    }
    std::vector<SequenceInput> batch() const {
        return {{id, kv}};
    }
};

/// Reads bytes without computing: what the memory system gives.
uint64_t read_all(const char* data, size_t bytes) {
    const auto* words = reinterpret_cast<const uint64_t*>(data);
    uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < bytes / 8; i++) {
        sum += words[i];
    }
    return sum;
}

volatile uint64_t sink_of_sums; ///< keeps reads from being optimised away

struct Stage {
    std::string name;
    double bytes;
    std::function<void(Sequence&)> work;
};

void run(const Options& o) {
    FAISS_THROW_IF_NOT_FMT(
            o.heads_q % o.heads_kv == 0,
            "heads-q = %d must be a multiple of heads-kv = %d",
            o.heads_q,
            o.heads_kv);
    const DType dtype = o.shape(o.tokens).dtype;
    const double row = 2.0 * o.d * element_size(dtype); // a key and a value
    const double cache = row * o.heads_kv * o.tokens;
    const int group = o.heads_q / o.heads_kv;
    // Enough copies in turn that no cache helps.
    const int copies = std::max<int>(
            o.sequences, static_cast<int>(std::ceil(o.buffer_gib * (1u << 30) / cache)));
    std::vector<std::unique_ptr<Sequence>> all;
    Progress progress("making caches", copies);
    for (int i = 0; i < copies; i++) {
        all.push_back(std::make_unique<Sequence>(o, 1 + i));
        progress.advance();
    }

    // The append comes first in a step; then route and attend see the state
    // that it leaves.
    std::vector<double> append_seconds;
    for (int r = 0; r < o.repeat; r++) {
        for (auto& s : all) {
            s->adapter->truncate(s->id, o.tokens - 1, s->kv);
            const double start = seconds_now();
            s->adapter->append(s->id, s->kv);
            append_seconds.push_back(seconds_now() - start);
        }
    }
    double keys_read = 0, far_keys = 0;
    std::vector<float> out(int64_t(o.heads_q) * o.d), lse(o.heads_q);
    std::vector<AttendStats> stats(o.heads_q);
    for (auto& s : all) {
        s->probed = s->adapter->route(s->batch(), s->queries.data());
        s->adapter->attend_preassigned(
                s->batch(), s->queries.data(), s->probed,
                {out.data(), lse.data(), stats.data()});
        for (int h = 0; h < o.heads_kv; h++) {
            keys_read += static_cast<double>(stats[h * group].keys_read);
            far_keys += static_cast<double>(stats[h * group].far_keys);
            std::vector<int32_t> slots;
            for (int64_t i = s->probed.begin[h]; i < s->probed.begin[h + 1];
                 i++) {
                const auto list =
                        s->adapter->lists(s->id, h).slots(s->probed.cells[i]);
                slots.insert(slots.end(), list.begin(), list.end());
            }
            for (int64_t j = 0; j < o.sink; j++) {
                slots.push_back(static_cast<int32_t>(j));
            }
            for (int64_t j = o.tokens - o.window; j < o.tokens; j++) {
                slots.push_back(static_cast<int32_t>(j));
            }
            std::sort(slots.begin(), slots.end());
            s->slots.push_back(slots);
        }
    }
    const double rows_read =
            keys_read / copies + double(o.heads_kv) * (o.sink + o.window);
    const double attend_bytes = row * rows_read;
    double classifier_bytes = 4.0 * o.heads_kv * o.ncell; // counts
    for (int h = 0; h < o.heads_kv; h++) {
        const Sequence& s = *all[0];
        classifier_bytes += static_cast<double>(
                s.adapter->partition(s.classified, h).query->bytes_read());
    }
    const double route_bytes =
            4.0 * o.heads_kv * o.ncell * (o.d + 1); // float32 means, counts

    const std::vector<Stage> stages = {
            {"bandwidth", cache,
             [&](Sequence& s) {
                 const size_t piece = 1 << 20, n = s.cache.k.size() / piece;
                 uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
                 for (size_t i = 0; i < 2 * n; i++) {
                     sum += read_all(
                             (i < n ? s.cache.k : s.cache.v).data() + i % n * piece, piece);
                 }
                 sink_of_sums = sum;
             }},
            {"gather", attend_bytes,
             [&](Sequence& s) {
                 uint64_t sum = 0;
                 const size_t bytes = o.d * element_size(dtype);
                 constexpr size_t kAhead = 32;
#pragma omp parallel for schedule(dynamic) reduction(+ : sum)
                 for (int h = 0; h < o.heads_kv; h++) {
                     const auto& slots = s.slots[h];
                     for (size_t i = 0; i < slots.size(); i++) {
                         const auto next = slots[std::min(i + kAhead, slots.size() - 1)];
                         for (size_t b = 0; b < bytes; b += 64) {
                             __builtin_prefetch(static_cast<const char*>(s.kv.key(h, next)) + b, 0, 2);
                             __builtin_prefetch(static_cast<const char*>(s.kv.value(h, next)) + b, 0, 2);
                         }
                         sum += read_all(static_cast<const char*>(s.kv.key(h, slots[i])), bytes);
                         sum += read_all(static_cast<const char*>(s.kv.value(h, slots[i])), bytes);
                     }
                 }
                 sink_of_sums = sum;
             }},
            {"dense", cache,
             [&](Sequence& s) {
                 attend_dense(
                         s.kv, o.heads_q, s.queries.data(),
                         1 / std::sqrt(float(o.d)), 0, o.tokens, out.data(),
                         lse.data());
             }},
            {"sparse", attend_bytes + route_bytes,
             [&](Sequence& s) {
                 s.adapter->attend(
                         s.batch(), s.queries.data(), {out.data(), lse.data()});
             }},
            {"route", route_bytes,
             [&](Sequence& s) {
                 s.adapter->route(s.batch(), s.queries.data());
             }},
            {"route_classifier", classifier_bytes,
             [&](Sequence& s) {
                 s.adapter->route({{s.classified, s.kv}}, s.queries.data());
             }},
            {"attend", attend_bytes,
             [&](Sequence& s) {
                 s.adapter->attend_preassigned(
                         s.batch(), s.queries.data(), s.probed, {out.data(), lse.data()});
             }}};

    // Stages in turns, so that what disturbs one disturbs all.
    std::vector<std::vector<double>> seconds(stages.size());
    Progress measuring("measuring", o.repeat);
    for (int r = 0; r < o.repeat; r++) {
        for (size_t i = 0; i < stages.size(); i++) {
            double spent = 0;
            for (int b = 0; b < o.sequences; b++) {
                Sequence& s = *all[(r * stages.size() + i + b) % all.size()];
                const double start = seconds_now();
                stages[i].work(s);
                spent += seconds_now() - start;
            }
            seconds[i].push_back(spent);
        }
        measuring.advance();
    }

    const double append = percentile(append_seconds, 0.5) * o.sequences;
    const double peak =
            cache * o.sequences / percentile(seconds[0], 0.5); // bytes per s
    const double dense_seconds = percentile(seconds[2], 0.5);
    nlohmann::json rows = nlohmann::json::array();
    std::vector<std::vector<std::string>> table;
    const auto report = [&](const std::string& name, double bytes, double median,
                            double p99) {
        const double fraction = bytes / median / peak;
        rows.push_back({{"stage", name},
                        {"us", 1e6 * median},
                        {"p99_us", 1e6 * p99},
                        {"bytes", bytes},
                        {"fraction_of_bandwidth", fraction}});
        table.push_back({name,
                         fmt::format("{:.1f}", 1e6 * median),
                         fmt::format("{:.1f}", 1e6 * p99),
                         fmt::format("{:.1f}", bytes / (1 << 20)),
                         fmt::format("{:.2f}", fraction),
                         fmt::format("{:.1f}x", dense_seconds / median)});
    };
    for (size_t i = 0; i < stages.size(); i++) {
        const double extra = stages[i].name == "sparse" ? append : 0;
        report(stages[i].name,
               stages[i].bytes * o.sequences,
               percentile(seconds[i], 0.5) + extra,
               percentile(seconds[i], 0.99) + extra);
    }
    report("append",
           double(o.sequences) * o.heads_kv * o.d * element_size(dtype),
           append,
           percentile(append_seconds, 0.99) * o.sequences);
    fmt::print(
            "{} x {} tokens, {} / {} heads, d {}, {}, {} pages; {:.2f} % of the "
            "far keys read per KV head; {:.1f} GB/s read bandwidth\n",
            o.sequences,
            o.tokens,
            o.heads_q,
            o.heads_kv,
            o.d,
            o.dtype,
            o.huge_pages ? "2 MiB" : "4 KiB",
            100 * keys_read / far_keys,
            peak / 1e9);
    print_table(
            {"stage", "us", "p99 us", "MiB", "of bandwidth", "dense / stage"},
            table);
    if (!o.json.empty()) {
        nlohmann::json config = o.config();
        config["sequences"] = o.sequences;
        config["heads_q"] = o.heads_q;
        config["selectivity"] = keys_read / far_keys;
        config["bandwidth_bytes_per_s"] = peak;
        write_json(o.json, config, rows);
    }
}

} // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app{
            "Times one decode step of one layer by stage, dense attention and "
            "the read bandwidth of the machine beside it. Keys lie around the "
            "centres of their cells, whose sizes are skewed as in real "
            "partitions."};
    o.add_to(app);
    add_number(app, "--sequences", o.sequences, "sequences in the batch");
    add_number(app, "--heads-q", o.heads_q, "query heads");
    add_number(app, "--repeat", o.repeat, "runs of each stage");
    add_number(
            app, "--buffers", o.buffer_gib, "GiB of caches, used in turn");
    app.add_option("--selectivity", o.selectivity, "far keys read per KV head")
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    app.add_option("--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program([&] { run(o); });
}
