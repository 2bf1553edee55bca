#include <faiss_saap/gpu/GpuIndexAsymmetricIVF.h>

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cstring>
#include <typeinfo>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexScalarQuantizer.h>

#include <faiss_saap/dtype.h>
#include <faiss_saap/exactly.h>
#include <faiss_saap/gpu/select_k.h>

#include "CellScorer.h"
#include "DeviceBuffer.h"
#include "PagedLists.h"
#include "StreamBuffer.h"
#include "check_vectors.h"
#include "learn_partitions.h"
#include "lower.h"
#include "scan_cells.h"

namespace faiss_saap::gpu {

namespace {

/// Blocks per multiprocessor that keep a device busy.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kMaxSplits = 64;
constexpr int kMaxIndexCells = 65536;

/// Temporary memory stays with the index from call to call, instead of going
/// back to the driver at every synchronisation.
class MemoryPool {
   public:
    explicit MemoryPool(int device) {
        cudaMemPoolProps props;
        std::memset(&props, 0, sizeof(props));
        props.allocType = cudaMemAllocationTypePinned;
        props.location.type = cudaMemLocationTypeDevice;
        props.location.id = device;
        FAISS_SAAP_CUDA_CHECK(cudaMemPoolCreate(&pool_, &props));
        uint64_t keep = UINT64_MAX;
        const cudaError_t error = cudaMemPoolSetAttribute(
                pool_, cudaMemPoolAttrReleaseThreshold, &keep);
        if (error != cudaSuccess) {
            cudaMemPoolDestroy(pool_);
        }
        FAISS_SAAP_CUDA_CHECK(error);
    }
    MemoryPool(const MemoryPool&) = delete;
    ~MemoryPool() {
        cudaMemPoolDestroy(pool_);
    }
    cudaMemPool_t get() const {
        return pool_;
    }
    uint64_t reserved() const {
        uint64_t bytes = 0;
        FAISS_SAAP_CUDA_CHECK(cudaMemPoolGetAttribute(
                pool_, cudaMemPoolAttrReservedMemCurrent, &bytes));
        return bytes;
    }

   private:
    cudaMemPool_t pool_ = nullptr;
};

/// Whether kernels on this device may read p.
bool on_device(const void* p, int device, const char* name) {
    cudaPointerAttributes attributes;
    FAISS_SAAP_CUDA_CHECK(cudaPointerGetAttributes(&attributes, p));
    FAISS_THROW_IF_NOT_FMT(
            attributes.type != cudaMemoryTypeDevice ||
                    attributes.device == device,
            "%s is memory of device %d, the index is on device %d",
            name,
            attributes.device,
            device);
    return attributes.type == cudaMemoryTypeDevice ||
            attributes.type == cudaMemoryTypeManaged;
}

/// An array of the caller as device memory: itself, or a copy.
template <class T>
class Input {
   public:
    Input(const T* p, size_t size, bool device, const StreamMemory& memory)
            : data_(p) {
        if (!device && p) {
            copy_ = StreamBuffer<T>(memory, size);
            copy_async(copy_.get(), p, size, memory.stream);
            data_ = copy_.get();
        }
    }
    const T* get() const {
        return data_;
    }

