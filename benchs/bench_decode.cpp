/// One decode step of one layer: what the memory allows, dense attention, and
/// sparse attention with its stages, all in one run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>

#include <faiss/impl/FaissAssert.h>
#include <fmt/core.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/attend_slots.h>

#include "common/GroundTruth.h"
#include "common/decode.h"
#include "common/memory.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

/// Candidates of `sparse_codes` for each key that is read.
constexpr double kRefine = 6;

/// A key and its value.
struct RowPair {
    const char *key, *value;
};

/// One sequence, its cache and what it asks.
struct Sequence {
    std::mt19937 random;
    SyntheticCache cache;
    const KvView& kv = cache.kv;
    std::unique_ptr<AttentionAdapter> adapter;
    std::unique_ptr<AttentionAdapter> coded; ///< ranks keys by their codes
    int64_t ranked = 0;     ///< its sequence, routed by centroids
    int64_t id = 0;         ///< routed by centroids
    int64_t classified = 0; ///< the same cells, routed by a classifier
    std::vector<float> queries; ///< heads_q * d
    ProbedCells probed;
    std::vector<RowPair> rows; ///< those it reads

    Sequence(const DecodeOptions& o, unsigned seed)
            : random(seed), cache(o.shape(o.tokens), random) {
        queries = decode_queries(o, random);
        AdapterParams params;
        params.heads_q = o.heads_q;
        params.heads_kv = o.heads_kv;
        params.d = o.d;
        params.sink = o.sink;
        params.window = o.window;
        params.policy.nprobe = o.ncell;
        params.policy.max_selectivity = o.selectivity;
        adapter = std::make_unique<AttentionAdapter>(params);
        id = adapter->create(centre_partitions(o, cache.centres));
        classified = adapter->create(
                classifier_partitions(o, cache.centres, random));
        // The last token stays out: the step appends it.
        KvView prefix = kv;
        prefix.length--;
        adapter->append(id, prefix);
        adapter->append(classified, kv);
        params.key_codes = true;
        params.policy.refine = kRefine;
        coded = std::make_unique<AttentionAdapter>(params);
        ranked = coded->create(centre_partitions(o, cache.centres));
        coded->append(ranked, kv);
    }
    std::vector<SequenceInput> batch() const {
        return {{id, kv}};
    }
};

// Narrow loads leave a sixth to a third of the bandwidth unused, as fewer of
// them wait at a time.
#if defined(__x86_64__) && defined(__GNUC__)
#define WIDEST_LOADS __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WIDEST_LOADS
#endif

/// Reads bytes without computing: what the memory system gives.
WIDEST_LOADS uint64_t read_all(const char* data, size_t bytes) {
    const auto* words = reinterpret_cast<const uint64_t*>(data);
    uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < bytes / 8; i++) {
        sum += words[i];
    }
    return sum;
}

using Line = uint64_t __attribute__((vector_size(64)));

/// Reads rows without computing. Every load is an instruction of its own: one
/// executed again for each line of a row looks like a stride, and the hardware
/// fetches what lies behind the row. Each `bytes` must be 64 at least.
inline __attribute__((always_inline)) uint64_t read_rows_of(
        const RowPair* rows,
        size_t n,
        size_t bytes) {
    constexpr size_t kAhead = 16;
    Line sum = {};
    for (size_t i = 0; i < n; i++) {
        const RowPair& next = rows[std::min(i + kAhead, n - 1)];
        for (size_t b = 0; b < bytes; b += 256) {
#pragma GCC unroll 4
            for (size_t c = 0; c < 256; c += 64) {
                __builtin_prefetch(next.key + std::min(b + c, bytes - 1));
            }
#pragma GCC unroll 4
            for (size_t c = 0; c < 256; c += 64) {
                __builtin_prefetch(next.value + std::min(b + c, bytes - 1));
            }
        }
        for (size_t b = 0; b < bytes; b += 256) {
#pragma GCC unroll 4
            for (size_t c = 0; c < 256; c += 64) {
                Line key, value;
                const size_t at = std::min(b + c, bytes - 64);
                std::memcpy(&key, rows[i].key + at, 64);
                std::memcpy(&value, rows[i].value + at, 64);
                sum += key + value;
            }
        }
    }
    uint64_t total = 0;
    for (size_t j = 0; j < 8; j++) {
        total += sum[j];
    }
    return total;
}

/// The same. Of a usual length with no more instructions than it takes: fewer
/// of them between requests leave room for more requests at a time.
WIDEST_LOADS uint64_t read_rows(const RowPair* rows, size_t n, size_t bytes) {
    switch (bytes) {
        case 128:
            return read_rows_of(rows, n, 128);
        case 256:
            return read_rows_of(rows, n, 256);
        case 512:
            return read_rows_of(rows, n, 512);
        default:
            return read_rows_of(rows, n, bytes);
    }
}

