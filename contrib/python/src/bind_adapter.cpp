/// The attention adapter: sequences, batches, results.
#include <memory>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/LayerPlan.h>

#include "adapter_arguments.h"
#include "bind.h"
#include "copies_of.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

/// What attend returns.
struct Attention {
    nb::object output, lse;
    std::vector<AttendStats> stats;
    size_t tokens = 0, heads = 0;

    template <class T, class Get>
    nb::object each(const Get& get) const {
        NewArray<T> x({tokens, heads});
        for (size_t i = 0; i < stats.size(); i++) {
            x.data()[i] = get(stats[i]);
        }
        return x.object();
    }
};

/// A batch and its queries as the library takes them.
class Batch {
   public:
    Batch(const AttentionAdapter& adapter,
          const nb::object& asking,
          const nb::object& queries)
            : asked(copies_of<Asking>(asking, "batch", "SequenceInput")) {
        for (const Asking& a : asked) {
            inputs.push_back(a.input(a.array_view().in_main_memory()));
            tokens += a.q_len;
            FAISS_THROW_IF_NOT_FMT(
                    inputs.back().kv.d_v == inputs.front().kv.d_v,
                    "the values of the batch have %d and %d components",
                    inputs.front().kv.d_v,
                    inputs.back().kv.d_v);
        }
        const AdapterParams& p = adapter.params();
        const AnyArray q = array_of(queries, "queries");
        if (q.ndim() == 2 && tokens == 1) {
            check_shape(q, "queries", {p.heads_q, p.d});
        } else {
            check_shape(q, "queries", {tokens, p.heads_q, p.d});
        }
        rows = std::make_unique<FloatRows>(q, "queries");
        heads = p.heads_q;
        d_v = inputs.empty() ? p.d : inputs.front().kv.d_v;
    }

    /// With their views.
    std::vector<Asking> asked;
    std::vector<SequenceInput> inputs; ///< of `asked`
    std::unique_ptr<FloatRows> rows;
    int64_t tokens = 0;
    int heads = 0, d_v = 0;
};

/// Memory that a result goes to: the caller's where given, else new.
struct Target {
    nb::object object;
    float* data = nullptr;

    Target(const nb::object& given,
           const char* name,
           const std::vector<int64_t>& shape) {
        if (given.is_none()) {
            NewArray<float> fresh({shape.begin(), shape.end()});
            data = fresh.data();
            object = fresh.object();
            return;
        }
        nb::ndarray<float, nb::c_contig, nb::device::cpu> array;
        FAISS_THROW_IF_NOT_FMT(
                nb::try_cast(given, array, false),
                "%s must be a writable, contiguous array of float32 in main "
                "memory",
                name);
        check_shape(AnyArray(array), name, shape);
        data = array.data();
        object = given;
    }
};

template <class Call>
Attention attend(
        const Batch& batch,
        const nb::object& output,
        const nb::object& lse,
        bool merge,
        const Call& call) {
    FAISS_THROW_IF_NOT_MSG(
            !merge || (!output.is_none() && !lse.is_none()),
            "merge = True needs output and lse to merge with");
    Target to_output(output, "output", {batch.tokens, batch.heads, batch.d_v});
    Target to_lse(lse, "lse", {batch.tokens, batch.heads});
    Attention result;
    result.tokens = batch.tokens;
    result.heads = batch.heads;
    result.stats.resize(batch.tokens * batch.heads);
    AttendOutput out;
    out.output = to_output.data;
    out.lse = to_lse.data;
    out.stats = result.stats.data();
    out.merge = merge;
    {
        nb::gil_scoped_release release;
        call(out);
    }
    result.output = to_output.object;
    result.lse = to_lse.object;
    return result;
}

} // namespace