   private:
    const T* data_;
    StreamBuffer<T> copy_;
};

void check_partition(const Partition& p, int d, int ncell) {
    p.check();
    FAISS_THROW_IF_NOT_FMT(
            p.d() == d, "partition has d = %d, the index has d = %d", p.d(), d);
    FAISS_THROW_IF_NOT_FMT(
            p.ncell() == ncell,
            "partition has %d cells, the index has %d",
            p.ncell(),
            ncell);
    const unsigned spaces = NEEDS_PRE_ROPE | NEEDS_POST_ROPE;
    FAISS_THROW_IF_NOT_MSG(
            (p.key->needs & spaces) == (p.query->needs & spaces),
            "partition's assigners read pre- and post-RoPE vectors, an index "
            "holds one kind");
}

void check_sizes(idx_t n, const void* x, const char* name) {
    FAISS_THROW_IF_NOT_FMT(n >= 0, "n = %" PRId64 " must not be negative", n);
    FAISS_THROW_IF_NOT_FMT(n == 0 || x, "%s is null but n = %" PRId64, name, n);
}

/// Whether vectors are float16, of the storages that there are.
bool is_float16(const faiss::IndexIVF& lists) {
    if (exactly<faiss::IndexIVFFlat>(lists)) {
        return false;
    }
    const auto* sq = exactly<faiss::IndexIVFScalarQuantizer>(lists);
    FAISS_THROW_IF_NOT_FMT(
            sq && sq->sq.qtype == faiss::ScalarQuantizer::QT_fp16,
            "index->lists is a %s: on the GPU storage must be "
            "faiss::IndexIVFFlat or an IndexIVFScalarQuantizer of QT_fp16",
            typeid(lists).name());
    return true;
}

} // namespace

SearchPlan plan_search(
        int64_t n,
        int d,
        int ncell,
        int nprobe,
        int k,
        int multiprocessors,
        size_t temporary_bytes) {
    SearchPlan plan;
    const int64_t blocks = int64_t(kBlocksPerMultiprocessor) * multiprocessors;
    plan.splits = static_cast<int>(std::clamp<int64_t>(
            (blocks + n - 1) / n, 1, std::min(nprobe, kMaxSplits)));
    const size_t bytes = sizeof(float) * (size_t(ncell) + d) +
            sizeof(int32_t) * nprobe +
            (sizeof(uint64_t) * plan.splits + sizeof(float) + sizeof(idx_t)) * k;
    plan.queries = std::clamp<int64_t>(
            static_cast<int64_t>(temporary_bytes / bytes),
            1,
            std::min<int64_t>(n, INT_MAX / plan.splits));
    return plan;
}

struct GpuIndexAsymmetricIVF::Impl {
    int d, ncell;
    GpuIndexParams params;
    int multiprocessors = 0;
    Partition partition;
    MemoryPool pool;
    StreamMemory memory;
    std::unique_ptr<PagedLists> lists;
    std::unique_ptr<CellScorer> key, query;

    Impl(int d_in, int ncell_in, const GpuIndexParams& p)
            : d(d_in), ncell(ncell_in), params(p), pool(p.device) {
        memory.pool = pool.get();
        memory.stream = p.stream;
        FAISS_SAAP_CUDA_CHECK(cudaDeviceGetAttribute(
                &multiprocessors, cudaDevAttrMultiProcessorCount, p.device));
        lists = std::make_unique<PagedLists>(
                d, ncell, p.float16, p.slab_bytes, memory);
    }
    ~Impl() {
        // Outside of every call: the device may not be the current one.
        int before = 0;
        cudaGetDevice(&before);
        cudaSetDevice(params.device);
        lists.reset();
        key.reset();
        query.reset();
        cudaStreamSynchronize(memory.stream);
        cudaSetDevice(before);
    }

    void lower(const Partition& p) {
        check_partition(p, d, ncell);
        const LoweredPartition lowered =
                gpu::lower(p, /*kv_head=*/0, /*group=*/1, memory.stream, kMaxIndexCells);
        auto new_key = std::make_unique<CellScorer>(lowered.key, memory);
        auto new_query = std::make_unique<CellScorer>(lowered.query, memory);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
        partition = p;
        key = std::move(new_key);
        query = std::move(new_query);
    }

    /// Vectors at a time, of so many floats each.
    int64_t part(int64_t n, size_t floats) const {
        return std::clamp<int64_t>(
                static_cast<int64_t>(params.temporary_bytes / (4 * floats)),
                1,
                std::max<int64_t>(std::min<int64_t>(n, 1 << 24), 1));
    }