/// The rows of some slots of each KV head, in turns by 256 tokens: in this
/// order several lie on one page.
std::vector<RowPair> in_turns(
        const KvView& kv,
        const std::vector<std::vector<int32_t>>& slots) {
    std::vector<RowPair> rows;
    std::vector<size_t> taken(slots.size(), 0);
    for (int64_t end = 256; end < kv.length + 256; end += 256) {
        for (size_t h = 0; h < slots.size(); h++) {
            for (size_t& i = taken[h];
                 i < slots[h].size() && slots[h][i] < end;
                 i++) {
                const auto head = static_cast<int>(h);
                rows.push_back(
                        {static_cast<const char*>(kv.key(head, slots[h][i])),
                         static_cast<const char*>(
                                 kv.value(head, slots[h][i]))});
            }
        }
    }
    return rows;
}

volatile uint64_t sink_of_sums; ///< keeps reads from being optimised away

struct Stage {
    std::string name;
    double bytes;
    std::function<void(Sequence&)> work;
    std::function<void(Sequence&)> before = {}; ///< is not timed
};

void run(const DecodeOptions& o) {
    FAISS_THROW_IF_NOT_FMT(
            o.heads_q % o.heads_kv == 0,
            "heads-q = %d must be a multiple of heads-kv = %d",
            o.heads_q,
            o.heads_kv);
    const DType dtype = o.shape(o.tokens).dtype;
    FAISS_THROW_IF_NOT_FMT(
            o.d * element_size(dtype) >= 64,
            "d = %d: a key must have 64 bytes at least",
            o.d);
    const double row = 2.0 * o.d * element_size(dtype); // a key and a value
    const double cache = row * o.heads_kv * o.tokens;
    const int group = o.heads_q / o.heads_kv;
    // Enough copies in turn that no cache helps.
    const double wanted =
            std::max<double>(o.sequences, std::ceil(o.buffer_gib * (1u << 30) / cache));
    check_fits_memory(
            wanted * cache,
            fmt::format(
                    "buffers = {:g} and sequences = {}: caches", o.buffer_gib, o.sequences));
    const int copies = static_cast<int>(wanted);
    std::vector<std::unique_ptr<Sequence>> all;
    Progress progress("making caches", copies);
    for (int i = 0; i < copies; i++) {
        all.push_back(std::make_unique<Sequence>(o, 1 + i));
        progress.advance();
    }

    // The last token, which a step appends; then route and attend see the state that it leaves.
    const auto take_back = [&](AttentionAdapter& adapter, int64_t id, const KvView& kv) {
        adapter.truncate(id, o.tokens - 1, kv);
    };
    std::vector<double> append_seconds;
    for (int r = 0; r < o.repeat; r++) {
        for (auto& s : all) {
            take_back(*s->adapter, s->id, s->kv);
            const double start = seconds_now();
            s->adapter->append(s->id, s->kv);
            append_seconds.push_back(seconds_now() - start);
        }
    }
    double keys_read = 0, far_keys = 0, keys_ranked = 0;
    std::vector<float> out(int64_t(o.heads_q) * o.d), lse(o.heads_q);
    std::vector<AttendStats> stats(o.heads_q);
    for (auto& s : all) {
        s->coded->attend(
                {{s->ranked, s->kv}}, s->queries.data(),
                {out.data(), lse.data(), stats.data()});
        for (int h = 0; h < o.heads_kv; h++) {
            keys_ranked += stats[h * group].keys_ranked;
        }
        s->probed = s->adapter->route(s->batch(), s->queries.data());
        s->adapter->attend_preassigned(
                s->batch(), s->queries.data(), s->probed,
                {out.data(), lse.data(), stats.data()});
        std::vector<std::vector<int32_t>> read;
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
            read.push_back(std::move(slots));
        }
        s->rows = in_turns(s->kv, read);
    }
    const double rows_read =
            keys_read / copies + double(o.heads_kv) * (o.sink + o.window);
    const double attend_bytes = row * rows_read;
    const auto bytes_of_routing = [&](int64_t sequence) {
        double bytes = 4.0 * o.heads_kv * o.ncell; // counts
        for (int h = 0; h < o.heads_kv; h++) {
            const Partition& p = all[0]->adapter->partition(sequence, h);
            bytes += static_cast<double>(p.query->bytes_read());
        }
        return bytes;
    };
    const double route_bytes = bytes_of_routing(all[0]->id);
    const double classifier_bytes = bytes_of_routing(all[0]->classified);

    std::vector<Stage> stages = {
            {"bandwidth", cache,
             [&](Sequence& s) {
                 const size_t piece = 1 << 20, size = s.cache.k.size();
                 const size_t n = (size + piece - 1) / piece; // of keys, and of values
                 uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
                 for (size_t i = 0; i < 2 * n; i++) {
                     const size_t begin = i % n * piece;
                     sum += read_all(
                             (i < n ? s.cache.k : s.cache.v).data() + begin,
                             std::min(piece, size - begin));
                 }
                 sink_of_sums = sum;
             }},
            {"gather", attend_bytes,
             [&](Sequence& s) {
                 const int64_t n = static_cast<int64_t>(s.rows.size());
                 const size_t bytes = o.d * element_size(dtype);
                 constexpr int64_t kPiece = 2048;
                 uint64_t sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : sum)
                 for (int64_t i = 0; i < n; i += kPiece) {
                     sum += read_rows(
                             s.rows.data() + i, std::min(kPiece, n - i), bytes);
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
                 s.adapter->append(s.id, s.kv);
                 s.adapter->attend(
                         s.batch(), s.queries.data(), {out.data(), lse.data()});
             },
             [&](Sequence& s) { take_back(*s.adapter, s.id, s.kv); }},
            {"sparse_codes",
             attend_bytes + route_bytes +
                     keys_ranked / copies * KeyCodes::code_size(o.d),
             [&](Sequence& s) {
                 s.coded->append(s.ranked, s.kv);
                 s.coded->attend(
                         {{s.ranked, s.kv}}, s.queries.data(),
                         {out.data(), lse.data()});
             },
             [&](Sequence& s) { take_back(*s.coded, s.ranked, s.kv); }},
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

    o.choose(stages, /*beside=*/"append");

    // Stages in turns, so that what disturbs one disturbs all.
    std::vector<std::vector<double>> seconds(stages.size());
    Progress measuring("measuring", o.repeat);
    for (int r = 0; r < o.repeat; r++) {
        for (size_t i = 0; i < stages.size(); i++) {
            double spent = 0;
            for (int b = 0; b < o.sequences; b++) {
                Sequence& s = *all[(r * stages.size() + i + b) % all.size()];
                if (stages[i].before) {
                    stages[i].before(s);
                }
                const double start = seconds_now();
                stages[i].work(s);
                spent += seconds_now() - start;
            }
            seconds[i].push_back(spent);
        }
        measuring.advance();
    }

    const double append = percentile(append_seconds, 0.5) * o.sequences;
    std::vector<DecodeStage> rows;
    for (size_t i = 0; i < stages.size(); i++) {
        rows.push_back({stages[i].name,
                        stages[i].bytes * o.sequences,
                        percentile(seconds[i], 0.5),
                        percentile(seconds[i], 0.99)});
    }
    rows.push_back({"append",
                    double(o.sequences) * o.heads_kv * o.d * element_size(dtype),
                    append,
                    percentile(append_seconds, 0.99) * o.sequences});
    report_decode(
            o,
            rows,
            keys_read / far_keys,
            o.huge_pages ? "CPU, 2 MiB pages" : "CPU, 4 KiB pages");
}

} // namespace

