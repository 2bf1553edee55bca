/// The attention adapter on a CUDA device, and cells learnt there.
#include <memory>

#include <nanobind/stl/vector.h>

#include <faiss_saap/gpu/GpuAttentionAdapter.h>
#include <faiss_saap/gpu/sequence_partitions.h>

#include "adapter_arguments.h"
#include "bind.h"
#include "copies_of.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

using gpu::GpuAttentionAdapter;

/// What Python calls GpuBatch: holds the inputs, so that their arrays live as
/// long.
struct PlannedBatch {
    std::unique_ptr<gpu::GpuBatch> batch;
    std::vector<Asking> inputs; ///< with their views
    DType dtype = DType::bfloat16;
};

/// A stream as Python says it. None is the stream that torch works on, where
/// torch has begun to use CUDA.
cudaStream_t stream_of(const nb::object& given, int device) {
    nb::object stream = given;
    if (stream.is_none()) {
        const nb::object torch = nb::steal(PyImport_GetModule(nb::str("torch").ptr()));
        if (!torch.is_valid()) {
            PyErr_Clear();
            return nullptr;
        }
        const nb::object cuda = torch.attr("cuda");
        if (!nb::cast<bool>(cuda.attr("is_initialized")())) {
            return nullptr;
        }
        stream = cuda.attr("current_stream")(device);
    }
    if (nb::hasattr(stream, "cuda_stream")) {
        stream = stream.attr("cuda_stream");
    }
    uintptr_t address = 0;
    FAISS_THROW_IF_NOT_FMT(
            nb::try_cast(stream, address),
            "stream is a %s, expected None, the address of a cudaStream_t, or "
            "an object with cuda_stream",
            nb::type_name(stream.type()).c_str());
    return reinterpret_cast<cudaStream_t>(address);
}

/// An array that kernels read.
AnyArray queries_on(
        const nb::object& queries,
        const PlannedBatch& batch,
        const AdapterParams& p,
        int device) {
    const AnyArray q = array_anywhere(queries, "queries");
    check_shape(q, "queries", {batch.batch->tokens(), p.heads_q, p.d});
    FAISS_THROW_IF_NOT_FMT(
            device_of(q) == device && is_contiguous(q) &&
                    (batch.batch->tokens() == 0 ||
                     dtype_of(q, "queries") == batch.dtype),
            "queries must be contiguous %s, as the caches are, on CUDA device %d",
            name(batch.dtype),
            device);
    return q;
}

/// Memory that kernels write to; null for None.
template <class T>
T* written(
        const nb::object& given,
        const char* name,
        const std::vector<int64_t>& shape,
        int device) {
    if (given.is_none()) {
        return nullptr;
    }
    nb::ndarray<T, nb::c_contig, nb::device::cuda> array;
    FAISS_THROW_IF_NOT_FMT(
            nb::try_cast(given, array, false) && device_of(AnyArray(array)) == device,
            "%s must be a writable, contiguous array of %s on CUDA device %d",
            name,
            std::is_same_v<T, float> ? "float32" : "int64",
            device);
    check_shape(AnyArray(array), name, shape);
    return array.data();
}

/// GpuAttentionAdapter.attend, or step, which appends first.
template <bool Appends>
void attend_into(
        GpuAttentionAdapter& a,
        const PlannedBatch& batch,
        const nb::object& queries,
        const nb::object& output,
        const nb::object& lse,
        const nb::object& stats,
        const ProbePolicy* policy,
        bool merge,
        const nb::object& stream) {
    const AdapterParams& p = a.params();
    const int64_t tokens = batch.batch->tokens();
    const AnyArray q = queries_on(queries, batch, p, a.device());
    AttendOutput out;
    out.output = written<float>(
            output, "output", {tokens, p.heads_q, p.d}, a.device());
    out.lse = written<float>(lse, "lse", {tokens, p.heads_q}, a.device());
    static_assert(sizeof(AttendStats) == 4 * sizeof(int64_t));
    out.stats = reinterpret_cast<AttendStats*>(written<int64_t>(
            stats, "stats", {tokens, p.heads_q, 4}, a.device()));
    out.merge = merge;
    const cudaStream_t s = stream_of(stream, a.device());
    nb::gil_scoped_release release;
    if (Appends) {
        a.step(*batch.batch, q.data(), out, policy, s);
    } else {
        a.attend(*batch.batch, q.data(), out, policy, s);
    }
}

} // namespace

