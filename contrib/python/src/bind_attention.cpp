/// Views of a KV cache, and attention over chosen slots of it.
#include <nanobind/stl/optional.h>

#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include <cmath>

#include "bind.h"
#include "kv_view.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

float scale_or_default(float scale, int d) {
    return scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(d));
}

int64_t extent(const AnyArray& x, size_t axis) {
    return static_cast<int64_t>(x.shape(axis));
}

int small_extent(const AnyArray& x, size_t axis, const char* name) {
    FAISS_THROW_IF_NOT_FMT(
            x.shape(axis) <= INT_MAX, "%s = %zd is beyond 2^31 - 1", name, x.shape(axis));
    return static_cast<int>(x.shape(axis));
}

/// Strides of the components must be 1: rows are read as they lie.
void check_rows(const AnyArray& x, const char* name) {
    const size_t last = x.ndim() - 1;
    FAISS_THROW_IF_NOT_FMT(
            x.stride(last) == 1 || x.shape(last) == 1 || x.size() == 0,
            "%s has a stride of %lld elements in its last dimension, the "
            "components of a row must be contiguous",
            name,
            static_cast<long long>(x.stride(last)));
}

void set_length(ArrayView& view, int64_t length) {
    FAISS_THROW_IF_NOT_FMT(
            length >= 0 && length <= view.capacity,
            "length = %lld, the arrays hold %lld tokens",
            static_cast<long long>(length),
            static_cast<long long>(view.capacity));
    view.kv.length = length;
}

void check_together(const ArrayView& view, const AnyArray& x, const char* name) {
    FAISS_THROW_IF_NOT_FMT(
            device_of(x) == view.device,
            "%s must lie where k does, in main memory or on one CUDA device",
            name);
}

/// A view of k and v, whose first dimensions have the meanings given.
ArrayView make_view(
        const nb::object& k_object,
        const nb::object& v_object,
        size_t page_axes,
        size_t token_axis,
        size_t head_axis) {
    ArrayView view;
    view.k = array_anywhere(k_object, "k");
    view.v = array_anywhere(v_object, "v");
    view.device = device_of(view.k);
    check_together(view, view.v, "v");
    const size_t ndim = 3 + page_axes;
    FAISS_THROW_IF_NOT_FMT(
            view.k.ndim() == ndim,
            "k has the shape %s, expected %zd dimensions",
            shape_text(view.k).c_str(),
            ndim);
    std::vector<int64_t> shape;
    for (size_t i = 0; i + 1 < ndim; i++) {
        shape.push_back(extent(view.k, i));
    }
    shape.push_back(-1);
    check_shape(view.v, "v", shape);
    check_rows(view.k, "k");
    check_rows(view.v, "v");
    KvView& kv = view.kv;
    kv.dtype = dtype_of(view.k, "k");
    FAISS_THROW_IF_NOT_MSG(
            dtype_of(view.v, "v") == kv.dtype,
            "k and v have elements of different types");
    kv.k = view.k.data();
    kv.v = view.v.data();
    kv.heads = small_extent(view.k, head_axis, "heads");
    kv.d = small_extent(view.k, ndim - 1, "d");
    kv.d_v = small_extent(view.v, ndim - 1, "d_v");
    kv.k_token_stride = view.k.stride(token_axis);
    kv.k_head_stride = view.k.stride(head_axis);
    kv.v_token_stride = view.v.stride(token_axis);
    kv.v_head_stride = view.v.stride(head_axis);
    view.capacity = extent(view.k, token_axis);
    return view;
}

ArrayView finished(ArrayView view, std::optional<int64_t> length) {
    set_length(view, length.value_or(view.capacity));
    if (view.device == kMainMemory) {
        view.kv.check();
    } else {
        view.kv.check_shape();
    }
    return view;
}

nb::object attended(
        NewArray<float>& output,
        NewArray<float>& lse) {
    return nb::make_tuple(output.object(), lse.object());
}

} // namespace