    void add(int64_t n, const float* x, const idx_t* xids, int64_t first_id) {
        const bool x_on_device = on_device(x, params.device, "x");
        const Input<idx_t> ids(
                xids, n, xids && on_device(xids, params.device, "xids"), memory);
        if (xids) {
            check_ids(ids.get(), n, memory);
        }
        const StreamBuffer<int32_t> cells(memory, n);
        const StreamBuffer<uint32_t> locations(memory, n);
        const int64_t step = part(n, d);
        // Memory for one part, taken before anything changes.
        StreamBuffer<float> buffer;
        if (!x_on_device) {
            buffer = StreamBuffer<float>(memory, step * d);
        }
        const auto for_parts = [&](const auto& fn) {
            for (int64_t i = 0; i < n; i += step) {
                const int64_t m = std::min(step, n - i);
                const float* from = x + i * d;
                if (!x_on_device) {
                    copy_async(buffer.get(), from, m * d, memory.stream);
                    from = buffer.get();
                }
                fn(i, m, from);
            }
        };
        for_parts([&](int64_t i, int64_t m, const float* from) {
            check_finite(
                    from, m, d, i, "x", memory, params.float16 ? kLargestFloat16 : INFINITY);
            key->assign(m, from, cells.get() + i);
        });
        lists->place(n, cells.get(), locations.get());
        for_parts([&](int64_t i, int64_t m, const float* from) {
            lists->write(
                    m,
                    from,
                    xids ? ids.get() + i : nullptr,
                    first_id + i,
                    locations.get() + i);
        });
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    }
};

GpuIndexAsymmetricIVF::GpuIndexAsymmetricIVF(
        int d_in,
        int ncell_in,
        faiss::MetricType metric,
        const GpuIndexParams& params)
        : Index(d_in, metric), ncell(ncell_in) {
    FAISS_THROW_IF_NOT_FMT(
            d_in >= 1 && d_in <= kMaxScanD,
            "d = %d must be between 1 and %d",
            d_in,
            kMaxScanD);
    FAISS_THROW_IF_NOT_FMT(
            ncell >= 1 && ncell <= kMaxIndexCells,
            "ncell = %d must be between 1 and %d",
            ncell,
            kMaxIndexCells);
    FAISS_THROW_IF_NOT_FMT(
            metric == faiss::METRIC_L2 || metric == faiss::METRIC_INNER_PRODUCT,
            "metric = %d must be METRIC_L2 or METRIC_INNER_PRODUCT",
            static_cast<int>(metric));
    require_device(params.device);
    const DeviceScope scope(params.device);
    impl_ = std::make_unique<Impl>(d_in, ncell, params);
    is_trained = false;
}

GpuIndexAsymmetricIVF::GpuIndexAsymmetricIVF(
        const Partition& p,
        faiss::MetricType metric,
        const GpuIndexParams& params)
        : GpuIndexAsymmetricIVF((p.check(), p.d()), p.ncell(), metric, params) {
    const DeviceScope scope(params.device);
    impl_->lower(p);
    is_trained = true;
}

GpuIndexAsymmetricIVF::GpuIndexAsymmetricIVF(
        const IndexAsymmetricIVF& index,
        const GpuIndexParams& params)
        : GpuIndexAsymmetricIVF(
                  static_cast<int>(index.d),
                  index.ncell,
                  index.metric_type,
                  params) {
    copyFrom(index);
}

GpuIndexAsymmetricIVF::~GpuIndexAsymmetricIVF() = default;

void GpuIndexAsymmetricIVF::copyFrom(const IndexAsymmetricIVF& index) {
    FAISS_THROW_IF_NOT_MSG(index.is_trained, "the index is not trained");
    index.check_partition();
    FAISS_THROW_IF_NOT_FMT(
            index.d <= kMaxScanD,
            "index.d = %d must be at most %d",
            static_cast<int>(index.d),
            kMaxScanD);
    const int dim = static_cast<int>(index.d);
    GpuIndexParams params = impl_->params;
    params.float16 = is_float16(*index.lists);
    const DeviceScope scope(params.device);
    auto fresh = std::make_unique<Impl>(dim, index.ncell, params);
    fresh->lower(index.partition);
    const StreamMemory& memory = fresh->memory;
    const auto& from = *index.lists->invlists;
    const int64_t step = fresh->part(index.ntotal, dim);
    const StreamBuffer<float> x(memory, step * dim);
    const StreamBuffer<int32_t> cells(memory, step);
    const StreamBuffer<int64_t> ids(memory, step);
    const StreamBuffer<uint32_t> locations(memory, step);
    // Many cells at a time: each part costs some launches.
    std::vector<float> host_x;
    std::vector<int32_t> host_cells;
    std::vector<int64_t> host_ids;
    const auto flush = [&] {
        const auto m = static_cast<int64_t>(host_ids.size());
        copy_async(x.get(), host_x.data(), host_x.size(), memory.stream);
        copy_async(cells.get(), host_cells.data(), m, memory.stream);
        copy_async(ids.get(), host_ids.data(), m, memory.stream);
        fresh->lists->place(m, cells.get(), locations.get());
        fresh->lists->write(m, x.get(), ids.get(), 0, locations.get());
        host_x.clear(), host_cells.clear(), host_ids.clear();
    };
    for (int c = 0; c < index.ncell; c++) {
        const auto size = static_cast<int64_t>(from.list_size(c));
        faiss::InvertedLists::ScopedCodes codes(&from, c);
        faiss::InvertedLists::ScopedIds list_ids(&from, c);
        for (int64_t i = 0; i < size;) {
            const auto held = static_cast<int64_t>(host_ids.size());
            const int64_t m = std::min(step - held, size - i);
            host_x.resize((held + m) * dim);
            to_float(
                    params.float16 ? DType::float16 : DType::float32,
                    codes.get() + i * from.code_size,
                    m * dim,
                    host_x.data() + held * dim);
            host_ids.insert(
                    host_ids.end(), list_ids.get() + i, list_ids.get() + i + m);
            host_cells.resize(held + m, c);
            if (held + m == step) {
                flush();
            }
            i += m;
        }
    }
    flush();
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    impl_ = std::move(fresh);
    d = index.d;
    metric_type = index.metric_type;
    ntotal = index.ntotal;
    ncell = index.ncell;
    nprobe = index.nprobe;
    training = index.training;
    is_trained = true;
}

void GpuIndexAsymmetricIVF::copyTo(IndexAsymmetricIVF* index) const {
    FAISS_THROW_IF_NOT_MSG(index, "index is null");
    FAISS_THROW_IF_NOT_MSG(is_trained, "the index is not trained");
    const DeviceScope scope(impl_->params.device);
    auto quantizer = std::make_unique<faiss::IndexFlat>(d, metric_type);
    std::unique_ptr<faiss::IndexIVF> lists;
    if (impl_->params.float16) {
        lists = std::make_unique<faiss::IndexIVFScalarQuantizer>(
                quantizer.get(),
                d,
                ncell,
                faiss::ScalarQuantizer::QT_fp16,
                metric_type,
                /*by_residual=*/false);
    } else {
        lists = std::make_unique<faiss::IndexIVFFlat>(
                quantizer.get(), d, ncell, metric_type);
    }
    lists->quantizer = quantizer.release();
    lists->own_fields = true;

    // Several cells at a time, of about the size of temporary memory.
    const std::vector<int32_t> sizes = list_sizes();
    const size_t code_size = lists->code_size;
    const int64_t step = impl_->part(INT64_MAX, d);
    std::vector<uint8_t> codes;
    std::vector<int64_t> ids;
    for (int first = 0; first < ncell;) {
        std::vector<int64_t> begin;
        int64_t size = 0;
        int last = first;
        while (last < ncell && (last == first || size + sizes[last] <= step)) {
            begin.push_back(size);
            size += sizes[last++];
        }
        codes.resize(size * code_size);
        ids.resize(size);
        impl_->lists->read(first, last, begin, size, codes.data(), ids.data());
        for (int c = first; c < last; c++) {
            const int64_t at = begin[c - first];
            lists->invlists->add_entries(
                    c,
                    sizes[c],
                    reinterpret_cast<const idx_t*>(ids.data() + at),
                    codes.data() + at * code_size);
        }
        first = last;
    }
    lists->ntotal = ntotal;
    lists->is_trained = true;
    IndexAsymmetricIVF copy(std::move(lists), impl_->partition);
    copy.nprobe = nprobe;
    copy.training = training;
    *index = std::move(copy);
}

void GpuIndexAsymmetricIVF::train(idx_t n, const float* x) {
    check_sizes(n, x, "x");
    if (is_trained) {
        return;
    }
    FAISS_THROW_IF_NOT_FMT(
            n >= ncell && n <= INT_MAX,
            "n = %" PRId64 " vectors must be between the ncell = %d cells they "
            "should make and 2147483647",
            n,
            ncell);
    const KMeansParams& wanted = training.kmeans;
    FAISS_THROW_IF_NOT_FMT(
            wanted.niter >= 1,
            "training.kmeans.niter = %d must be at least 1",
            wanted.niter);
    const DeviceScope scope(impl_->params.device);
    const StreamMemory& memory = impl_->memory;
    const int dim = static_cast<int>(d);
    const Input<float> vectors(
            x, n * dim, on_device(x, impl_->params.device, "x"), memory);
    check_finite(vectors.get(), n, dim, 0, "x", memory);
    Partition partition = learn_partitions(
            vectors.get(),
            /*nhead=*/1,
            n,
            dim,
            ncell,
            NEEDS_POST_ROPE,
            wanted,
            metric_type,
            memory)[0];
    if (!training.asymmetric) {
        partition = symmetric(partition);
    }
    impl_->lower(partition);
    is_trained = true;
}

const Partition& GpuIndexAsymmetricIVF::partition() const {
    return impl_->partition;
}

void GpuIndexAsymmetricIVF::set_query_assigner(
        std::shared_ptr<const CellAssigner> query) {
    FAISS_THROW_IF_NOT_MSG(is_trained, "the index is not trained");
    Partition p = impl_->partition;
    p.query = std::move(query);
    const DeviceScope scope(impl_->params.device);
    impl_->lower(p);
}

void GpuIndexAsymmetricIVF::add(idx_t n, const float* x) {
    add_with_ids(n, x, nullptr);
}

void GpuIndexAsymmetricIVF::add_with_ids(
        idx_t n,
        const float* x,
        const idx_t* xids) {
    FAISS_THROW_IF_NOT_MSG(is_trained, "the index is not trained");
    check_sizes(n, x, "x");
    FAISS_THROW_IF_NOT_FMT(
            n <= INT_MAX - ntotal,
            "ntotal + n = %" PRId64 " + %" PRId64 " must be below 2^31",
            ntotal,
            n);
    if (n == 0) {
        return;
    }
    const DeviceScope scope(impl_->params.device);
    impl_->add(n, x, xids, ntotal);
    ntotal += n;
}

void GpuIndexAsymmetricIVF::search(
        idx_t n,
        const float* x,
        idx_t k,
        float* distances,
        idx_t* labels,
        const faiss::SearchParameters* given) const {
    size_t wanted = nprobe;
    SearchStats* stats = nullptr;
    if (given) {
        const auto* ivf = dynamic_cast<const faiss::SearchParametersIVF*>(given);
        FAISS_THROW_IF_NOT_FMT(
                ivf || typeid(*given) == typeid(faiss::SearchParameters),
                "params of type %s are not for this index: use "
                "SearchParametersAsymmetricIVF",
                typeid(*given).name());
        FAISS_THROW_IF_NOT_MSG(
                !given->sel,
                "params->sel is set, but the GPU searches all vectors");
        if (ivf) {
            FAISS_THROW_IF_NOT_MSG(
                    !ivf->quantizer_params,
                    "params->quantizer_params is set, but assigners take no "
                    "parameters");
            FAISS_THROW_IF_NOT_FMT(
                    ivf->max_codes == 0,
                    "params->max_codes = %zd must be 0 on the GPU",
                    ivf->max_codes);
            wanted = ivf->nprobe;
        }
        if (const auto* own =
                    dynamic_cast<const SearchParametersAsymmetricIVF*>(given)) {
            stats = own->stats;
        }
    }
    // A negative number that was put into a size_t is meant as one.
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(wanted) >= 1,
            "nprobe = %" PRId64 " must be at least 1",
            static_cast<int64_t>(wanted));
    const int probes =
            static_cast<int>(std::min(wanted, static_cast<size_t>(ncell)));
    FAISS_THROW_IF_NOT_FMT(
            probes <= kMaxSelectK || probes == ncell,
            "nprobe = %d must be at most %d or all ncell = %d cells",
            probes,
            kMaxSelectK,
            ncell);
    FAISS_THROW_IF_NOT_MSG(is_trained, "the index is not trained");
    check_sizes(n, x, "x");
    FAISS_THROW_IF_NOT_FMT(
            k >= 1 && k <= kMaxSelectK,
            "k = %" PRId64 " must be between 1 and %d",
            k,
            kMaxSelectK);
    FAISS_THROW_IF_NOT_MSG(n == 0 || distances, "distances is null");
    FAISS_THROW_IF_NOT_MSG(n == 0 || labels, "labels is null");
    if (n == 0) {
        if (stats) {
            *stats = SearchStats();
        }
        return;
    }

