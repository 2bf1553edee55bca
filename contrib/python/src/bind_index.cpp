/// IndexAsymmetricIVF with the manners of Faiss's Python package.
#include <memory>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <faiss/impl/AuxIndexStructures.h>
#include <faiss/impl/IDSelector.h>

#include <faiss_saap/AsymmetricParameterSpace.h>
#include <faiss_saap/IndexAsymmetricIVF.h>
#include <faiss_saap/index_factory.h>
#include <faiss_saap/index_io.h>

#include "arrays.h"
#include "bind.h"

using namespace nanobind::literals;

namespace faiss_saap::python {

namespace {

/// Parameters of one search that keep what the search did.
struct SearchParameters : SearchParametersAsymmetricIVF {
    SearchStats done;

    SearchParameters(size_t probe, size_t codes) {
        nprobe = probe;
        max_codes = codes;
        stats = &done;
    }
    SearchParameters(const SearchParameters&) = delete;
};

idx_t rows(const IndexAsymmetricIVF& index, const Floats& x, const char* name) {
    check_shape(AnyArray(x), name, {-1, index.d});
    return static_cast<idx_t>(x.shape(0));
}

std::unique_ptr<IndexAsymmetricIVF> make_index(
        int d,
        const std::string& description,
        int metric,
        const Partition* partition) {
    auto index = index_factory(
            d, description, static_cast<faiss::MetricType>(metric));
    if (!partition) {
        return index;
    }
    return std::make_unique<IndexAsymmetricIVF>(
            std::move(index->lists), *partition);
}

} // namespace

void bind_index(nb::module_& m) {
    nb::class_<SearchStats>(m, "SearchStats", "What one search did.")
            .def_ro("queries", &SearchStats::queries)
            .def_ro("cells_probed", &SearchStats::cells_probed)
            .def_ro("vectors_read", &SearchStats::vectors_read);

    nb::class_<SearchParameters>(
            m,
            "SearchParameters",
            "Parameters of one search in place of the index's; not to be shared "
            "by searches that run at once.")
            .def(nb::init<size_t, size_t>(), "nprobe"_a = 1, "max_codes"_a = 0)
            .def_rw("nprobe", &SearchParameters::nprobe)
            .def_rw("max_codes", &SearchParameters::max_codes)
            .def_ro("stats",
                    &SearchParameters::done,
                    "What the last search with these did.");

    nb::class_<IndexAsymmetricIVF> index(
            m,
            "IndexAsymmetricIVF",
            "An inverted-file index with distinct assigners for keys and "
            "queries. Vectors are (n, d); what is not float32 is converted.");
    index.def(nb::new_([](int d,
                          const std::string& description,
                          int metric,
                          const Partition* partition) {
                  return make_index(d, description, metric, partition);
              }),
              "d"_a,
              "description"_a,
              "metric"_a = int(faiss::METRIC_L2),
              "partition"_a = nb::none(),
              "description: '[Sph|Sym]AIVF<ncell>,<storage>', storage Flat, "
              "SQfp16, SQ8 or PQ<m>[x<bits>]; partition: cells that are given, "
              "None where `train` is to learn them.")
            .def_prop_ro("d", [](IndexAsymmetricIVF& x) { return x.d; })
            .def_prop_ro("ntotal", [](IndexAsymmetricIVF& x) { return x.ntotal; })
            .def_prop_ro(
                    "is_trained",
                    [](IndexAsymmetricIVF& x) { return x.is_trained; })
            .def_prop_ro(
                    "metric_type",
                    [](IndexAsymmetricIVF& x) { return int(x.metric_type); })
            .def_ro("ncell", &IndexAsymmetricIVF::ncell)
            .def_rw("nprobe", &IndexAsymmetricIVF::nprobe, "Cells to probe.")
            .def_rw("max_codes",
                    &IndexAsymmetricIVF::max_codes,
                    "Stop after this many vectors; 0: no limit.")
            .def_prop_rw(
                    "verbose",
                    [](IndexAsymmetricIVF& x) { return x.verbose; },
                    [](IndexAsymmetricIVF& x, bool v) { x.verbose = v; })
            .def_prop_ro(
                    "partition",
                    [](const IndexAsymmetricIVF& x) -> std::optional<Partition> {
                        if (!x.partition.key) {
                            return std::nullopt;
                        }
                        return x.partition;
                    },
                    "None until trained.")
            .def(
                    "set_query_assigner",
                    [](IndexAsymmetricIVF& x,
                       std::shared_ptr<CellAssigner> query) {
                        const Partition before = x.partition;
                        x.partition.query = std::move(query);
                        try {
                            x.check_partition();
                        } catch (...) {
                            x.partition = before;
                            throw;
                        }
                    },
                    "query"_a,
                    "Sends queries by another assigner over the same cells.")
            .def(
                    "train",
                    [](IndexAsymmetricIVF& i, const nb::object& given) {
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        nb::gil_scoped_release release;
                        i.train(n, x.data());
                    },
                    "x"_a,
                    nb::sig("def train(self, x: numpy.typing.ArrayLike) -> None"),
                    "Learns cells (unless they are given) and codec from x "
                    "(n, d), n >= ncell.")
            .def(
                    "train_with_queries",
                    [](IndexAsymmetricIVF& i,
                       const nb::object& given,
                       const nb::object& given_q) {
                        const Floats x = floats_of(given, "x"), xq = floats_of(given_q, "xq");
                        const idx_t n = rows(i, x, "x"), nq = rows(i, xq, "xq");
                        nb::gil_scoped_release release;
                        i.train_with_queries(n, x.data(), nq, xq.data());
                    },
                    "x"_a,
                    "xq"_a,
                    nb::sig("def train_with_queries(self, x: numpy.typing.ArrayLike, xq: "
                            "numpy.typing.ArrayLike) -> None"),
                    "As train, then chooses how queries are assigned by what "
                    "the queries xq (nq, d) prefer.")
            .def(
                    "add",
                    [](IndexAsymmetricIVF& i, const nb::object& given) {
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        nb::gil_scoped_release release;
                        i.add(n, x.data());
                    },
                    "x"_a,
                    nb::sig("def add(self, x: numpy.typing.ArrayLike) -> None"),
                    "Adds x (n, d) with ids ntotal .. ntotal + n - 1.")
            .def(
                    "add_with_ids",
                    [](IndexAsymmetricIVF& i,
                       const nb::object& given,
                       const nb::object& given_ids) {
                        const Longs ids = longs_of(given_ids, "ids");
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        check_shape(AnyArray(ids), "ids", {n});
                        nb::gil_scoped_release release;
                        i.add_with_ids(n, x.data(), ids.data());
                    },
                    "x"_a,
                    "ids"_a,
                    nb::sig("def add_with_ids(self, x: numpy.typing.ArrayLike, ids: "
                            "numpy.typing.ArrayLike) -> None"),
                    "Adds x (n, d) under ids (n,), not negative.")
            .def(
                    "search",
                    [](const IndexAsymmetricIVF& i,
                       const nb::object& given,
                       idx_t k,
                       const SearchParameters* params) {
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        FAISS_THROW_IF_NOT_FMT(
                                k > 0,
                                "k = %lld, must be positive",
                                static_cast<long long>(k));
                        NewArray<float> distances({size_t(n), size_t(k)});
                        NewArray<int64_t> labels({size_t(n), size_t(k)});
                        {
                            nb::gil_scoped_release release;
                            i.search(
                                    n,
                                    x.data(),
                                    k,
                                    distances.data(),
                                    labels.data(),
                                    params);
                        }
                        return nb::make_tuple(
                                distances.object(), labels.object());
                    },
                    "x"_a,
                    "k"_a,
                    "params"_a = nb::none(),
                    nb::sig("def search(self, x: numpy.typing.ArrayLike, k: int, params: "
                            "SearchParameters | None = None) -> "
                            "tuple[numpy.typing.NDArray[numpy.float32], "
                            "numpy.typing.NDArray[numpy.int64]]"),
                    "The k nearest vectors of the probed cells: distances "
                    "(n, k) float32, best first, and ids (n, k) int64, -1 where "
                    "there are fewer.")
            .def(
                    "range_search",
                    [](const IndexAsymmetricIVF& i,
                       const nb::object& given,
                       float radius,
                       const SearchParameters* params) {
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        faiss::RangeSearchResult r(n);
                        {
                            nb::gil_scoped_release release;
                            i.range_search(n, x.data(), radius, &r, params);
                        }
                        NewArray<int64_t> limits({size_t(n) + 1});
                        std::copy(r.lims, r.lims + n + 1, limits.data());
                        const size_t found = r.lims[n];
                        return nb::make_tuple(
                                limits.object(),
                                copy_to_numpy(r.distances, {found}),
                                copy_to_numpy<int64_t>(r.labels, {found}));
                    },
                    "x"_a,
                    "radius"_a,
                    "params"_a = nb::none(),
                    nb::sig("def range_search(self, x: numpy.typing.ArrayLike, radius: "
                            "float, params: SearchParameters | None = None) -> "
                            "tuple[numpy.typing.NDArray[numpy.int64], "
                            "numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.int64]]"),
                    "All vectors of the probed cells closer than radius (or "
                    "with a larger inner product): limits (n + 1,), distances "
                    "and ids (limits[n],); those of query q lie at limits[q] .. "
                    "limits[q + 1] - 1.")
            .def(
                    "assign_queries",
                    [](const IndexAsymmetricIVF& i,
                       const nb::object& given,
                       size_t nprobe) {
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        FAISS_THROW_IF_NOT_FMT(
                                nprobe >= 1 && nprobe <= size_t(i.ncell),
                                "nprobe = %zd, must be 1 to ncell = %d",
                                nprobe,
                                i.ncell);
                        NewArray<int64_t> cells({size_t(n), nprobe});
                        {
                            nb::gil_scoped_release release;
                            i.assign_queries(n, x.data(), nprobe, cells.data());
                        }
                        return cells.object();
                    },
                    "x"_a,
                    "nprobe"_a,
                    nb::sig("def assign_queries(self, x: numpy.typing.ArrayLike, nprobe: "
                            "int) -> numpy.typing.NDArray[numpy.int64]"),
                    "Cells of each query, best first, (n, nprobe).")
            .def(
                    "search_preassigned",
                    [](const IndexAsymmetricIVF& i,
                       const nb::object& given,
                       idx_t k,
                       const nb::object& given_cells,
                       const SearchParameters* params) {
                        const Longs cells = longs_of(given_cells, "cells");
                        const Floats x = floats_of(given, "x");
                        const idx_t n = rows(i, x, "x");
                        check_shape(AnyArray(cells), "cells", {n, -1});
                        FAISS_THROW_IF_NOT_FMT(
                                k > 0,
                                "k = %lld, must be positive",
                                static_cast<long long>(k));
                        NewArray<float> distances({size_t(n), size_t(k)});
                        NewArray<int64_t> labels({size_t(n), size_t(k)});
                        {
                            nb::gil_scoped_release release;
                            i.search_preassigned(
                                    n,
                                    x.data(),
                                    k,
                                    cells.shape(1),
                                    cells.data(),
                                    distances.data(),
                                    labels.data(),
                                    params);
                        }
                        return nb::make_tuple(
                                distances.object(), labels.object());
                    },
                    "x"_a,
                    "k"_a,
                    "cells"_a,
                    "params"_a = nb::none(),
                    nb::sig("def search_preassigned(self, x: numpy.typing.ArrayLike, k: "
                            "int, cells: numpy.typing.ArrayLike, params: SearchParameters | "
                            "None = None) -> tuple[numpy.typing.NDArray[numpy.float32], "
                            "numpy.typing.NDArray[numpy.int64]]"),
                    "search in given cells (n, nprobe), -1: none.")
            .def(
                    "remove_ids",
                    [](IndexAsymmetricIVF& i, const nb::object& given) {
                        const Longs ids = longs_of(given, "ids");
                        check_shape(AnyArray(ids), "ids", {-1});
                        const faiss::IDSelectorBatch selector(
                                ids.shape(0), ids.data());
                        nb::gil_scoped_release release;
                        return i.remove_ids(selector);
                    },
                    "ids"_a,
                    nb::sig("def remove_ids(self, ids: numpy.typing.ArrayLike) -> int"),
                    "Removes the vectors with these ids (n,); how many there "
                    "were.")
            .def("set_direct_map",
                 &IndexAsymmetricIVF::set_direct_map,
                 "on"_a,
                 "Turns the map from ids to vectors, which reconstruct needs, "
                 "on or off.")
            .def(
                    "reconstruct",
                    [](const IndexAsymmetricIVF& i, idx_t key) {
                        NewArray<float> x({size_t(i.d)});
                        i.reconstruct(key, x.data());
                        return x.object();
                    },
                    "key"_a,
                    nb::sig("def reconstruct(self, key: int) -> "
                            "numpy.typing.NDArray[numpy.float32]"),
                    "The vector (d,) with this id, as it is stored.")
            .def(
                    "reconstruct_n",
                    [](const IndexAsymmetricIVF& i, idx_t first, idx_t n) {
                        FAISS_THROW_IF_NOT_FMT(
                                n >= 0,
                                "n = %lld, must not be negative",
                                static_cast<long long>(n));
                        NewArray<float> x({size_t(n), size_t(i.d)});
                        {
                            nb::gil_scoped_release release;
                            i.reconstruct_n(first, n, x.data());
                        }
                        return x.object();
                    },
                    "first"_a,
                    "n"_a,
                    nb::sig("def reconstruct_n(self, first: int, n: int) -> "
                            "numpy.typing.NDArray[numpy.float32]"),
                    "Vectors (n, d) with ids first .. first + n - 1.")
            .def(
                    "merge_from",
                    [](IndexAsymmetricIVF& i,
                       IndexAsymmetricIVF& other,
                       idx_t add_id) { i.merge_from(other, add_id); },
                    "other"_a,
                    "add_id"_a = 0,
                    "Moves all vectors of another index with the same cells and "
                    "codec here.")
            .def(
                    "set_parameters",
                    [](IndexAsymmetricIVF& i, const std::string& text) {
                        AsymmetricParameterSpace().set_index_parameters(
                                &i, text.c_str());
                    },
                    "text"_a,
                    "Parameters by name: 'nprobe=32,max_codes=4096'.")
            .def("reset",
                 &IndexAsymmetricIVF::reset,
                 "Removes all vectors; stays trained.");

    m.def("index_factory",
          &make_index,
          "d"_a,
          "description"_a,
          "metric"_a = int(faiss::METRIC_L2),
          "partition"_a = nb::none(),
          "The constructor of IndexAsymmetricIVF under the name that Faiss's "
          "users look for.");
    m.def(
            "write_index",
            [](const IndexAsymmetricIVF& i, const std::filesystem::path& path) {
                nb::gil_scoped_release release;
                write_index(i, path.string());
            },
            "index"_a,
            "path"_a,
            "Writes assigners, codec and lists, whole or not at all.");
    m.def(
            "read_index",
            [](const std::filesystem::path& path) {
                nb::gil_scoped_release release;
                return read_index(path.string());
            },
            "path"_a);
    m.def(
            "serialize_index",
            [](const IndexAsymmetricIVF& i) {
                const auto bytes = write_index_to_memory(i);
                return copy_to_numpy(bytes.data(), {bytes.size()});
            },
            "index"_a,
            nb::sig("def serialize_index(index: IndexAsymmetricIVF) -> "
                    "numpy.typing.NDArray[numpy.uint8]"),
            "The bytes that write_index would write.");
    m.def(
            "deserialize_index",
            [](const nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>&
                       data) {
                check_shape(AnyArray(data), "data", {-1});
                return read_index_from_memory(data.data(), data.size());
            },
            "data"_a,
            nb::sig("def deserialize_index(data: numpy.typing.ArrayLike) -> "
                    "IndexAsymmetricIVF"));
}

} // namespace faiss_saap::python