int main(int argc, char** argv) {
    DecodeOptions o;
    CLI::App app{
            "Times one decode step of one layer by stage, dense attention and "
            "the read bandwidth of the machine beside it. Keys lie around the "
            "centres of their cells, whose sizes are skewed as in real "
            "partitions."};
    o.add_to(app, {"cpu", "cuda"});
    add_number(app, "--sequences", o.sequences, "sequences in the batch");
    app.add_option(
               "--ragged",
               o.ragged,
               "how far the sequences' lengths differ from --tokens at most, as a "
               "fraction of it; on a device")
            ->check(CLI::Range(0.0, 0.95))
            ->capture_default_str();
    app.add_option(
               "--stages",
               o.stages,
               "stages to time beside bandwidth and dense (on the CPU append, too), by "
               "their names in the table; all if none is named")
            ->delimiter(',');
    add_number(app, "--heads-q", o.heads_q, "query heads");
    add_number(app, "--repeat", o.repeat, "runs of each stage");
    add_number(
            app, "--buffers", o.buffer_gib, "GiB of caches, used in turn");
    app.add_flag(
            "--fp32-centroids",
            o.fp32_centroids,
            "centroids that bfloat16 does not hold, as training with the option of "
            "this name makes them");
    app.add_option("--selectivity", o.selectivity, "far keys read per KV head")
            ->check(CLI::Range(0.0, 1.0))
            ->capture_default_str();
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] {
        for (const int64_t tokens : o.lengths()) {
            check_far_keys(tokens - 1, o.sink, o.window);
        }
        if (o.device == "cpu") {
            FAISS_THROW_IF_NOT_FMT(
                    o.ragged == 0, "ragged = %g: on the CPU sequences are alike", o.ragged);
            run(o);
            return;
        }
#ifdef FAISS_SAAP_WITH_CUDA
        decode_on_device(o);
#else
        FAISS_THROW_MSG("device = cuda: this is a build without CUDA");
#endif
    });
}
