#include <faiss_saap/c_api.h>

#include <string>

#include <faiss/IndexFlat.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/gpu/GpuAttentionAdapter.h>
#include <faiss_saap/sentence_of.h>

#include "check.h"

using namespace faiss_saap;

struct SaapAdapter {
    gpu::GpuAttentionAdapter adapter;

    SaapAdapter(const AdapterParams& params, HeadPartitions heads, int device)
            : adapter(params, std::move(heads), device) {}
};

struct SaapBatch {
    std::unique_ptr<gpu::GpuBatch> batch;
};

namespace {

thread_local std::string last_error;

template <class Sentence>
void keep(const Sentence& sentence) noexcept {
    try {
        last_error = sentence();
    } catch (...) { // out of memory: no exception may reach C
        last_error.clear();
    }
}

/// The result of body, or `failed` with the exception's sentence kept.
template <class T, class Body>
T guarded(T failed, const Body& body) {
    try {
        return body();
    } catch (const std::exception& e) {
        keep([&] { return sentence_of(e); });
    } catch (...) {
        keep([] { return "an unknown exception"; });
    }
    return failed;
}

AttendOutput output_of(float* output, float* lse) {
    AttendOutput out;
    out.output = output;
    out.lse = lse;
    return out;
}

cudaStream_t as_stream(void* stream) {
    return static_cast<cudaStream_t>(stream);
}

SequenceInput lower(const SaapSequenceInput& from, const AdapterParams& params) {
    SequenceInput in;
    in.sequence = from.sequence;
    in.q_len = from.q_len;
    in.kv.k = from.k;
    in.kv.v = from.v;
    in.kv.dtype = from.is_bfloat16 ? DType::bfloat16 : DType::float16;
    in.kv.length = from.length;
    in.kv.heads = params.heads_kv;
    in.kv.d = in.kv.d_v = params.d;
    in.kv.k_token_stride = from.k_token_stride;
    in.kv.k_head_stride = from.k_head_stride;
    in.kv.v_token_stride = from.v_token_stride;
    in.kv.v_head_stride = from.v_head_stride;
    in.kv.page_table = from.page_table;
    in.kv.page_size = from.page_size;
    in.kv.npages = from.npages;
    in.kv.k_page_stride = from.k_page_stride;
    in.kv.v_page_stride = from.v_page_stride;
    return in;
}

} // namespace

const char* saap_last_error(void) {
    return last_error.c_str();
}

SaapAdapter* saap_adapter_new(
        const SaapAdapterParams* p,
        const float* centroids) {
    return guarded<SaapAdapter*>(nullptr, [&] {
        FAISS_THROW_IF_NOT_MSG(p, "params is null");
        FAISS_THROW_IF_NOT_MSG(centroids, "centroids is null");
        FAISS_THROW_IF_NOT_FMT(
                p->ncell >= 1 && p->ncell <= 65536 && p->d >= 1 && p->heads_kv >= 1,
                "ncell = %d must be between 1 and 65536, d = %d and heads_kv = %d at least 1",
                p->ncell,
                p->d,
                p->heads_kv);
        AdapterParams params;
        params.heads_q = p->heads_q;
        params.heads_kv = p->heads_kv;
        params.d = p->d;
        params.sink = p->sink;
        params.window = p->window;
        params.scale = p->scale;
        params.policy.nprobe = p->nprobe;
        params.policy.max_selectivity = p->max_selectivity;
        params.policy.share_group = p->share_group != 0;
        const RoutingNeeds space =
                p->rope_theta != 0 ? NEEDS_PRE_ROPE : NEEDS_POST_ROPE;
        HeadPartitions heads;
        for (int h = 0; h < p->heads_kv; h++) {
            const auto flat = [&](faiss::MetricType metric) {
                auto index = std::make_shared<faiss::IndexFlat>(p->d, metric);
                index->add(p->ncell, centroids + int64_t(h) * p->ncell * p->d);
                return std::make_shared<QuantizerAssigner>(index, space);
            };
            Partition partition;
            partition.key = flat(faiss::METRIC_L2);
            partition.query = flat(faiss::METRIC_INNER_PRODUCT);
            if (p->rope_theta != 0) {
                partition.rope.d = p->d;
                partition.rope.theta = p->rope_theta;
            }
            heads.push_back({partition});
        }
        return new SaapAdapter(params, std::move(heads), p->device);
    });
}