    const int device = impl_->params.device;
    const DeviceScope scope(device);
    const StreamMemory& memory = impl_->memory;
    const int dim = static_cast<int>(d);
    const bool x_on_device = on_device(x, device, "x");
    const bool distances_on_device = on_device(distances, device, "distances");
    const bool labels_on_device = on_device(labels, device, "labels");
    const SearchPlan plan = plan_search(
            n,
            dim + impl_->query->temporary_floats(),
            ncell,
            probes,
            static_cast<int>(k),
            impl_->multiprocessors,
            impl_->params.temporary_bytes);
    const bool all = probes == ncell;

    const StreamBuffer<float> scores(memory, all ? 0 : plan.queries * ncell);
    const StreamBuffer<int32_t> cells(memory, all ? 0 : plan.queries * probes);
    const StreamBuffer<uint64_t> keys(memory, plan.queries * plan.splits * k);
    const StreamBuffer<float> own_distances(
            memory, distances_on_device ? 0 : plan.queries * k);
    const StreamBuffer<idx_t> own_labels(
            memory, labels_on_device ? 0 : plan.queries * k);
    const StreamBuffer<unsigned long long> counters(memory, 2);
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(
            counters.get(), 0, 2 * sizeof(*counters.get()), memory.stream));

    for (idx_t i = 0; i < n; i += plan.queries) {
        const int64_t m = std::min<int64_t>(plan.queries, n - i);
        const Input<float> queries(x + i * dim, m * dim, x_on_device, memory);
        check_finite(queries.get(), m, dim, i, "x", memory);
        if (!all) {
            impl_->query->scores(m, queries.get(), scores.get());
            SelectKParams s;
            s.rows = m, s.len = ncell, s.k = probes;
            s.scores = scores.get(), s.scores_row_stride = ncell;
            s.ids = cells.get();
            select_k(s, memory.stream);
        }
        ScanCellsParams p;
        p.lists = impl_->lists->view();
        p.queries = m;
        p.nprobe = probes;
        p.splits = plan.splits;
        p.k = static_cast<int>(k);
        p.l2 = metric_type == faiss::METRIC_L2;
        p.x = queries.get();
        p.cells = all ? nullptr : cells.get();
        p.keys = keys.get();
        p.stats = stats ? counters.get() : nullptr;
        p.distances = distances_on_device ? distances + i * k : own_distances.get();
        p.labels = reinterpret_cast<int64_t*>(
                labels_on_device ? labels + i * k : own_labels.get());
        scan_cells(p, memory.stream);
        if (!distances_on_device) {
            copy_async(distances + i * k, own_distances.get(), m * k, memory.stream);
        }
        if (!labels_on_device) {
            copy_async(labels + i * k, own_labels.get(), m * k, memory.stream);
        }
    }
    unsigned long long counted[2];
    copy_async(counted, counters.get(), 2, memory.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    if (stats) {
        stats->queries = n;
        stats->cells_probed = static_cast<int64_t>(counted[0]);
        stats->vectors_read = static_cast<int64_t>(counted[1]);
    }
}