void bind_gpu(nb::module_& m) {
    nb::class_<PlannedBatch>(
            m,
            "GpuBatch",
            "Sequences that are appended to and attended together, laid down on "
            "the device by GpuAttentionAdapter.plan for any number of steps, also "
            "inside a CUDA graph. Keeps the arrays of its views.")
            .def_prop_ro(
                    "tokens",
                    [](const PlannedBatch& b) { return b.batch->tokens(); },
                    "Of all sequences together.");

    nb::class_<GpuAttentionAdapter> adapter(
            m,
            "GpuAttentionAdapter",
            "AttentionAdapter on a CUDA device, over tensors that lie there "
            "(docs/gpu.md): d of 64, 96, 128 or 256, float16 or bfloat16. append "
            "and attend launch kernels and nothing else, so they can be captured "
            "in a CUDA graph.\n\n"
            "stream: None for the stream that torch works on (the default one "
            "where torch does not use CUDA), else an object with cuda_stream, or "
            "the address of a cudaStream_t. One thread at a time.");
    adapter.def(
            "__init__",
            [](GpuAttentionAdapter* self,
               int heads_q,
               int heads_kv,
               int d,
               const nb::object& partitions,
               int64_t sink,
               int64_t window,
               bool attend_dense,
               float scale,
               int64_t position_offset,
               int64_t dense_below,
               const ProbePolicy& policy,
               int device) {
                new (self) GpuAttentionAdapter(
                        adapter_params(
                                heads_q,
                                heads_kv,
                                d,
                                sink,
                                window,
                                attend_dense,
                                scale,
                                position_offset,
                                dense_below,
                                /*key_codes=*/false,
                                policy),
                        head_partitions(partitions),
                        device);
            },
            "heads_q"_a,
            "heads_kv"_a,
            "d"_a,
            "partitions"_a = nb::none(),
            nb::kw_only(),
            "sink"_a = AdapterParams().sink,
            "window"_a = AdapterParams().window,
            "attend_dense"_a = true,
            "scale"_a = 0.0f,
            "position_offset"_a = 0,
            "dense_below"_a = AdapterParams().dense_below,
            "policy"_a = ProbePolicy(),
            "device"_a = 0,
            nb::sig("def __init__(self, heads_q: int, heads_kv: int, d: int, "
                    "partitions: collections.abc.Sequence[Partition | "
                    "collections.abc.Sequence[Partition]] | None = None, *, "
                    "sink: int = 16, window: int = 1024, attend_dense: bool = "
                    "True, scale: float = 0, position_offset: int = 0, "
                    "dense_below: int = 64, policy: ProbePolicy = ..., device: "
                    "int = 0) -> None"),
            "As AttentionAdapter.");
    adapter.def_prop_ro(
                   "heads_q",
                   [](const GpuAttentionAdapter& a) { return a.params().heads_q; })
            .def_prop_ro(
                    "heads_kv",
                    [](const GpuAttentionAdapter& a) {
                        return a.params().heads_kv;
                    })
            .def_prop_ro(
                    "d",
                    [](const GpuAttentionAdapter& a) { return a.params().d; })
            .def_prop_ro("device", &GpuAttentionAdapter::device);
    adapter.def(
                   "create",
                   [](GpuAttentionAdapter& a,
                      const nb::object& own,
                      int64_t reserve,
                      const nb::object& stream) {
                       return a.create(
                               head_partitions(own),
                               reserve,
                               stream_of(stream, a.device()));
                   },
                   "own"_a = nb::none(),
                   "reserve"_a = 4096,
                   "stream"_a = nb::none(),
                   nb::sig("def create(self, own: "
                           "collections.abc.Sequence[Partition | "
                           "collections.abc.Sequence[Partition]] | None = None, "
                           "reserve: int = 4096, stream: object = None) -> int"),
                   "An empty sequence; its number. own: partitions of this "
                   "sequence alone, after the adapter's. reserve: tokens to make "
                   "room for.")
            .def(
                    "fork",
                    [](GpuAttentionAdapter& a,
                       int64_t sequence,
                       const nb::object& stream) {
                        return a.fork(sequence, stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "stream"_a = nb::none(),
                    "A sequence that begins as a copy.")
            .def(
                    "free",
                    [](GpuAttentionAdapter& a,
                       int64_t sequence,
                       const nb::object& stream) {
                        a.free(sequence, stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "stream"_a = nb::none())
            .def(
                    "reset",
                    [](GpuAttentionAdapter& a,
                       int64_t sequence,
                       const nb::object& stream) {
                        a.reset(sequence, stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "stream"_a = nb::none(),
                    "Makes a sequence empty; it keeps its partitions.")
            .def(
                    "reserve",
                    [](GpuAttentionAdapter& a,
                       int64_t sequence,
                       int64_t tokens,
                       const nb::object& stream) {
                        a.reserve(sequence, tokens, stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "tokens"_a,
                    "stream"_a = nb::none(),
                    "Makes room for tokens in all; append does as needed, except "
                    "inside a graph.")
            .def(
                    "truncate",
                    [](GpuAttentionAdapter& a,
                       int64_t sequence,
                       int64_t length,
                       const ArrayView& view,
                       const nb::object& stream) {
                        a.truncate(
                                sequence,
                                length,
                                view.on_device(a.device()),
                                stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "length"_a,
                    "kv"_a,
                    "stream"_a = nb::none(),
                    "Forgets the tokens from `length` on.")
            .def(
                    "length",
                    [](const GpuAttentionAdapter& a,
                       int64_t sequence,
                       const nb::object& stream) {
                        return a.length(sequence, stream_of(stream, a.device()));
                    },
                    "sequence"_a,
                    "stream"_a = nb::none())
            .def("npartition",
                 &GpuAttentionAdapter::npartition,
                 "sequence"_a,
                 "kv_head"_a)
            .def("bytes_used",
                 &GpuAttentionAdapter::bytes_used,
                 "Device memory of the lists and their statistics.")
            .def("check",
                 &GpuAttentionAdapter::check,
                 "Raises what kernels have found wrong up to now; synchronise "
                 "first to hear of all.");
    adapter.def(
                   "plan",
                   [](const GpuAttentionAdapter& a,
                      const nb::object& batch,
                      const nb::object& stream) {
                       PlannedBatch planned;
                       planned.inputs =
                               copies_of<Asking>(batch, "batch", "SequenceInput");
                       std::vector<SequenceInput> inputs;
                       for (const Asking& asking : planned.inputs) {
                           inputs.push_back(asking.input(
                                   asking.array_view().on_device(a.device())));
                           planned.dtype = inputs[0].kv.dtype;
                       }
                       planned.batch =
                               a.plan(inputs, stream_of(stream, a.device()));
                       return planned;
                   },
                   "batch"_a,
                   "stream"_a = nb::none(),
                   nb::keep_alive<0, 1>(),
                   nb::sig("def plan(self, batch: "
                           "collections.abc.Iterable[SequenceInput], stream: "
                           "object = None) -> GpuBatch"),
                   "Lays a batch down. The length of a view is the number of "
                   "tokens that its arrays have room for. In each step q_len "
                   "tokens of a sequence are appended, and the last q_len "
                   "attend (64 at most).")
            .def(
                    "append",
                    [](GpuAttentionAdapter& a,
                       const PlannedBatch& batch,
                       const nb::object& stream) {
                        const cudaStream_t s = stream_of(stream, a.device());
                        nb::gil_scoped_release release;
                        a.append(*batch.batch, s);
                    },
                    "batch"_a,
                    "stream"_a = nb::none(),
                    "Takes note of the next q_len tokens of each sequence.")
            .def(
                    "attend",
                    &attend_into<false>,
                    "batch"_a,
                    "queries"_a,
                    "output"_a,
                    "lse"_a = nb::none(),
                    "stats"_a = nb::none(),
                    "policy"_a = nb::none(),
                    nb::kw_only(),
                    "merge"_a = false,
                    "stream"_a = nb::none(),
                    nb::sig("def attend(self, batch: GpuBatch, queries: object, "
                            "output: object, lse: object = None, stats: object "
                            "= None, policy: ProbePolicy | None = None, *, "
                            "merge: bool = False, stream: object = None) -> "
                            "None"),
                    "Attention of a batch, into arrays on the device.\n\nqueries: "
                    "post-RoPE, (tokens, heads_q, d), of the caches' type. "
                    "output: (tokens, heads_q, d) float32. lse: (tokens, "
                    "heads_q) float32. stats: (tokens, heads_q, 4) int64, "
                    "distinct cells probed, distinct far keys read, far keys "
                    "there are, and what has no meaning as an integer. policy: "
                    "None for the adapter's. merge: output and lse already hold "
                    "results over other keys and become those of the union.")
            .def(
                    "step",
                    &attend_into<true>,
                    "batch"_a,
                    "queries"_a,
                    "output"_a,
                    "lse"_a = nb::none(),
                    "stats"_a = nb::none(),
                    "policy"_a = nb::none(),
                    nb::kw_only(),
                    "merge"_a = false,
                    "stream"_a = nb::none(),
                    nb::sig("def step(self, batch: GpuBatch, queries: object, "
                            "output: object, lse: object = None, stats: object "
                            "= None, policy: ProbePolicy | None = None, *, "
                            "merge: bool = False, stream: object = None) -> "
                            "None"),
                    "append, then attend: a decode step. It is one launch where each "
                    "sequence has one token, each KV head one partition, the policy "
                    "chooses for groups of at most 8, no assigner reads cell means, "
                    "the head dimension is 64, 96 or 128 and the device has compute "
                    "capability 9.0 or later. Arguments as of attend.");

    m.def(
            "gpu_sequence_partitions",
            [](const ArrayView& view,
               int64_t begin,
               int64_t end,
               int ncell,
               const KMeansParams& params,
               const nb::object& stream) {
                FAISS_THROW_IF_NOT_MSG(
                        view.device != kMainMemory,
                        "kv lies in main memory, expected arrays on a CUDA device "
                        "(sequence_partitions takes the others)");
                const cudaStream_t s = stream_of(stream, view.device);
                HeadPartitions all;
                {
                    nb::gil_scoped_release release;
                    all = gpu::sequence_partitions(
                            view.kv, begin, end, ncell, params, view.device, s);
                }
                return to_python(all);
            },
            "kv"_a,
            "begin"_a,
            "end"_a,
            "ncell"_a,
            "params"_a = KMeansParams(),
            "stream"_a = nb::none(),
            nb::sig("def gpu_sequence_partitions(kv: KvView, begin: int, end: "
                    "int, ncell: int, params: KMeansParams = ..., stream: object "
                    "= None) -> list[list[Partition]]"),
            "sequence_partitions of a cache on a CUDA device, float16 or "
            "bfloat16. Waits for the device.");
}

} // namespace faiss_saap::python
