#include "lower.h"

#include <faiss/IndexFlat.h>

#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/exactly.h>

namespace faiss_saap::gpu {

namespace {

struct Lowering {
    LoweredPartition& to;
    int group;
    cudaStream_t stream;

    template <class T>
    T* upload(const T* from, size_t n) {
        to.memory.emplace_back(n * sizeof(T), stream);
        FAISS_SAAP_CUDA_CHECK(cudaMemcpyAsync(
                to.memory.back().data(),
                from,
                n * sizeof(T),
                cudaMemcpyHostToDevice,
                stream));
        return reinterpret_cast<T*>(to.memory.back().data());
    }

    bool flat(const CellAssigner& assigner, DeviceAssigner& a) {
        const auto* q = exactly<QuantizerAssigner>(assigner);
        const auto* index = q
                ? dynamic_cast<const faiss::IndexFlat*>(q->quantizer.get())
                : nullptr;
        if (!index) {
            return false;
        }
        a.input = q->needs & NEEDS_PRE_ROPE ? RowInput::pre_rope
                                            : RowInput::post_rope;
        a.padded_cols = a.d;
        const float* x = index->get_xb();
        const std::vector<uint16_t>& halves = q->bfloat16_vectors;
        a.bf16 = !halves.empty() && a.d % 8 == 0; // rows are read by 16 bytes
        if (a.bf16) {
            a.rows = upload(halves.data(), halves.size());
        } else {
            a.rows = upload(x, size_t(a.ncell) * a.d);
        }
        if (index->metric_type == faiss::METRIC_L2) {
            std::vector<float> bias(a.ncell);
            for (int c = 0; c < a.ncell; c++) {
                double norm = 0;
                for (int j = 0; j < a.d; j++) {
                    norm += double(x[size_t(c) * a.d + j]) * x[size_t(c) * a.d + j];
                }
                bias[c] = static_cast<float>(-norm / 2);
            }
            a.bias = upload(bias.data(), bias.size());
        }
        return true;
    }

    void classifier(const QueryClassifier& c, DeviceAssigner& a) {
        FAISS_THROW_IF_NOT_FMT(
                c.shape.group == group,
                "a classifier for %d query heads cannot serve a group of %d",
                c.shape.group,
                group);
        a.input = RowInput::hidden;
        a.bf16 = c.dtype == DType::bfloat16;
        a.width = c.shape.width;
        a.depth = c.shape.depth;
        a.networks = c.shape.networks();
        a.inputs = c.layers().front().layer.networks;
        const auto& layers = c.layers();
        const auto& last = layers.back();
        const char* weights = reinterpret_cast<const char*>(upload(
                c.weights(),
                last.weight + size_t(last.layer.networks) * last.layer.rows *
                                last.padded_cols * element_size(c.dtype)));
        const float* biases =
                upload(c.biases(), last.bias + size_t(last.layer.biases()));
        for (size_t l = 0; l + 1 < layers.size(); l++) {
            a.layer[l] = weights + layers[l].weight;
            a.layer_bias[l] = biases + layers[l].bias;
        }
        a.rows = weights + last.weight;
        a.bias = biases + last.bias;
        a.padded_cols = a.padded_width = last.padded_cols;
        a.padded_d = layers.front().padded_cols;
    }

    void blend(const std::vector<BlendWeights>& weights, DeviceAssigner& a) {
        std::vector<float> flat;
        for (const BlendWeights& w : weights) {
            flat.insert(flat.end(), {w.classifier, w.mean, w.newest, w.age, w.count});
        }
        a.blend = upload(flat.data(), flat.size());
        a.reads_means = 1;
    }

    void query(const CellAssigner& assigner, DeviceAssigner& a) {
        if (flat(assigner, a)) {
            return;
        }
        if (const auto* c = exactly<QueryClassifier>(assigner)) {
            classifier(*c, a);
        } else if (exactly<CellMeanAssigner>(assigner)) {
            BlendWeights mean;
            mean.classifier = 0;
            mean.mean = 1;
            blend(std::vector<BlendWeights>(group, mean), a);
        } else if (const auto* b = exactly<BlendAssigner>(assigner)) {
            classifier(*b->classifier, a);
            blend(b->weights, a);
            a.reads_newest = 1;
            a.scale = b->scale;
        } else {
            FAISS_THROW_FMT(
                    "the query assigner of KV head %d has no kernel: there are "
                    "a flat quantizer, cell means, a classifier and a blend",
                    to.kv_head);
        }
    }
};

} // namespace

LoweredPartition lower(
        const Partition& partition,
        int kv_head,
        int group,
        cudaStream_t stream,
        int most_cells) {
    LoweredPartition to;
    to.kv_head = kv_head;
    to.ncell = partition.ncell();
    FAISS_THROW_IF_NOT_FMT(
            to.ncell <= most_cells,
            "a partition of KV head %d has %d cells, on the device there are at "
            "most %d",
            kv_head,
            to.ncell,
            most_cells);
    Lowering lowering{to, group, stream};
    to.key.d = to.query.d = partition.d();
    to.key.ncell = to.query.ncell = to.ncell;
    FAISS_THROW_IF_NOT_FMT(
            lowering.flat(*partition.key, to.key),
            "the key assigner of KV head %d has no kernel: there is a quantizer "
            "over faiss::IndexFlat",
            kv_head);
    lowering.query(*partition.query, to.query);
    if ((partition.key->needs | partition.query->needs) & NEEDS_PRE_ROPE) {
        const RotaryEmbedding rotary(partition.rope);
        to.rotary.inverse_frequency = lowering.upload(
                rotary.inverse_frequency.data(), rotary.inverse_frequency.size());
        to.rotary.interleaved = partition.rope.layout == RopeLayout::interleaved;
        to.rotary.shrink = static_cast<float>(1 / rotary.magnitude);
    }
    // What is copied from may go now.
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
    return to;
}

DeviceView lower_view(const KvView& kv) {
    const auto size = static_cast<int64_t>(element_size(kv.dtype));
    DeviceView v;
    v.k = static_cast<const char*>(kv.k);
    v.v = static_cast<const char*>(kv.v);
    v.k_token = kv.k_token_stride * size;
    v.k_head = kv.k_head_stride * size;
    v.k_page = kv.k_page_stride * size;
    v.v_token = kv.v_token_stride * size;
    v.v_head = kv.v_head_stride * size;
    v.v_page = kv.v_page_stride * size;
    v.page_table = kv.page_table;
    v.page_size = kv.page_size;
    v.npages = kv.npages;
    v.length = kv.length;
    v.bf16 = kv.dtype == DType::bfloat16;
    return v;
}

} // namespace faiss_saap::gpu
