// bench_decode --device cuda.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include <cuda_runtime_api.h>
#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include "DeviceMemory.h"
#include "common/decode.h"
#include "common/report.h"
#include "read_kernels.h"

namespace faiss_saap::benchs {

namespace {

/// Replays before those that are timed: until the cells of keys that leave later are found by
/// the steps before (docs/gpu.md), as in all of a longer text.
constexpr int kWarmUp = 20;

/// A captured stage.
class Graph {
   public:
    Graph(cudaStream_t stream, const std::function<void()>& launch) {
        cudaGraph_t graph;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        launch();
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&step_, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    Graph(Graph&& other) noexcept {
        std::swap(step_, other.step_);
    }
    ~Graph() {
        if (step_) {
            cudaGraphExecDestroy(step_);
        }
    }
    void launch(cudaStream_t stream) const {
        check(cudaGraphLaunch(step_, stream));
    }

   private:
    cudaGraphExec_t step_ = nullptr;
};

/// Keys and values of a batch of sequences.
struct Cache {
    std::vector<DeviceMemory> k, v;
    std::vector<DeviceMemory> offsets; ///< of the rows that each sequence reads
    std::vector<int64_t> rows;
};

/// A layer of a model: its weights, and the sequences' lists.
struct Layer {
    Cache* cache = nullptr; ///< other layers may have the same
    std::unique_ptr<gpu::GpuAttentionAdapter> adapter, classifying;
    std::unique_ptr<gpu::GpuAttentionAdapter> all_dense; ///< null: not of every layer
    std::unique_ptr<gpu::GpuBatch> batch, classified, dense;
    gpu::GpuProbedCells probed;
    std::vector<DeviceMemory> probed_memory;
};

} // namespace

void decode_on_device(const DecodeOptions& o) {
    using gpu::GpuAttentionAdapter;
    gpu::require_device(0);
    std::mt19937 random(1);
    const DType dtype = o.shape(o.tokens).dtype;
    FAISS_THROW_IF_NOT_FMT(
            dtype != DType::float32, "dtype = %s: on a device there are f16 and bf16",
            o.dtype.c_str());
    const auto element = static_cast<int64_t>(element_size(dtype));
    const double row = 2.0 * o.d * element;
    // Room for the tokens that the replays append.
    const std::vector<int64_t> length = o.lengths();
    const int64_t longest = *std::max_element(length.begin(), length.end());
    const int64_t all_tokens =
            std::accumulate(length.begin(), length.end(), int64_t(0));
    const int64_t room = longest + 16 * (o.repeat + 8);
    const int64_t slot_bytes = int64_t(o.heads_kv) * o.d * element;
    // What a layer reads is not in the L2 when its turn comes again: its sink, its window and
    // its share of the far keys; and its weights and, of each cell, its count and the sector
    // where its extents begin, which may stay there longer than keys and values. So there
    // are more layers than caches: as many for each, as the first layers follow the last.
    constexpr double kManyCaches = 256 << 20, kManyWeights = 128 << 20; // the L2 has 50
    constexpr double kOfCell = 4 + 32;                                  // bytes
    const double step = row * o.heads_kv *
            (static_cast<double>(o.sequences) * (o.sink + o.window) +
             o.selectivity * static_cast<double>(all_tokens));
    const double beside =
            double(o.heads_kv) * o.ncell * (2.0 * o.d + kOfCell * o.sequences);
    const int caches = std::max(2, static_cast<int>(std::ceil(kManyCaches / step)));
    const int layers =
            caches * std::max(1, static_cast<int>(std::ceil(kManyWeights / beside / caches)));

    const SyntheticCache host(o.shape(longest), random);
    const std::vector<float> queries = decode_queries(o, random);
    std::vector<char> typed(queries.size() * element);
    from_float(
            dtype, queries.data(), static_cast<int64_t>(queries.size()), typed.data());
    std::vector<char> all_queries;
    for (int s = 0; s < o.sequences; s++) {
        all_queries.insert(all_queries.end(), typed.begin(), typed.end());
    }
    const DeviceMemory d_queries(all_queries.data(), all_queries.size());

    AdapterParams params;
    params.heads_q = o.heads_q;
    params.heads_kv = o.heads_kv;
    params.d = o.d;
    params.sink = o.sink;
    params.window = o.window;
    params.policy.nprobe = o.ncell;
    params.policy.max_selectivity = o.selectivity;
    AdapterParams all_dense = params;
    all_dense.window = room;
    const auto centres = centre_partitions(o, host.centres);
    const auto classifiers = classifier_partitions(o, host.centres, random);

    const auto rows_q = int64_t(o.sequences) * o.heads_q;
    const DeviceMemory output(rows_q * o.d * sizeof(float)),
            lse(rows_q * sizeof(float)), stats(rows_q * sizeof(AttendStats)),
            sink(16);
    AttendOutput out;
    out.output = output.as<float>();
    out.lse = lse.as<float>();
    cudaStream_t stream;
    check(cudaStreamCreate(&stream));

    std::vector<Cache> all_caches(caches);
    for (Cache& cache : all_caches) {
        for (int s = 0; s < o.sequences; s++) {
            for (auto* side : {&cache.k, &cache.v}) {
                side->emplace_back(room * slot_bytes);
                check(cudaMemset(side->back().as(), 0, room * slot_bytes));
                const Buffer& from = side == &cache.k ? host.k : host.v;
                check(cudaMemcpy(
                        side->back().as(),
                        from.data(),
                        length[s] * slot_bytes,
                        cudaMemcpyHostToDevice));
            }
        }
    }
    std::vector<Layer> all(layers);
    Progress progress("making layers", layers);
    for (int l = 0; l < layers; l++) {
        Layer& layer = all[l];
        Cache& cache = all_caches[l % caches];
        const bool is_first = l < caches; // of those with this cache
        layer.cache = &cache;
        layer.adapter = std::make_unique<GpuAttentionAdapter>(params, centres);
        layer.classifying = std::make_unique<GpuAttentionAdapter>(params, classifiers);
        if (is_first) {
            layer.all_dense = std::make_unique<GpuAttentionAdapter>(all_dense, centres);
        }
        GpuAttentionAdapter& adapter = *layer.adapter;
        GpuAttentionAdapter& classifying = *layer.classifying;
        std::vector<SequenceInput> batch, classified, dense_batch;
        for (int s = 0; s < o.sequences; s++) {
            SequenceInput in;
            in.kv = KvView::token_major(
                    cache.k[s].as(),
                    cache.v[s].as(),
                    dtype,
                    room,
                    o.heads_kv,
                    o.d,
                    o.d);
            for (auto [to, inputs] :
                 {std::pair{&adapter, &batch},
                  std::pair{&classifying, &classified},
                  std::pair{layer.all_dense.get(), &dense_batch}}) {
                if (!to) {
                    continue;
                }
                in.sequence = to->create({}, room);
                in.q_len = length[s] - 1; // the step appends the last one
                to->append(*to->plan({in}, stream), stream);
                in.q_len = 1;
                inputs->push_back(in);
            }
        }
        layer.batch = adapter.plan(batch, stream);
        layer.classified = classifying.plan(classified, stream);
        // The state that the stages after the append see.
        adapter.append(*layer.batch, stream);
        classifying.append(*layer.classified, stream);
        if (is_first) {
            layer.dense = layer.all_dense->plan(dense_batch, stream);
            layer.all_dense->append(*layer.dense, stream);
        }
        gpu::GpuProbedCells cells;
        cells.stride = layer.batch->cells();
        const int64_t rows = int64_t(o.sequences) * o.heads_kv;
        layer.probed_memory.emplace_back(rows * cells.stride * sizeof(int32_t));
        cells.cells = layer.probed_memory.back().as<int32_t>();
        layer.probed_memory.emplace_back(rows * sizeof(int32_t));
        cells.count = layer.probed_memory.back().as<int32_t>();
        adapter.route(*layer.batch, d_queries.as(), cells, nullptr, stream);
        layer.probed = cells;
        check(cudaStreamSynchronize(stream));
        progress.advance();
        if (!is_first) {
            continue;
        }
        // The rows that a step reads, in the order in which it reads them.
        std::vector<int32_t> cell(rows * cells.stride), count(rows);
        check(cudaMemcpy(
                cell.data(), cells.cells, cell.size() * 4, cudaMemcpyDeviceToHost));
        check(cudaMemcpy(
                count.data(), cells.count, count.size() * 4, cudaMemcpyDeviceToHost));
        for (int s = 0; s < o.sequences; s++) {
            std::vector<int64_t> offsets;
            for (int h = 0; h < o.heads_kv; h++) {
                const int64_t r = int64_t(s) * o.heads_kv + h;
                const auto lists = adapter.lists(batch[s].sequence, h);
                const auto add = [&](int64_t slot) {
                    offsets.push_back(
                            slot * slot_bytes + int64_t(h) * o.d * element);
                };
                for (int64_t j = 0; j < o.sink; j++) {
                    add(j);
                }
                for (int64_t j = std::max<int64_t>(o.sink, length[s] - o.window);
                     j < length[s];
                     j++) {
                    add(j);
                }
                for (int i = 0; i < count[r]; i++) {
                    for (int32_t slot : lists.slots[cell[r * cells.stride + i]]) {
                        add(slot);
                    }
                }
            }
            cache.rows.push_back(static_cast<int64_t>(offsets.size()));
            cache.offsets.emplace_back(offsets.data(), offsets.size() * 8);
        }
    }
    AttendOutput with_stats = out;
    with_stats.stats = stats.as<AttendStats>();
    all[0].adapter->attend(*all[0].batch, d_queries.as(), with_stats, nullptr, stream);
    check(cudaStreamSynchronize(stream));
    std::vector<AttendStats> got(rows_q);
    check(cudaMemcpy(
            got.data(), stats.as(), rows_q * sizeof(AttendStats), cudaMemcpyDeviceToHost));
    double keys_read = 0, far_keys = 0;
    for (int64_t r = 0; r < rows_q; r += o.heads_q / o.heads_kv) {
        keys_read += static_cast<double>(got[r].keys_read);
        far_keys += static_cast<double>(got[r].far_keys);
    }

    const double attend_bytes = row *
            (keys_read + double(o.sequences) * o.heads_kv * (o.sink + o.window));
    const double centroid_bytes =
            4.0 * o.heads_kv * o.ncell * (o.d + double(o.sequences));
    double classifier_bytes = 4.0 * o.heads_kv * o.ncell * o.sequences;
    for (const auto& head : classifiers) {
        classifier_bytes += static_cast<double>(head[0].query->bytes_read());
    }
    const double dense_bytes = row * o.heads_kv * static_cast<double>(all_tokens);
    struct Stage {
        std::string name;
        int layers; ///< in turn; one for each cache where no weights are read
        double bytes;
        std::function<void(Layer&)> launch;
    };
    const auto read = [&](Layer& layer) {
        for (auto* side : {&layer.cache->k, &layer.cache->v}) {
            for (int s = 0; s < o.sequences; s++) {
                check(read_all(
                        (*side)[s].as(),
                        length[s] * slot_bytes,
                        sink.as<uint32_t>(),
                        stream));
            }
        }
    };
    std::vector<Stage> stages = {
            {"bandwidth", caches, dense_bytes, [&](Layer& layer) { read(layer); }},
            {"gather",
             caches,
             attend_bytes,
             [&](Layer& layer) {
                 for (int s = 0; s < o.sequences; s++) {
                     ReadRowsParams p;
                     p.k = layer.cache->k[s].as();
                     p.v = layer.cache->v[s].as();
                     p.offsets = layer.cache->offsets[s].as<int64_t>();
                     p.n = layer.cache->rows[s];
                     p.bytes = static_cast<int>(o.d * element);
                     p.sink = sink.as<uint32_t>();
                     check(read_rows(p, stream));
                 }
             }},
            {"dense",
             caches,
             dense_bytes,
             [&](Layer& layer) {
                 layer.all_dense->attend(*layer.dense, d_queries.as(), out, nullptr, stream);
             }},
            {"sparse",
             layers,
             attend_bytes + centroid_bytes,
             [&](Layer& layer) {
                 layer.adapter->step(*layer.batch, d_queries.as(), out, nullptr, stream);
             }},
            {"sparse_without_append",
             layers,
             attend_bytes + centroid_bytes,
             [&](Layer& layer) {
                 layer.adapter->attend(*layer.batch, d_queries.as(), out, nullptr, stream);
             }},
            {"sparse_classifier",
             layers,
             attend_bytes + classifier_bytes,
             [&](Layer& layer) {
                 layer.classifying->step(
                         *layer.classified, d_queries.as(), out, nullptr, stream);
             }},
            {"route",
             layers,
             centroid_bytes,
             [&](Layer& layer) {
                 layer.adapter->route(
                         *layer.batch, d_queries.as(), layer.probed, nullptr, stream);
             }},
            {"route_classifier",
             layers,
             classifier_bytes,
             [&](Layer& layer) {
                 layer.classifying->route(
                         *layer.classified, d_queries.as(), layer.probed, nullptr, stream);
             }},
            {"attend",
             layers,
             attend_bytes,
             [&](Layer& layer) {
                 layer.adapter->attend_preassigned(
                         *layer.batch, d_queries.as(), layer.probed, out, stream);
             }},
            {"append", layers, slot_bytes * double(o.sequences), [&](Layer& layer) {
                 layer.adapter->append(*layer.batch, stream);
             }}};

    o.choose(stages);

    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<DecodeStage> results;
    Progress measuring("measuring", static_cast<int64_t>(stages.size()));
    for (const Stage& stage : stages) {
        // One after the other, as in a model.
        const Graph graph(stream, [&] {
            for (int l = 0; l < stage.layers; l++) {
                stage.launch(all[l]);
            }
        });
        std::vector<double> seconds;
        for (int r = -kWarmUp; r < o.repeat; r++) {
            check(cudaEventRecord(begin, stream));
            graph.launch(stream);
            check(cudaEventRecord(end, stream));
            check(cudaEventSynchronize(end));
            float ms = 0;
            check(cudaEventElapsedTime(&ms, begin, end));
            if (r >= 0) {
                seconds.push_back(1e-3 * ms / stage.layers);
            }
        }
        for (const Layer& layer : all) {
            layer.adapter->check();
            layer.classifying->check();
        }
        results.push_back(
                {stage.name,
                 stage.bytes,
                 percentile(seconds, 0.5),
                 percentile(seconds, 0.99)});
        measuring.advance();
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    report_decode(o, results, keys_read / far_keys, gpu::device_info(0).name);
    all.clear();
    check(cudaStreamDestroy(stream));
}

} // namespace faiss_saap::benchs