void saap_adapter_free(SaapAdapter* adapter) {
    delete adapter;
}

int64_t saap_create(SaapAdapter* adapter, int64_t reserve, void* stream) {
    return guarded<int64_t>(-1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        return adapter->adapter.create({}, reserve, as_stream(stream));
    });
}

int saap_free(SaapAdapter* adapter, int64_t sequence, void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        adapter->adapter.free(sequence, as_stream(stream));
        return 0;
    });
}

int64_t saap_fork(SaapAdapter* adapter, int64_t sequence, void* stream) {
    return guarded<int64_t>(-1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        return adapter->adapter.fork(sequence, as_stream(stream));
    });
}

int saap_reset(SaapAdapter* adapter, int64_t sequence, void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        adapter->adapter.reset(sequence, as_stream(stream));
        return 0;
    });
}

int saap_reserve(
        SaapAdapter* adapter,
        int64_t sequence,
        int64_t tokens,
        void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        adapter->adapter.reserve(sequence, tokens, as_stream(stream));
        return 0;
    });
}

int saap_truncate(
        SaapAdapter* adapter,
        int64_t length,
        const SaapSequenceInput* input,
        void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter && input, "adapter or input is null");
        const SequenceInput in = lower(*input, adapter->adapter.params());
        adapter->adapter.truncate(in.sequence, length, in.kv, as_stream(stream));
        return 0;
    });
}

int64_t saap_length(SaapAdapter* adapter, int64_t sequence, void* stream) {
    return guarded<int64_t>(-1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        return adapter->adapter.length(sequence, as_stream(stream));
    });
}

SaapBatch* saap_plan(
        SaapAdapter* adapter,
        int32_t n,
        const SaapSequenceInput* inputs,
        void* stream) {
    return guarded<SaapBatch*>(nullptr, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        FAISS_THROW_IF_NOT_FMT(
                n >= 0 && (n == 0 || inputs), "n = %d, or inputs is null", n);
        const AdapterParams& params = adapter->adapter.params();
        std::vector<SequenceInput> batch;
        for (int i = 0; i < n; i++) {
            batch.push_back(lower(inputs[i], params));
        }
        return new SaapBatch{adapter->adapter.plan(batch, as_stream(stream))};
    });
}

void saap_batch_free(SaapBatch* batch) {
    delete batch;
}

int saap_append(SaapAdapter* adapter, const SaapBatch* batch, void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter && batch, "adapter or batch is null");
        adapter->adapter.append(*batch->batch, as_stream(stream));
        return 0;
    });
}

int saap_attend(
        SaapAdapter* adapter,
        const SaapBatch* batch,
        const void* queries,
        float* output,
        float* lse,
        void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter && batch, "adapter or batch is null");
        adapter->adapter.attend(
                *batch->batch,
                queries,
                output_of(output, lse),
                nullptr,
                as_stream(stream));
        return 0;
    });
}

int saap_step(
        SaapAdapter* adapter,
        const SaapBatch* batch,
        const void* queries,
        float* output,
        float* lse,
        void* stream) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter && batch, "adapter or batch is null");
        adapter->adapter.step(
                *batch->batch,
                queries,
                output_of(output, lse),
                nullptr,
                as_stream(stream));
        return 0;
    });
}

int saap_check(SaapAdapter* adapter) {
    return guarded(1, [&] {
        FAISS_THROW_IF_NOT_MSG(adapter, "adapter is null");
        adapter->adapter.check();
        return 0;
    });
}
