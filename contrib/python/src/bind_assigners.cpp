/// Assigners, partitions and rotary embedding.
#include <memory>

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <faiss/IndexFlat.h>

#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/Partition.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>

#include "arrays.h"
#include "bind.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

/// nanobind passes no pointers to const; every assigner is immutable.
std::shared_ptr<CellAssigner> shared(std::shared_ptr<const CellAssigner> a) {
    return std::const_pointer_cast<CellAssigner>(std::move(a));
}

/// The arrays that an assigner asks for, checked against each other.
struct RoutingArrays {
    RoutingInput input;

    RoutingArrays(
            const CellAssigner& assigner,
            const nb::object& pre_rope,
            const nb::object& post_rope,
            const nb::object& position,
            const nb::object& head) {
        input.d = assigner.d;
        input.n = -1;
        input.pre_rope = vectors(pre_rope, "pre_rope", pre_);
        input.post_rope = vectors(post_rope, "post_rope", post_);
        FAISS_THROW_IF_NOT_MSG(
                input.n >= 0, "pre_rope and post_rope are both None");
        if (!position.is_none()) {
            position_ = longs_of(position, "position");
            check_shape(AnyArray(position_), "position", {input.n});
            input.position = position_.data();
        }
        if (!head.is_none()) {
            head_ = integers_of(head, "head", input.n);
            input.head = head_.data();
        }
    }

   private:
    const float* vectors(
            const nb::object& x,
            const char* name,
            std::unique_ptr<FloatRows>& rows) {
        if (x.is_none()) {
            return nullptr;
        }
        const AnyArray array = array_of(x, name);
        check_shape(array, name, {input.n, input.d});
        input.n = static_cast<int64_t>(array.shape(0));
        rows = std::make_unique<FloatRows>(array, name);
        return rows->data();
    }

    std::unique_ptr<FloatRows> pre_, post_;
    Longs position_;
    std::vector<int32_t> head_;
};

RoutingNeeds space_of(unsigned space) {
    FAISS_THROW_IF_NOT_FMT(
            space == NEEDS_PRE_ROPE || space == NEEDS_POST_ROPE,
            "space = %u, must be NEEDS_PRE_ROPE or NEEDS_POST_ROPE",
            space);
    return static_cast<RoutingNeeds>(space);
}

} // namespace