void bind_adapter(nb::module_& m) {
    m.def("key_code_size",
          [](int d) {
              FAISS_THROW_IF_NOT_FMT(
                      d >= 1 && d <= 1 << 20, "d = %d must be between 1 and 2^20", d);
              return KeyCodes::code_size(d);
          },
          "d"_a,
          "Bytes of the code of a key of d components.");
    nb::class_<ProbePolicy>(
            m,
            "ProbePolicy",
            "How many cells a query probes, and who chooses them. All limits "
            "hold at once; the best non-empty cell is read even where it "
            "exceeds them.")
            .def(
                    "__init__",
                    [](ProbePolicy* self,
                       int nprobe,
                       std::optional<int64_t> max_keys,
                       double max_selectivity,
                       bool share_group,
                       double refine,
                       std::vector<double> split,
                       std::vector<std::vector<double>> head_split) {
                        ProbePolicy p;
                        p.nprobe = nprobe;
                        p.max_keys = max_keys.value_or(INT64_MAX);
                        p.max_selectivity = max_selectivity;
                        p.share_group = share_group;
                        p.refine = refine;
                        p.split = std::move(split);
                        p.head_split = std::move(head_split);
                        p.check();
                        new (self) ProbePolicy(std::move(p));
                    },
                    "nprobe"_a = 32,
                    "max_keys"_a = nb::none(),
                    "max_selectivity"_a = 1.0,
                    "share_group"_a = true,
                    "refine"_a = 1.0,
                    "split"_a = std::vector<double>(),
                    "head_split"_a = std::vector<std::vector<double>>())
            .def_rw("nprobe",
                    &ProbePolicy::nprobe,
                    "Cells at most, of each partition.")
            .def_rw("max_keys",
                    &ProbePolicy::max_keys,
                    "Far keys at most, per KV head with share_group, else per "
                    "query head.")
            .def_rw("max_selectivity",
                    &ProbePolicy::max_selectivity,
                    "Far keys at most, as a fraction of the far keys there "
                    "are.")
            .def_rw("share_group",
                    &ProbePolicy::share_group,
                    "The query heads of a KV head probe the same cells.")
            .def_rw("refine",
                    &ProbePolicy::refine,
                    "Above 1: cells with up to this many times the far keys "
                    "that may be read are probed, the keys in them ranked by "
                    "their 4-bit codes, and the best ones read. Needs an "
                    "adapter with key_codes.")
            .def_rw("split",
                    &ProbePolicy::split,
                    "Share of the key limit for each partition of a KV head; "
                    "empty: equal shares.")
            .def_rw("head_split",
                    &ProbePolicy::head_split,
                    "Shares of each KV head where heads differ, as a LayerPlan "
                    "says; in place of split.");

    nb::class_<Asking>(
            m, "SequenceInput", "One sequence of a batch, and its tokens that ask.")
            .def(
                    "__init__",
                    [](Asking* self,
                       int64_t sequence,
                       const nb::object& kv,
                       int64_t q_len,
                       std::vector<int64_t> positions) {
                        FAISS_THROW_IF_NOT_FMT(
                                nb::isinstance<ArrayView>(kv),
                                "kv is a %s, expected a KvView",
                                nb::type_name(kv.type()).c_str());
                        FAISS_THROW_IF_NOT_FMT(
                                q_len >= 1,
                                "q_len = %lld, must be positive",
                                static_cast<long long>(q_len));
                        FAISS_THROW_IF_NOT_FMT(
                                positions.empty() ||
                                        int64_t(positions.size()) == q_len,
                                "positions has %zd entries, q_len = %lld",
                                positions.size(),
                                static_cast<long long>(q_len));
                        new (self) Asking{
                                sequence, kv, q_len, std::move(positions)};
                    },
                    "sequence"_a,
                    "kv"_a,
                    "q_len"_a = 1,
                    "positions"_a = std::vector<int64_t>(),
                    nb::sig("def __init__(self, sequence: int, kv: KvView, "
                            "q_len: int = 1, positions: "
                            "collections.abc.Sequence[int] = ()) -> None"),
                    "positions: of the tokens that ask, (q_len,); empty: the "
                    "last q_len ones.")
            .def_ro("sequence", &Asking::sequence)
            .def_ro("q_len", &Asking::q_len)
            .def_prop_ro(
                    "kv",
                    [](const Asking& a) { return a.view; },
                    nb::sig("def kv(self) -> KvView"));

    nb::class_<ProbedCells>(
            m,
            "ProbedCells",
            "Cells chosen for some tokens: for row r cells[begin[r]:begin[r + "
            "1]]. A row is a token and a KV head (share_group) or a token and a "
            "query head, heads varying fastest. Cells of a head's second "
            "partition are numbered on from those of its first.")
            .def(
                    "__init__",
                    [](ProbedCells* self,
                       const nb::object& given,
                       const nb::object& cells,
                       bool share_group) {
                        const Longs begin = longs_of(given, "begin");
                        check_shape(AnyArray(begin), "begin", {-1});
                        new (self) ProbedCells{
                                share_group,
                                {begin.data(), begin.data() + begin.size()},
                                integers_of(cells, "cells")};
                    },
                    "begin"_a,
                    "cells"_a,
                    "share_group"_a = true,
                    nb::sig("def __init__(self, begin: numpy.typing.ArrayLike, cells: "
                            "numpy.typing.ArrayLike, share_group: bool = True) -> None"))
            .def_ro("share_group", &ProbedCells::share_group)
            .def_prop_ro(
                    "begin",
                    [](const ProbedCells& p) {
                        return copy_to_numpy(p.begin.data(), {p.begin.size()});
                    },
                    nb::sig("def begin(self) -> numpy.typing.NDArray[numpy.int64]"),
                    "(rows + 1,)")
            .def_prop_ro(
                    "cells",
                    [](const ProbedCells& p) {
                        return copy_to_numpy(p.cells.data(), {p.cells.size()});
                    },
                    nb::sig("def cells(self) -> numpy.typing.NDArray[numpy.int32]"));

    const auto stat = [](auto member) {
        return [member](const Attention& a) {
            using T = std::remove_reference_t<
                    decltype(std::declval<AttendStats&>().*member)>;
            return a.each<T>([&](const AttendStats& s) { return s.*member; });
        };
    };
    nb::class_<Attention>(
            m,
            "Attention",
            "What attend returns; rows are (tokens, heads_q), tokens in the "
            "order of the batch.")
            .def_ro("output",
                    &Attention::output,
                    "(tokens, heads_q, d_v) float32, or the array that was "
                    "given.")
            .def_ro("lse",
                    &Attention::lse,
                    "Log-sum-exp (natural), (tokens, heads_q) float32, or the "
                    "array that was given.")
            .def_prop_ro(
                    "cells",
                    stat(&AttendStats::cells),
                    nb::sig("def cells(self) -> numpy.typing.NDArray[numpy.int64]"),
                    "Distinct cells probed.")
            .def_prop_ro(
                    "keys_read",
                    stat(&AttendStats::keys_read),
                    nb::sig("def keys_read(self) -> numpy.typing.NDArray[numpy.int64]"),
                    "Distinct far keys read.")
            .def_prop_ro(
                    "keys_ranked",
                    stat(&AttendStats::keys_ranked),
                    nb::sig("def keys_ranked(self) -> numpy.typing.NDArray[numpy.int32]"),
                    "Distinct far keys compared by their codes.")
            .def_prop_ro(
                    "far_keys",
                    stat(&AttendStats::far_keys),
                    nb::sig("def far_keys(self) -> numpy.typing.NDArray[numpy.int64]"),
                    "Far keys there are.")
            .def_prop_ro(
                    "dense_mass",
                    stat(&AttendStats::dense_mass),
                    nb::sig("def dense_mass(self) -> numpy.typing.NDArray[numpy.float32]"),
                    "Share of sink and window in the attention mass of the "
                    "output.")
            .def_prop_ro(
                    "selectivity",
                    [](const Attention& a) {
                        return a.each<double>([](const AttendStats& s) {
                            return s.selectivity();
                        });
                    },
                    nb::sig("def selectivity(self) -> numpy.typing.NDArray[numpy.float64]"),
                    "keys_read / far_keys; 0 where there are no far keys.");

    nb::class_<AttentionAdapter> adapter(
            m,
            "AttentionAdapter",
            "Attention over sink, window and the far keys of the probed cells, "
            "for one layer and any number of sequences (docs/adapter.md). "
            "Keeps lists of slots, never keys or values. attend, route and "
            "what else reads may run in several threads at once; whatever "
            "changes the adapter needs exclusive access.");
    adapter.def(
            "__init__",
            [](AttentionAdapter* self,
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
               bool key_codes,
               const ProbePolicy& policy) {
                new (self) AttentionAdapter(
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
                                key_codes,
                                policy),
                        head_partitions(partitions));
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
            "key_codes"_a = false,
            "policy"_a = ProbePolicy(),
            nb::sig("def __init__(self, heads_q: int, heads_kv: int, d: int, "
                    "partitions: collections.abc.Sequence[Partition | "
                    "collections.abc.Sequence[Partition]] | None = None, *, "
                    "sink: int = 16, window: int = 1024, attend_dense: bool = "
                    "True, scale: float = 0, position_offset: int = 0, "
                    "dense_below: int = 64, key_codes: bool = False, policy: "
                    "ProbePolicy = ...) -> "
                    "None"),
            "partitions: of every sequence, for each KV head one or a list; "
            "None where each sequence brings its own. sink, window: first and "
            "most recent tokens, always attended unless attend_dense is False. "
            "scale 0: 1 / sqrt(d). With dense_below far keys or fewer, all are "
            "read. key_codes: keep a 4-bit code of each far key, for policies "
            "with refine > 1 (key_code_size(d) bytes each).");
    adapter.def_prop_ro(
                   "heads_q",
                   [](const AttentionAdapter& a) { return a.params().heads_q; })
            .def_prop_ro(
                    "heads_kv",
                    [](const AttentionAdapter& a) {
                        return a.params().heads_kv;
                    })
            .def_prop_ro(
                    "d", [](const AttentionAdapter& a) { return a.params().d; })
            .def_prop_ro(
                    "sink",
                    [](const AttentionAdapter& a) { return a.params().sink; })
            .def_prop_ro(
                    "window",
                    [](const AttentionAdapter& a) { return a.params().window; })
            .def_prop_ro(
                    "policy",
                    [](const AttentionAdapter& a) { return a.params().policy; },
                    "A copy of the default policy.");
    adapter.def(
                   "create",
                   [](AttentionAdapter& a, const nb::object& own) {
                       return a.create(head_partitions(own));
                   },
                   "own"_a = nb::none(),
                   nb::sig("def create(self, own: "
                           "collections.abc.Sequence[Partition | "
                           "collections.abc.Sequence[Partition]] | None = "
                           "None) -> int"),
                   "An empty sequence; its number. own: partitions of this "
                   "sequence alone, after the adapter's.")
            .def("fork",
                 &AttentionAdapter::fork,
                 "sequence"_a,
                 "A sequence that begins as a copy and shares its lists.")
            .def("free", &AttentionAdapter::free, "sequence"_a)
            .def("reset",
                 &AttentionAdapter::reset,
                 "sequence"_a,
                 "Makes a sequence empty; it keeps its partitions.")
            .def(
                    "append",
                    [](AttentionAdapter& a,
                       int64_t sequence,
                       const ArrayView& view) {
                        nb::gil_scoped_release release;
                        a.append(sequence, view.in_main_memory());
                    },
                    "sequence"_a,
                    "kv"_a,
                    "Takes note of the tokens length(sequence) .. kv.length - "
                    "1, whose keys (post-RoPE) and values are in the view.")
            .def(
                    "truncate",
                    [](AttentionAdapter& a,
                       int64_t sequence,
                       int64_t length,
                       const ArrayView& view) {
                        nb::gil_scoped_release release;
                        a.truncate(sequence, length, view.in_main_memory());
                    },
                    "sequence"_a,
                    "length"_a,
                    "kv"_a,
                    "Forgets the tokens from `length` on.")
            .def("length", &AttentionAdapter::length, "sequence"_a)
            .def("npartition",
                 &AttentionAdapter::npartition,
                 "sequence"_a,
                 "kv_head"_a)
            .def("partition",
                 &AttentionAdapter::partition,
                 nb::rv_policy::copy,
                 "sequence"_a,
                 "kv_head"_a,
                 "partition"_a = 0)
            .def(
                    "cell_counts",
                    [](const AttentionAdapter& a,
                       int64_t sequence,
                       int kv_head,
                       int partition) {
                        const CellLists& lists =
                                a.lists(sequence, kv_head, partition);
                        return copy_to_numpy(
                                lists.stats().count, {size_t(lists.ncell())});
                    },
                    "sequence"_a,
                    "kv_head"_a,
                    "partition"_a = 0,
                    nb::sig("def cell_counts(self, sequence: int, kv_head: "
                            "int, partition: int = 0) -> numpy.typing.NDArray[numpy.int32]"),
                    "Far keys in each cell, (ncell,).")
            .def("bytes_used",
                 &AttentionAdapter::bytes_used,
                 "Bytes of all lists and their statistics; what sequences share "
                 "counts once.")
            .def(
                    "save",
                    [](const AttentionAdapter& adapter,
                       int64_t sequence,
                       const std::filesystem::path& path) {
                        nb::gil_scoped_release release;
                        adapter.save(sequence, path.string());
                    },
                    "sequence"_a,
                    "path"_a,
                    "Writes the lists of a sequence and its own partitions.")
            .def(
                    "load",
                    [](AttentionAdapter& adapter, const std::filesystem::path& path) {
                        nb::gil_scoped_release release;
                        return adapter.load(path.string());
                    },
                    "path"_a,
                    "A sequence as it was saved; its number.");

    adapter.def(
                   "attend",
                   [](const AttentionAdapter& a,
                      const nb::object& asking,
                      const nb::object& queries,
                      const ProbePolicy* policy,
                      const nb::object& output,
                      const nb::object& lse,
                      bool merge) {
                       const Batch batch(a, asking, queries);
                       return attend(
                               batch,
                               output,
                               lse,
                               merge,
                               [&](const AttendOutput& out) {
                                   a.attend(
                                           batch.inputs,
                                           batch.rows->data(),
                                           out,
                                           policy);
                               });
                   },
                   "batch"_a,
                   "queries"_a,
                   "policy"_a = nb::none(),
                   nb::kw_only(),
                   "output"_a = nb::none(),
                   "lse"_a = nb::none(),
                   "merge"_a = false,
                   nb::sig("def attend(self, batch: "
                           "collections.abc.Iterable[SequenceInput], queries: "
                           "object, policy: ProbePolicy | None = None, *, "
                           "output: object = None, lse: object = None, merge: "
                           "bool = False) -> Attention"),
                   "Attention of a batch.\n\nqueries: post-RoPE, (tokens, "
                   "heads_q, d), or (heads_q, d) of one token; float32 is read "
                   "in place. policy: None for the adapter's. output (tokens, "
                   "heads_q, d_v) and lse (tokens, heads_q): float32 arrays to "
                   "write to, None for new ones; with merge they already hold "
                   "results over other keys and become those of the union.")
            .def(
                    "route",
                    [](const AttentionAdapter& a,
                       const nb::object& asking,
                       const nb::object& queries,
                       const ProbePolicy* policy) {
                        const Batch batch(a, asking, queries);
                        nb::gil_scoped_release release;
                        return a.route(
                                batch.inputs, batch.rows->data(), policy);
                    },
                    "batch"_a,
                    "queries"_a,
                    "policy"_a = nb::none(),
                    nb::sig("def route(self, batch: "
                            "collections.abc.Iterable[SequenceInput], queries: "
                            "object, policy: ProbePolicy | None = None) -> "
                            "ProbedCells"),
                    "The first half of attend: which cells to probe (with "
                    "policy.refine, those whose keys are to be ranked).")
            .def(
                    "attend_preassigned",
                    [](const AttentionAdapter& a,
                       const nb::object& asking,
                       const nb::object& queries,
                       const ProbedCells& probed,
                       const nb::object& output,
                       const nb::object& lse,
                       const ProbePolicy* policy,
                       bool merge) {
                        const Batch batch(a, asking, queries);
                        return attend(
                                batch,
                                output,
                                lse,
                                merge,
                                [&](const AttendOutput& out) {
                                    a.attend_preassigned(
                                            batch.inputs,
                                            batch.rows->data(),
                                            probed,
                                            out,
                                            policy);
                                });
                    },
                    "batch"_a,
                    "queries"_a,
                    "probed"_a,
                    nb::kw_only(),
                    "output"_a = nb::none(),
                    "lse"_a = nb::none(),
                    "policy"_a = nb::none(),
                    "merge"_a = false,
                    nb::sig("def attend_preassigned(self, batch: "
                            "collections.abc.Iterable[SequenceInput], queries: "
                            "object, probed: ProbedCells, *, output: object = "
                            "None, lse: object = None, policy: ProbePolicy | "
                            "None = None, merge: bool = False) -> Attention"),
                    "The second half of attend, with cells from route or from "
                    "elsewhere. policy: where it refines, only the keys that it "
                    "allows are read; None: all keys of the cells.");

    m.def(
            "sequence_partitions",
            [](const ArrayView& view,
               int64_t begin,
               int64_t end,
               int ncell,
               const KMeansParams& params) {
                HeadPartitions all;
                {
                    nb::gil_scoped_release release;
                    all = sequence_partitions(
                            view.in_main_memory(), begin, end, ncell, params);
                }
                return to_python(all);
            },
            "kv"_a,
            "begin"_a,
            "end"_a,
            "ncell"_a,
            "params"_a = KMeansParams(),
            nb::sig("def sequence_partitions(kv: KvView, begin: int, end: int, "
                    "ncell: int, params: KMeansParams = ...) -> "
                    "list[list[Partition]]"),
            "Partitions for one sequence, one list for each KV head, learnt "
            "from the keys of the slots begin .. end - 1 as the cache holds "
            "them (post-RoPE).");

    nb::class_<LayerPlan>(
            m,
            "LayerPlan",
            "What an AttentionAdapter of one layer needs to do as the plans of "
            "a PartitionSet say: AttentionAdapter(..., plan.trained, "
            "policy=plan.policy), and create(plan.own(...)) for each sequence.")
            .def(nb::init<const PartitionSet&, int, int>(),
                 "set"_a,
                 "layer"_a,
                 "heads_kv"_a)
            .def_prop_ro(
                    "trained",
                    [](const LayerPlan& p) { return to_python(p.trained); },
                    nb::sig("def trained(self) -> list[list[Partition]]"),
                    "Partitions of every sequence, a list for each KV head.")
            .def_ro("keys_per_cell",
                    &LayerPlan::keys_per_cell,
                    "Of each KV head's own cells; 0: it has none.")
            .def_ro("policy",
                    &LayerPlan::policy,
                    nb::rv_policy::copy,
                    "How much is read through each; a copy.")
            .def(
                    "own",
                    [](const LayerPlan& plan,
                       const ArrayView& view,
                       int64_t begin,
                       int64_t end,
                       const KMeansParams& params) {
                        HeadPartitions all;
                        {
                            nb::gil_scoped_release release;
                            all = plan.own(
                                    view.in_main_memory(), begin, end, params);
                        }
                        return to_python(all);
                    },
                    "prefill"_a,
                    "begin"_a,
                    "end"_a,
                    "params"_a = KMeansParams(),
                    nb::sig("def own(self, prefill: KvView, begin: int, end: "
                            "int, params: KMeansParams = ...) -> "
                            "list[list[Partition]]"),
                    "A sequence's own partitions, learnt from the keys of the "
                    "slots begin .. end - 1.");
}

} // namespace faiss_saap::python