void GpuIndexAsymmetricIVF::range_search(
        idx_t,
        const float*,
        float,
        faiss::RangeSearchResult*,
        const faiss::SearchParameters*) const {
    FAISS_THROW_MSG(
            "range_search is not built for the GPU: search with a large k, or "
            "copyTo an index on the CPU");
}

void GpuIndexAsymmetricIVF::reconstruct(idx_t key, float* recons) const {
    reconstruct_n(key, 1, recons);
}

void GpuIndexAsymmetricIVF::reconstruct_n(idx_t i0, idx_t ni, float* recons)
        const {
    FAISS_THROW_IF_NOT_FMT(
            ni >= 0 && ni <= ntotal,
            "ni = %" PRId64 " must be between 0 and ntotal = %" PRId64,
            ni,
            ntotal);
    FAISS_THROW_IF_NOT_FMT(
            i0 >= 0 && i0 <= INT64_MAX - ni,
            "i0 = %" PRId64 " is outside the range of ids",
            i0);
    FAISS_THROW_IF_NOT_MSG(ni == 0 || recons, "recons is null");
    if (ni == 0) {
        return;
    }
    const int device = impl_->params.device;
    const DeviceScope scope(device);
    const StreamMemory& memory = impl_->memory;
    const int dim = static_cast<int>(d);
    const bool recons_on_device = on_device(recons, device, "recons");
    const StreamBuffer<uint32_t> locations(memory, ni);
    impl_->lists->find(i0, ni, locations.get());
    std::vector<uint32_t> host(ni);
    copy_async(host.data(), locations.get(), ni, memory.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
    for (idx_t i = 0; i < ni; i++) {
        FAISS_THROW_IF_NOT_FMT(
                host[i] != kNowhere, "id %" PRId64 " is not in the index", i0 + i);
    }
    const int64_t step = impl_->part(ni, dim);
    const StreamBuffer<float> own(memory, recons_on_device ? 0 : step * dim);
    for (idx_t i = 0; i < ni; i += step) {
        const int64_t m = std::min<int64_t>(step, ni - i);
        float* const to = recons_on_device ? recons + i * dim : own.get();
        impl_->lists->gather(m, locations.get() + i, to);
        if (!recons_on_device) {
            copy_async(recons + i * dim, to, m * dim, memory.stream);
        }
    }
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));
}