void bind_attention(nb::module_& m) {
    nb::class_<ArrayView>(
            m,
            "KvView",
            "Where the keys and values of one layer and one sequence lie: "
            "arrays of numpy or of any framework that speaks DLPack, in main "
            "memory or, for GpuAttentionAdapter, on one CUDA device; float32, "
            "float16 or bfloat16 (uint16 holds bfloat16's bits). Never copied: "
            "what is written to the arrays later is what is read, and they are "
            "kept alive. Any strides, but components of a row must be "
            "contiguous.")
            .def_static(
                    "token_major",
                    [](const nb::object& k,
                       const nb::object& v,
                       std::optional<int64_t> length) {
                        return finished(make_view(k, v, 0, 0, 1), length);
                    },
                    "k"_a,
                    "v"_a,
                    "length"_a = nb::none(),
                    nb::sig("def token_major(k: object, v: object, length: int "
                            "| None = None) -> KvView"),
                    "Arrays k (tokens, heads, d) and v (tokens, heads, d_v), of "
                    "which the first `length` tokens are filled (None: all).")
            .def_static(
                    "head_major",
                    [](const nb::object& k,
                       const nb::object& v,
                       std::optional<int64_t> length) {
                        return finished(make_view(k, v, 0, 1, 0), length);
                    },
                    "k"_a,
                    "v"_a,
                    "length"_a = nb::none(),
                    nb::sig("def head_major(k: object, v: object, length: int "
                            "| None = None) -> KvView"),
                    "Arrays k (heads, tokens, d) and v (heads, tokens, d_v), of "
                    "which the first `length` tokens are filled (None: all).")
            .def_static(
                    "paged",
                    [](const nb::object& k,
                       const nb::object& v,
                       const nb::object& page_table,
                       std::optional<int64_t> length) {
                        ArrayView view = make_view(k, v, 1, 1, 2);
                        KvView& kv = view.kv;
                        const AnyArray table =
                                array_anywhere(page_table, "page_table");
                        check_together(view, table, "page_table");
                        check_shape(table, "page_table", {-1});
                        FAISS_THROW_IF_NOT_MSG(
                                table.dtype() == nb::dtype<int32_t>() &&
                                        (table.shape(0) < 2 ||
                                         table.stride(0) == 1),
                                "page_table must be contiguous int32: it is "
                                "read where it lies");
                        view.page_table = table;
                        kv.page_table =
                                static_cast<const int32_t*>(table.data());
                        kv.page_size = small_extent(view.k, 1, "page_size");
                        kv.npages = extent(view.k, 0);
                        kv.k_page_stride = view.k.stride(0);
                        kv.v_page_stride = view.v.stride(0);
                        view.capacity = extent(table, 0) * kv.page_size;
                        return finished(std::move(view), length);
                    },
                    "k"_a,
                    "v"_a,
                    "page_table"_a,
                    "length"_a = nb::none(),
                    nb::sig("def paged(k: object, v: object, page_table: "
                            "object, length: int | None = None) -> KvView"),
                    "Arrays k (pages, page_size, heads, d) and v (pages, "
                    "page_size, heads, d_v); page_table (blocks,) int32, the "
                    "page of each block of page_size tokens.")
            .def_prop_rw(
                    "length",
                    [](const ArrayView& view) { return view.kv.length; },
                    &set_length,
                    "Tokens filled; set it as the cache grows.")
            .def_ro("capacity", &ArrayView::capacity, "Tokens the arrays hold.")
            .def_prop_ro(
                    "heads", [](const ArrayView& view) { return view.kv.heads; })
            .def_prop_ro("d", [](const ArrayView& view) { return view.kv.d; })
            .def_prop_ro(
                    "d_v", [](const ArrayView& view) { return view.kv.d_v; })
            .def_prop_ro(
                    "dtype",
                    [](const ArrayView& view) { return name(view.kv.dtype); })
            .def_ro("device",
                    &ArrayView::device,
                    "The CUDA device that the arrays lie on; -1: main memory.");

    m.def(
            "attend_slots",
            [](const ArrayView& view,
               int kv_head,
               const nb::object& queries,
               const nb::object& slots,
               float scale) {
                const KvView& kv = view.in_main_memory();
                kv.check(); // its length and its page table may have changed
                const AnyArray q = array_of(queries, "queries");
                check_shape(q, "queries", {-1, kv.d});
                const std::vector<int32_t> chosen = integers_of(slots, "slots");
                const FloatRows rows(q, "queries");
                NewArray<float> output({q.shape(0), size_t(kv.d_v)});
                NewArray<float> lse({q.shape(0)});
                {
                    nb::gil_scoped_release release;
                    attend_slots(
                            kv,
                            kv_head,
                            static_cast<int>(q.shape(0)),
                            rows.data(),
                            scale_or_default(scale, kv.d),
                            static_cast<int64_t>(chosen.size()),
                            chosen.data(),
                            output.data(),
                            lse.data());
                }
                return attended(output, lse);
            },
            "kv"_a,
            "kv_head"_a,
            "queries"_a,
            "slots"_a,
            "scale"_a = 0.0f,
            nb::sig("def attend_slots(kv: KvView, kv_head: int, queries: "
                    "object, slots: numpy.typing.ArrayLike, scale: float = 0) -> "
                    "tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]"),
            "Attention of queries (nq, d) of one KV head over slots (n,): "
            "output (nq, d_v) and log-sum-exp (nq,). scale 0: 1 / sqrt(d).");
    m.def(
            "attend_dense",
            [](const ArrayView& view,
               const nb::object& queries,
               int64_t begin,
               std::optional<int64_t> end,
               float scale) {
                const KvView& kv = view.in_main_memory();
                const AnyArray q = array_of(queries, "queries");
                check_shape(q, "queries", {-1, kv.d});
                const FloatRows rows(q, "queries");
                NewArray<float> output({q.shape(0), size_t(kv.d_v)});
                NewArray<float> lse({q.shape(0)});
                {
                    nb::gil_scoped_release release;
                    attend_dense(
                            kv,
                            static_cast<int>(q.shape(0)),
                            rows.data(),
                            scale_or_default(scale, kv.d),
                            begin,
                            end.value_or(kv.length),
                            output.data(),
                            lse.data());
                }
                return attended(output, lse);
            },
            "kv"_a,
            "queries"_a,
            "begin"_a = 0,
            "end"_a = nb::none(),
            "scale"_a = 0.0f,
            nb::sig("def attend_dense(kv: KvView, queries: object, begin: int "
                    "= 0, end: int | None = None, scale: float = 0) -> "
                    "tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]"),
            "Dense attention of one token, queries (heads_q, d), over the slots "
            "begin .. end - 1: output (heads_q, d_v) and log-sum-exp "
            "(heads_q,).");
    m.def(
            "merge_states",
            [](const nb::object& given,
               const nb::object& given_lse,
               const nb::object& given_b,
               const nb::object& given_lse_b) {
                const Floats output = floats_of(given, "output");
                const Floats lse = floats_of(given_lse, "lse");
                const Floats output_b = floats_of(given_b, "output_b");
                const Floats lse_b = floats_of(given_lse_b, "lse_b");
                check_shape(AnyArray(output), "output", {-1, -1});
                const auto n = static_cast<int64_t>(output.shape(0));
                const auto d_v = static_cast<int64_t>(output.shape(1));
                check_shape(AnyArray(lse), "lse", {n});
                check_shape(AnyArray(output_b), "output_b", {n, d_v});
                check_shape(AnyArray(lse_b), "lse_b", {n});
                NewArray<float> o({output.shape(0), output.shape(1)});
                NewArray<float> l({output.shape(0)});
                std::copy(
                        output.data(), output.data() + output.size(), o.data());
                std::copy(lse.data(), lse.data() + n, l.data());
                merge_states(
                        n,
                        static_cast<int>(d_v),
                        o.data(),
                        l.data(),
                        output_b.data(),
                        lse_b.data());
                return attended(o, l);
            },
            "output"_a,
            "lse"_a,
            "output_b"_a,
            "lse_b"_a,
            nb::sig("def merge_states(output: numpy.typing.ArrayLike, lse: numpy.typing.ArrayLike, "
                    "output_b: numpy.typing.ArrayLike, lse_b: numpy.typing.ArrayLike) -> "
                    "tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]"),
            "The exact union of attention over disjoint sets of keys: outputs "
            "(n, d_v) and log-sum-exps (n,).");
}

} // namespace faiss_saap::python
