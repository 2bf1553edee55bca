/// Traces, training, and files of trained partitions.
#include <functional>
#include <memory>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/Trace.h>
#include <faiss_saap/train_partition.h>

#include "arrays.h"
#include "bind.h"
#include "copies_of.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

auto dtype_reader(DType TrainingParams::*field) {
    return [field](const TrainingParams& p) { return name(p.*field); };
}

auto dtype_writer(const char* argument, DType TrainingParams::*field) {
    return [argument, field](TrainingParams& p, const std::string& text) {
        p.*field = stored_dtype(argument, text);
    };
}

using ReadHead = std::vector<float> (Trace::*)(int, int) const;

auto head_reader(ReadHead read) {
    return [read](const Trace& t, int layer, int head) {
        std::vector<float> x;
        {
            nb::gil_scoped_release release;
            x = (t.*read)(layer, head);
        }
        return copy_to_numpy(x.data(), {x.size() / t.d, size_t(t.d)});
    };
}

void set_fields(nb::handle object, const char* type, const nb::kwargs& fields) {
    for (const auto [name, value] : fields) {
        FAISS_THROW_IF_NOT_FMT(
                nb::hasattr(object, name),
                "%s has no field '%s'",
                type,
                nb::str(name).c_str());
        nb::setattr(object, name, value);
    }
}

} // namespace