size_t GpuIndexAsymmetricIVF::remove_ids(const faiss::IDSelector& sel) {
    const DeviceScope scope(impl_->params.device);
    const int64_t removed = impl_->lists->remove(sel);
    ntotal -= removed;
    return removed;
}

void GpuIndexAsymmetricIVF::reset() {
    const DeviceScope scope(impl_->params.device);
    impl_->lists->reset();
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(impl_->memory.stream));
    ntotal = 0;
}

void GpuIndexAsymmetricIVF::reserveMemory(size_t n) {
    FAISS_THROW_IF_NOT_FMT(
            n <= static_cast<size_t>(INT_MAX - ntotal),
            "ntotal + n = %" PRId64 " + %zd must be below 2^31",
            ntotal,
            n);
    const DeviceScope scope(impl_->params.device);
    // Every cell may have begun a page.
    impl_->lists->reserve((static_cast<int64_t>(n) + kPage - 1) / kPage + ncell);
}

size_t GpuIndexAsymmetricIVF::reclaimMemory() {
    const DeviceScope scope(impl_->params.device);
    const size_t bytes = impl_->lists->reclaim();
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(impl_->memory.stream));
    const uint64_t before = impl_->pool.reserved();
    FAISS_SAAP_CUDA_CHECK(cudaMemPoolTrimTo(impl_->pool.get(), 0));
    return bytes + (before - impl_->pool.reserved());
}

std::vector<int32_t> GpuIndexAsymmetricIVF::list_sizes() const {
    const DeviceScope scope(impl_->params.device);
    return impl_->lists->sizes();
}

double GpuIndexAsymmetricIVF::imbalance_factor() const {
    double sum = 0, squares = 0;
    for (int32_t size : list_sizes()) {
        sum += size;
        squares += double(size) * size;
    }
    return sum > 0 ? squares * ncell / (sum * sum) : 0;
}

size_t GpuIndexAsymmetricIVF::memory() const {
    return impl_->lists->memory();
}

} // namespace faiss_saap::gpu