void bind_assigners(nb::module_& m) {
    m.attr("NEEDS_PRE_ROPE") = unsigned(NEEDS_PRE_ROPE);
    m.attr("NEEDS_POST_ROPE") = unsigned(NEEDS_POST_ROPE);
    m.attr("NEEDS_POSITION") = unsigned(NEEDS_POSITION);
    m.attr("NEEDS_STATS") = unsigned(NEEDS_STATS);
    m.attr("NEEDS_HEAD") = unsigned(NEEDS_HEAD);
    m.attr("NEEDS_NEWEST_KEYS") = unsigned(NEEDS_NEWEST_KEYS);
    m.attr("METRIC_INNER_PRODUCT") = int(faiss::METRIC_INNER_PRODUCT);
    m.attr("METRIC_L2") = int(faiss::METRIC_L2);

    nb::class_<RopeParams>(
            m,
            "RopeParams",
            "Rotary embedding of a model. layout: 'half' (Hugging Face) or "
            "'interleaved' (GGUF); scaling: '', 'linear:2', 'ntk:4', "
            "'llama3:{json}' or 'yarn:{json}' with the keys of Hugging Face's "
            "rope_scaling. d = 0: no rotation.")
            .def(
                    "__init__",
                    [](RopeParams* self,
                       int d,
                       double theta,
                       const std::string& layout,
                       const std::string& scaling) {
                        RopeParams p;
                        p.d = d;
                        p.theta = theta;
                        FAISS_THROW_IF_NOT_FMT(
                                layout == "half" || layout == "interleaved",
                                "layout = '%s', must be half or interleaved",
                                layout.c_str());
                        p.layout = layout == "half" ? RopeLayout::half
                                                    : RopeLayout::interleaved;
                        p.set_scaling(scaling);
                        new (self) RopeParams(p);
                    },
                    "d"_a = 0,
                    "theta"_a = 10000.0,
                    "layout"_a = "half",
                    "scaling"_a = "")
            .def_ro("d", &RopeParams::d)
            .def_ro("theta", &RopeParams::theta)
            .def_prop_ro(
                    "layout",
                    [](const RopeParams& p) {
                        return p.layout == RopeLayout::half ? "half"
                                                            : "interleaved";
                    })
            .def_prop_ro("scaling", &RopeParams::scaling_text)
            .def(
                    "__eq__",
                    [](const RopeParams& a, const RopeParams& b) {
                        return a == b;
                    },
                    nb::is_operator(),
                    nb::sig("def __eq__(self, other: object, /) -> bool"))
            .def("__hash__", [](const RopeParams& p) {
                return nb::hash(nb::make_tuple(
                        p.d, p.theta, static_cast<int>(p.layout), p.scaling_text()));
            });

    using Turn = void (RotaryEmbedding::*)(int64_t, const int64_t*, float*)
            const;
    const auto turned = [](Turn turn) {
        return [turn](const RotaryEmbedding& r,
                      const nb::object& given,
                      const nb::object& positions) {
            const Floats x = floats_of(given, "x");
            const Longs position = longs_of(positions, "position");
            check_shape(AnyArray(x), "x", {-1, r.params.d});
            const auto n = static_cast<int64_t>(x.shape(0));
            check_shape(AnyArray(position), "position", {n});
            NewArray<float> out({x.shape(0), x.shape(1)});
            {
                nb::gil_scoped_release release;
                std::copy(x.data(), x.data() + x.size(), out.data());
                (r.*turn)(n, position.data(), out.data());
            }
            return out.object();
        };
    };
    nb::class_<RotaryEmbedding>(
            m, "RotaryEmbedding", "Rotates vectors by positions and back.")
            .def(nb::init<const RopeParams&>(), "params"_a)
            .def("rotate",
                 turned(&RotaryEmbedding::rotate),
                 "x"_a,
                 "position"_a,
                 nb::sig("def rotate(self, x: numpy.typing.ArrayLike, position: numpy.typing.ArrayLike) "
                         "-> numpy.typing.NDArray[numpy.float32]"),
                 "Rotated copies, float32 (n, d), of x (n, d) at position (n,) "
                 "int64.")
            .def("derotate",
                 turned(&RotaryEmbedding::derotate),
                 "x"_a,
                 "position"_a,
                 nb::sig("def derotate(self, x: numpy.typing.ArrayLike, position: numpy.typing.ArrayLike)"
                         " -> numpy.typing.NDArray[numpy.float32]"),
                 "The inverse of rotate.");

    nb::class_<CellAssigner>(
            m,
            "CellAssigner",
            "Scores the cells of a partition for keys or for queries. A score "
            "times the attention scale is the logarithm of the attention mass "
            "per key, up to a constant per vector. Immutable.")
            .def_ro("d", &CellAssigner::d, "Dimension of the vectors.")
            .def_ro("ncell", &CellAssigner::ncell, "Number of cells.")
            .def_ro("needs", &CellAssigner::needs, "NEEDS_ flags: what it reads.")
            .def("bytes_read",
                 &CellAssigner::bytes_read,
                 "Bytes that scoring one token's vectors reads, all query heads "
                 "of the group together.")
            .def(
                    "scores",
                    [](const CellAssigner& a,
                       const nb::object& pre_rope,
                       const nb::object& post_rope,
                       const nb::object& position,
                       const nb::object& head) {
                        const RoutingArrays x(
                                a, pre_rope, post_rope, position, head);
                        NewArray<float> out(
                                {size_t(x.input.n), size_t(a.ncell)});
                        {
                            nb::gil_scoped_release release;
                            a.scores(x.input, nullptr, out.data());
                        }
                        return out.object();
                    },
                    "pre_rope"_a = nb::none(),
                    "post_rope"_a = nb::none(),
                    "position"_a = nb::none(),
                    "head"_a = nb::none(),
                    nb::sig("def scores(self, pre_rope: numpy.typing.ArrayLike | None = "
                            "None, post_rope: numpy.typing.ArrayLike | None = None, "
                            "position: numpy.typing.ArrayLike | None = None, head: "
                            "numpy.typing.ArrayLike | None = None) -> "
                            "numpy.typing.NDArray[numpy.float32]"),
                    "Scores of all cells, float32 (n, ncell).\n\n"
                    "pre_rope, post_rope: (n, d), those that the assigner "
                    "needs; position: (n,) int64 in tokens; head: (n,) int32, "
                    "the query head within its group.")
            .def(
                    "assign",
                    [](const CellAssigner& a,
                       int k,
                       const nb::object& pre_rope,
                       const nb::object& post_rope,
                       const nb::object& position,
                       const nb::object& head) {
                        const RoutingArrays x(
                                a, pre_rope, post_rope, position, head);
                        FAISS_THROW_IF_NOT_FMT(
                                k >= 1 && k <= a.ncell,
                                "k = %d, must be 1 to ncell = %d",
                                k,
                                a.ncell);
                        NewArray<int32_t> cells({size_t(x.input.n), size_t(k)});
                        NewArray<float> scores({size_t(x.input.n), size_t(k)});
                        {
                            nb::gil_scoped_release release;
                            a.assign(
                                    x.input,
                                    nullptr,
                                    k,
                                    cells.data(),
                                    scores.data());
                        }
                        return nb::make_tuple(cells.object(), scores.object());
                    },
                    "k"_a,
                    "pre_rope"_a = nb::none(),
                    "post_rope"_a = nb::none(),
                    "position"_a = nb::none(),
                    "head"_a = nb::none(),
                    nb::sig("def assign(self, k: int, pre_rope: numpy.typing.ArrayLike | "
                            "None = None, post_rope: numpy.typing.ArrayLike | None = None, "
                            "position: numpy.typing.ArrayLike | None = None, head: "
                            "numpy.typing.ArrayLike | None = None) -> "
                            "tuple[numpy.typing.NDArray[numpy.int32], "
                            "numpy.typing.NDArray[numpy.float32]]"),
                    "The k best cells of each vector, best first: cells (n, k) "
                    "int32, -1 where there are fewer, and scores (n, k) "
                    "float32. Arguments as of scores.");

    nb::class_<QuantizerAssigner, CellAssigner>(
            m,
            "QuantizerAssigner",
            "Scores cells by centroids: q.c, or -|q-c|^2 / 2 with METRIC_L2.")
            .def(
                    "__init__",
                    [](QuantizerAssigner* self,
                       const nb::object& given,
                       int metric,
                       unsigned space) {
                        const Floats centroids = floats_of(given, "centroids");
                        check_shape(AnyArray(centroids), "centroids", {-1, -1});
                        FAISS_THROW_IF_NOT_FMT(
                                metric == faiss::METRIC_L2 ||
                                        metric == faiss::METRIC_INNER_PRODUCT,
                                "metric = %d, must be METRIC_L2 or "
                                "METRIC_INNER_PRODUCT",
                                metric);
                        auto flat = std::make_shared<faiss::IndexFlat>(
                                static_cast<faiss::Index::idx_t>(
                                        centroids.shape(1)),
                                static_cast<faiss::MetricType>(metric));
                        flat->add(
                                static_cast<faiss::Index::idx_t>(
                                        centroids.shape(0)),
                                centroids.data());
                        new (self) QuantizerAssigner(flat, space_of(space));
                    },
                    "centroids"_a,
                    "metric"_a = int(faiss::METRIC_INNER_PRODUCT),
                    "space"_a = unsigned(NEEDS_POST_ROPE),
                    nb::sig("def __init__(self, centroids: numpy.typing.ArrayLike, metric: "
                            "int = 0, space: int = 2) -> None"),
                    "centroids: (ncell, d); space: NEEDS_PRE_ROPE or "
                    "NEEDS_POST_ROPE.")
            .def_prop_ro(
                    "centroids",
                    [](const QuantizerAssigner& a) {
                        NewArray<float> out({size_t(a.ncell), size_t(a.d)});
                        a.quantizer->reconstruct_n(0, a.ncell, out.data());
                        return out.object();
                    },
                    nb::sig("def centroids(self) -> numpy.typing.NDArray[numpy.float32]"),
                    "Representatives of the cells, (ncell, d).");

    nb::class_<CellMeanAssigner, CellAssigner>(
            m,
            "CellMeanAssigner",
            "Scores cells by the mean of the sequence's own rotated keys in "
            "them; works inside an AttentionAdapter, which keeps the means.")
            .def(nb::init<int, int>(), "d"_a, "ncell"_a);

    nb::class_<QueryClassifier, CellAssigner>(
            m,
            "QueryClassifier",
            "A small trained network that scores cells from the pre-RoPE query "
            "(see docs/classifier.md).")
            .def(
                    "__init__",
                    [](QueryClassifier* self,
                       const nb::object& given,
                       int d,
                       int ncell,
                       int group,
                       int width,
                       int depth,
                       bool share_trunk,
                       const std::string& dtype,
                       bool share_input) {
                        ClassifierShape s;
                        s.d = d;
                        s.ncell = ncell;
                        s.group = group;
                        s.width = width;
                        s.depth = depth;
                        s.share_input = share_input;
                        s.share_trunk = share_trunk;
                        s.check();
                        const Floats parameters = floats_of(given, "parameters");
                        check_shape(
                                AnyArray(parameters),
                                "parameters",
                                {parameter_count(s)});
                        new (self) QueryClassifier(
                                s, parameters.data(), stored_dtype("dtype", dtype));
                    },
                    "parameters"_a,
                    "d"_a,
                    "ncell"_a,
                    "group"_a = 1,
                    "width"_a = ClassifierShape().width,
                    "depth"_a = ClassifierShape().depth,
                    "share_trunk"_a = ClassifierShape().share_trunk,
                    "dtype"_a = "bfloat16",
                    "share_input"_a = ClassifierShape().share_input,
                    nb::sig("def __init__(self, parameters: numpy.typing.ArrayLike, d: int, "
                            "ncell: int, group: int = 1, width: int = 128, "
                            "depth: int = 0, share_trunk: bool = True, dtype: "
                            "str = 'bfloat16', share_input: bool = True) -> None"),
                    "parameters: one row of floats, layer by layer the weights "
                    "and then the biases: 'in' (width * d, once where heads share it; "
                    "biases for each head), for each of depth residual blocks 'up' and "
                    "'down' (width * width), 'out' (ncell * width); blocks and 'out' for "
                    "each head unless the trunk is shared. Without blocks what 'in' gives "
                    "is rectified.")
            .def(
                    "parameters",
                    [](const QueryClassifier& c) {
                        const auto p = c.parameters();
                        return copy_to_numpy(p.data(), {p.size()});
                    },
                    nb::sig("def parameters(self) -> numpy.typing.NDArray[numpy.float32]"),
                    "The parameters as they are used, rounded to dtype.");

    nb::class_<BlendAssigner, CellAssigner>(
            m,
            "BlendAssigner",
            "A classifier and statistics of the sequence's cells together; "
            "works inside an AttentionAdapter, which keeps these.")
            .def(
                    "__init__",
                    [](BlendAssigner* self,
                       std::shared_ptr<QueryClassifier> classifier,
                       const nb::object& given,
                       float scale) {
                        const Floats weights = floats_of(given, "weights");
                        check_shape(
                                AnyArray(weights),
                                "weights",
                                {-1, kBlendFeatures});
                        std::vector<BlendWeights> w;
                        for (size_t g = 0; g < weights.shape(0); g++) {
                            const float* x =
                                    weights.data() + g * kBlendFeatures;
                            w.push_back({x[0], x[1], x[2], x[3], x[4]});
                        }
                        new (self)
                                BlendAssigner(std::move(classifier), w, scale);
                    },
                    "classifier"_a,
                    "weights"_a,
                    "scale"_a,
                    nb::sig("def __init__(self, classifier: QueryClassifier, "
                            "weights: numpy.typing.ArrayLike, scale: float) -> None"),
                    "weights: (query heads, 5) for classifier, mean, newest, "
                    "age and count; scale: that of the attention.");

    nb::class_<Partition>(
            m,
            "Partition",
            "Cells with distinct assigners for keys and queries; immutable.")
            .def(
                    "__init__",
                    [](Partition* self,
                       std::shared_ptr<CellAssigner> key,
                       std::shared_ptr<CellAssigner> query,
                       const RopeParams& rope) {
                        Partition p{std::move(key), std::move(query), rope};
                        p.check();
                        new (self) Partition(std::move(p));
                    },
                    "key"_a,
                    "query"_a,
                    "rope"_a = RopeParams())
            .def_prop_ro(
                    "key", [](const Partition& p) { return shared(p.key); })
            .def_prop_ro(
                    "query", [](const Partition& p) { return shared(p.query); })
            .def_ro("rope", &Partition::rope)
            .def_prop_ro("d", &Partition::d)
            .def_prop_ro("ncell", &Partition::ncell);

    nb::class_<KMeansParams>(m, "KMeansParams", "Parameters of k-means.")
            .def(
                    "__init__",
                    [](KMeansParams* self,
                       int niter,
                       bool spherical,
                       int seed,
                       bool verbose) {
                        new (self) KMeansParams{niter, spherical, seed, verbose};
                    },
                    "niter"_a = 10,
                    "spherical"_a = false,
                    "seed"_a = 1234,
                    "verbose"_a = false)
            .def_rw("niter", &KMeansParams::niter, "Iterations.")
            .def_rw("spherical",
                    &KMeansParams::spherical,
                    "Unit centroids, keys assigned by inner product.")
            .def_rw("seed", &KMeansParams::seed)
            .def_rw("verbose", &KMeansParams::verbose);

    m.def(
            "kmeans_partition",
            [](const nb::object& given,
               int ncell,
               unsigned space,
               const KMeansParams& params,
               const RopeParams& rope) {
                const Floats x = floats_of(given, "x");
                check_shape(AnyArray(x), "x", {-1, -1});
                const RoutingNeeds needs = space_of(space);
                nb::gil_scoped_release release;
                return kmeans_partition(
                        static_cast<int64_t>(x.shape(0)),
                        static_cast<int>(x.shape(1)),
                        x.data(),
                        ncell,
                        needs,
                        params,
                        rope);
            },
            "x"_a,
            "ncell"_a,
            "space"_a = unsigned(NEEDS_POST_ROPE),
            "params"_a = KMeansParams(),
            "rope"_a = RopeParams(),
            nb::sig("def kmeans_partition(x: numpy.typing.ArrayLike, ncell: int, space: int "
                    "= 2, params: KMeansParams = ..., rope: RopeParams = ...) "
                    "-> Partition"),
            "A partition learnt from keys x (n, d), n >= ncell: k-means for the "
            "keys, inner product with the cells' means for the queries. space: "
            "NEEDS_PRE_ROPE or NEEDS_POST_ROPE, what x is.");
    m.def("symmetric",
          &symmetric,
          "partition"_a,
          "A partition whose queries are assigned exactly as its keys.");
}

} // namespace faiss_saap::python