void bind_training(nb::module_& m) {
    nb::class_<Trace>(
            m,
            "Trace",
            "Recorded queries, keys and values of a model on a text "
            "(docs/trace-format.md), read from a file when they are asked for.")
            .def("__init__",
                 [](Trace* self, const std::filesystem::path& path) {
                     new (self) Trace(path.string());
                 },
                 "path"_a)
            .def_ro("tokens", &Trace::tokens)
            .def_ro("heads_q", &Trace::heads_q)
            .def_ro("heads_kv", &Trace::heads_kv)
            .def_ro("d", &Trace::d)
            .def_ro("layers", &Trace::layers)
            .def_ro("kv_heads", &Trace::kv_heads)
            .def_ro("model", &Trace::model)
            .def_ro("text", &Trace::text)
            .def_ro("rope", &Trace::rope)
            .def("queries",
                 head_reader(&Trace::queries),
                 "layer"_a,
                 "head"_a,
                 nb::sig("def queries(self, layer: int, head: int) -> "
                         "numpy.typing.NDArray[numpy.float32]"),
                 "One query head, pre-RoPE, (tokens, d).")
            .def("keys",
                 head_reader(&Trace::keys),
                 "layer"_a,
                 "kv_head"_a,
                 nb::sig("def keys(self, layer: int, kv_head: int) -> "
                         "numpy.typing.NDArray[numpy.float32]"),
                 "One KV head's keys, pre-RoPE, (tokens, d).")
            .def("values",
                 head_reader(&Trace::values),
                 "layer"_a,
                 "kv_head"_a,
                 nb::sig("def values(self, layer: int, kv_head: int) -> "
                         "numpy.typing.NDArray[numpy.float32]"),
                 "One KV head's values, (tokens, d).");

    nb::class_<TrainingParams>(
            m,
            "TrainingParams",
            "How a partition is trained. Every field can be given by name: "
            "TrainingParams(ncell=256, steps=300).")
            .def(
                    "__init__",
                    [](nb::pointer_and_handle<TrainingParams> self,
                       const nb::kwargs& fields) {
                        new (self.p) TrainingParams();
                        nb::inst_mark_ready(self.h);
                        set_fields(self.h, "TrainingParams", fields);
                    },
                    nb::sig("def __init__(self, **fields: object) -> None"))
            .def_rw("ncell", &TrainingParams::ncell, "Cells.")
            .def_rw("sink", &TrainingParams::sink, "First tokens: no targets.")
            .def_rw("window",
                    &TrainingParams::window,
                    "Most recent tokens: no targets.")
            .def_rw("scale",
                    &TrainingParams::scale,
                    "Attention scale; 0: 1 / sqrt(d).")
            .def_rw("kmeans", &TrainingParams::kmeans)
            .def_rw("keys_per_cell", &TrainingParams::keys_per_cell)
            .def_rw("width", &TrainingParams::width, "Of the hidden layers.")
            .def_rw("depth",
                    &TrainingParams::depth,
                    "Residual blocks; 0: one rectified hidden layer.")
            .def_rw("share_input",
                    &TrainingParams::share_input,
                    "The query heads share the matrix of the first layer.")
            .def_rw("share_trunk",
                    &TrainingParams::share_trunk,
                    "They share what follows.")
            .def_prop_rw(
                    "dtype",
                    dtype_reader(&TrainingParams::dtype),
                    dtype_writer("dtype", &TrainingParams::dtype),
                    "Of the weights in the result, bfloat16 or float32.")
            .def_prop_rw(
                    "centroid_dtype",
                    dtype_reader(&TrainingParams::centroid_dtype),
                    dtype_writer("centroid_dtype", &TrainingParams::centroid_dtype),
                    "What centroids are rounded to, bfloat16 or float32 (not at all).")
            .def_rw("steps", &TrainingParams::steps, "Mini-batches at most.")
            .def_rw("batch", &TrainingParams::batch, "Tokens of a mini-batch.")
            .def_rw("warmup", &TrainingParams::warmup)
            .def_rw("learning_rate", &TrainingParams::learning_rate)
            .def_rw("weight_decay", &TrainingParams::weight_decay)
            .def_rw("mass_power", &TrainingParams::mass_power)
            .def_rw("held_out_queries", &TrainingParams::held_out_queries)
            .def_rw("budget", &TrainingParams::budget)
            .def_rw("evaluate_every", &TrainingParams::evaluate_every)
            .def_rw("patience", &TrainingParams::patience)
            .def_rw("blend", &TrainingParams::blend)
            .def_rw("blend_queries", &TrainingParams::blend_queries)
            .def_rw("seed", &TrainingParams::seed);

    nb::class_<HeldOut>(
            m, "HeldOut", "How one query head does on the held-out text.")
            .def_ro("recall", &HeldOut::recall, "Mass recall.")
            .def_ro("ceiling", &HeldOut::ceiling, "That of the partition.")
            .def_ro("far_mass",
                    &HeldOut::far_mass,
                    "Mean attention mass of the far keys.");

    nb::class_<TrainedPartition>(
            m,
            "TrainedPartition",
            "The partition of one KV head, and what is known about it.")
            .def_ro("layer", &TrainedPartition::layer)
            .def_ro("kv_head", &TrainedPartition::kv_head)
            .def_ro("partition",
                    &TrainedPartition::partition,
                    "Keys by centroids, queries by a QueryClassifier.")
            .def_ro("heads", &TrainedPartition::heads)
            .def_ro("steps", &TrainedPartition::steps)
            .def_ro("scale", &TrainedPartition::scale)
            .def_prop_ro(
                    "blend",
                    [](const TrainedPartition& p) {
                        static_assert(
                                sizeof(BlendWeights) ==
                                kBlendFeatures * sizeof(float));
                        return copy_to_numpy(
                                reinterpret_cast<const float*>(p.blend.data()),
                                {p.blend.size(), size_t(kBlendFeatures)});
                    },
                    nb::sig("def blend(self) -> numpy.typing.NDArray[numpy.float32]"),
                    "Weights of a BlendAssigner, (query heads, 5); no rows "
                    "where not trained.")
            .def("blended",
                 &TrainedPartition::blended,
                 "The same cells with a BlendAssigner for queries.");

    nb::class_<ProbePlan>(
            m,
            "ProbePlan",
            "What a KV head probes (docs/classifier.md). Every field can be "
            "given by name.")
            .def(
                    "__init__",
                    [](nb::pointer_and_handle<ProbePlan> self,
                       const nb::kwargs& fields) {
                        new (self.p) ProbePlan();
                        nb::inst_mark_ready(self.h);
                        set_fields(self.h, "ProbePlan", fields);
                    },
                    nb::sig("def __init__(self, **fields: object) -> None"))
            .def_rw("layer", &ProbePlan::layer)
            .def_rw("kv_head", &ProbePlan::kv_head)
            .def_prop_rw(
                    "trained",
                    [](const ProbePlan& p) { return name(p.trained); },
                    [](ProbePlan& p, const std::string& query) {
                        p.trained = trained_query(query);
                    },
                    nb::for_getter(nb::sig("def trained(self) -> str")),
                    nb::for_setter(
                            nb::sig("def trained(self, query: str) -> None")),
                    "Who ranks the trained cells: none, classifier, mean or "
                    "blend.")
            .def_rw("trained_share",
                    &ProbePlan::trained_share,
                    "Of the far keys, read through them at most.")
            .def_rw("segment",
                    &ProbePlan::segment,
                    "Tokens of a segment that they are cut into; 0: they are "
                    "not.")
            .def_rw("keys_per_cell",
                    &ProbePlan::keys_per_cell,
                    "Of the sequence's own cells; 0: it has none.")
            .def_rw("own_share",
                    &ProbePlan::own_share,
                    "Of the far keys, read through these at most.")
            .def_rw("tokens", &ProbePlan::tokens)
            .def_rw("byte_budget", &ProbePlan::byte_budget)
            .def_rw("recall", &ProbePlan::recall)
            .def_rw("output_error", &ProbePlan::output_error);

    nb::class_<PartitionSet>(
            m,
            "PartitionSet",
            "Trained partitions of a model, what a .saap file holds.")
            .def(
                    "__init__",
                    [](PartitionSet* self,
                       std::vector<TrainedPartition> partitions,
                       const std::string& model,
                       int64_t sink,
                       int64_t window,
                       std::vector<std::string> texts,
                       int seed) {
                        FAISS_THROW_IF_NOT_MSG(
                                !partitions.empty(), "partitions is empty");
                        PartitionSet set;
                        set.rope = partitions.front().partition.rope;
                        set.partitions = std::move(partitions);
                        set.model = model;
                        set.sink = sink;
                        set.window = window;
                        set.texts = std::move(texts);
                        set.seed = seed;
                        new (self) PartitionSet(std::move(set));
                    },
                    "partitions"_a,
                    "model"_a = "",
                    "sink"_a = 0,
                    "window"_a = 0,
                    "texts"_a = std::vector<std::string>(),
                    "seed"_a = 0)
            .def_ro("partitions", &PartitionSet::partitions)
            .def_prop_rw(
                    "plans",
                    [](const PartitionSet& set) { return set.plans; },
                    [](PartitionSet& set, std::vector<ProbePlan> plans) {
                        set.plans = std::move(plans);
                    },
                    "What KV heads probe; empty where nothing was chosen. Copies: "
                    "assign a list to change them.")
            .def_ro("plan_texts", &PartitionSet::plan_texts)
            .def_ro("model", &PartitionSet::model)
            .def_ro("rope", &PartitionSet::rope)
            .def_ro("sink", &PartitionSet::sink)
            .def_ro("window", &PartitionSet::window)
            .def_ro("texts", &PartitionSet::texts)
            .def_ro("seed", &PartitionSet::seed)
            .def("find",
                 &PartitionSet::find,
                 nb::rv_policy::copy,
                 "layer"_a,
                 "kv_head"_a,
                 "The partition of this KV head.")
            .def("check_rope",
                 &PartitionSet::check_rope,
                 "rope"_a,
                 "Raises unless they were trained for these parameters.");
    m.def(
            "read_partitions",
            [](const std::filesystem::path& path) {
                nb::gil_scoped_release release;
                return read_partitions(path.string());
            },
            "path"_a,
            "Reads a .saap file.");
    m.def(
            "write_partitions",
            [](const PartitionSet& set, const std::filesystem::path& path) {
                nb::gil_scoped_release release;
                write_partitions(set, path.string());
            },
            "set"_a,
            "path"_a,
            "Writes a .saap file, whole or not at all.");

    m.def(
            "train_partition",
            [](const nb::object& texts,
               int layer,
               int kv_head,
               const TrainingParams& params,
               const nb::object& callback) {
                // cheap: they share the mapped file
                const auto copies = copies_of<Trace>(texts, "texts", "Trace");
                TrainingCallback call;
                if (!callback.is_none()) {
                    call = [&callback](const TrainingState& s) {
                        nb::gil_scoped_acquire acquire;
                        callback(s.step, s.loss, s.best_recall);
                    };
                }
                nb::gil_scoped_release release;
                return train_partition(
                        copies, layer, kv_head, params, nullptr, call);
            },
            "texts"_a,
            "layer"_a,
            "kv_head"_a,
            "params"_a = TrainingParams(),
            "callback"_a = nb::none(),
            nb::sig("def train_partition(texts: list[Trace], layer: int, "
                    "kv_head: int, params: TrainingParams = ..., callback: "
                    "collections.abc.Callable[[int, float, float], object] | "
                    "None = None) -> TrainedPartition"),
            "Learns cells by k-means on the de-rotated keys of the texts, then "
            "a classifier from true attention; the last text is held out. "
            "callback(step, loss, best_recall) is called after every "
            "mini-batch; what it raises ends the training.");
}

} // namespace faiss_saap::python
