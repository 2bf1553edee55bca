#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstring>

#include "append.h"
#include "attend.h"
#include "decode.h"
#include "lower.h"
#include "route.h"

namespace faiss_saap::gpu {

namespace {

/// Tokens of a sequence that may attend in one call: work space grows with
/// them.
constexpr int64_t kMostQueries = 64;
/// Bytes between the first and the last row of a view: kernels number 16 of them
/// at a time in 32 bits.
constexpr int64_t kMaxSpan = int64_t(15) << 32;

bool capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    FAISS_SAAP_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
}

void copy(
        void* to,
        const void* from,
        size_t bytes,
        cudaMemcpyKind kind,
        cudaStream_t stream) {
    if (bytes) {
        FAISS_SAAP_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, stream));
    }
}

} // namespace

/// Partitions of one KV head.
struct GpuAttentionAdapter::Lowered {
    std::vector<LoweredPartition> partitions;
};

/// A word in host memory that kernels write to, and what else has gone wrong.
struct GpuAttentionAdapter::Fault {
    FaultFlag* host = nullptr;
    FaultFlag* device = nullptr;
    cudaEvent_t never = nullptr; ///< is not recorded

    Fault() {
        void* p = nullptr;
        FAISS_SAAP_CUDA_CHECK(
                cudaHostAlloc(&p, sizeof(FaultFlag), cudaHostAllocMapped));
        host = static_cast<FaultFlag*>(p);
        *host = 0;
        FAISS_SAAP_CUDA_CHECK(cudaHostGetDevicePointer(&p, host, 0));
        device = static_cast<FaultFlag*>(p);
        FAISS_SAAP_CUDA_CHECK(
                cudaEventCreateWithFlags(&never, cudaEventDisableTiming));
    }
    /// An error that stays: asked of the driver, as whoever met it may have a CUDA
    /// runtime of their own, with last errors of its own.
    cudaError_t lasting() const {
        auto mode = cudaStreamCaptureModeRelaxed; // this is no part of a graph
        cudaThreadExchangeStreamCaptureMode(&mode);
        const cudaError_t error = cudaEventQuery(never);
        cudaThreadExchangeStreamCaptureMode(&mode);
        return error;
    }
    ~Fault() {
        if (never && cudaEventDestroy(never) != cudaSuccess) {
            cudaGetLastError();
        }
        if (cudaFreeHost(host) != cudaSuccess) {
            cudaGetLastError();
        }
    }
};

struct GpuAttentionAdapter::Sequence {
    /// The adapter's and its own, each by KV head.
    std::vector<std::shared_ptr<const Lowered>> partitions;
    std::vector<ListState> lists; ///< as on the device
    std::vector<int> first_list;  ///< of each KV head, and the end
    DeviceBuffer fixed;           ///< SequenceState, then its ListStates
    DeviceBuffer arena;
    int64_t capacity = 0;
    /// Tokens seen, where the host knows: not once a graph has appended.
    int64_t length = 0;
    bool length_known = true;

    SequenceState* state() const {
        return reinterpret_cast<SequenceState*>(fixed.data());
    }
    ListState* device_lists() const {
        return reinterpret_cast<ListState*>(fixed.data() + 256);
    }
};

struct GpuBatch::State {
    std::vector<int64_t> sequences;
    std::vector<int64_t> q_len, view_length;
    std::vector<BatchList> lists;
    std::vector<BatchRow> rows;
    int device = 0;
    int64_t adapter = 0; ///< the number of that which planned it
    int64_t tokens = 0, most_q_len = 0;
    int most_cells = 0, most_cols = 0, most_post = 0, most_width = 0;
    int most_cell_bytes = 0;
    int nteam = 0, team_blocks = 1, most_team_rows = 1;
    int64_t stride = 1; ///< cells of a KV head's partitions
    bool keeps_means = false, attends = false;
    bool one_each = true; ///< token of each sequence
    int most_partitions = 1;
    bool keys_are_bf16 = true; ///< none is rotated back
    bool one_network = true;   ///< query assigners have one for all heads of a group
    DType dtype = DType::bfloat16;
    DeviceBuffer memory;
    bool released = false;
    // in memory
    BatchItem* d_items = nullptr;
    BatchList* d_lists = nullptr;
    BatchRow* d_rows = nullptr;
    DecodeRow* d_decode_rows = nullptr; ///< the same ones, pairs first
    RowTeam* d_teams = nullptr;
    int32_t* d_team_rows = nullptr;
    int32_t* d_pairs_first = nullptr; ///< rows, those of DecodeParams::paired first
    unsigned long long* best = nullptr; ///< of few tokens
    __nv_bfloat16* centroids = nullptr; ///< of many
    int32_t* counts = nullptr;
    float* scores = nullptr;
    GpuProbedCells probed;
    RowWork work;
    float *part = nullptr, *part_lse = nullptr;
    int32_t* row_done = nullptr; ///< blocks of each row, in a step of one launch
    DecodeParams decode; ///< what a policy adds to

    /// One launch can serve it.
    bool decodes(const ProbePolicy& policy) const {
        return decode.grid.row_blocks > 0 && policy.share_group;
    }
    /// Some device and some policy let it.
    bool may_decode() const {
        return attends && one_each && !keeps_means && most_partitions == 1;
    }
};

GpuBatch::GpuBatch(std::unique_ptr<State> state) : state_(std::move(state)) {}
GpuBatch::~GpuBatch() = default;

int64_t GpuBatch::tokens() const {
    return state_->tokens;
}

int64_t GpuBatch::cells() const {
    return state_->stride;
}

size_t GpuBatch::bytes_used() const {
    return state_->memory.size();
}

void GpuBatch::release(cudaStream_t stream) {
    const DeviceScope scope(state_->device);
    state_->released = true;
    state_->memory.release(stream);
}

namespace {

int64_t next_number() {
    static std::atomic<int64_t> last = 0;
    return ++last;
}

} // namespace

GpuAttentionAdapter::GpuAttentionAdapter(
        const AdapterParams& params,
        HeadPartitions partitions,
        int device)
        : device_(device), number_(next_number()) {
    // The same checks, with the same sentences.
    params_ = AttentionAdapter(params, partitions).params();
    group_ = params_.heads_q / params_.heads_kv;
    FAISS_THROW_IF_NOT_FMT(
            params_.d == 64 || params_.d == 96 || params_.d == 128 ||
                    params_.d == 256,
            "d = %d: on the device there are 64, 96, 128 and 256",
            params_.d);
    FAISS_THROW_IF_NOT_FMT(
            group_ <= kMaxGroup,
            "heads_q / heads_kv = %d: on the device a group has at most %d",
            group_,
            kMaxGroup);
    FAISS_THROW_IF_NOT_MSG(
            !params_.key_codes,
            "key_codes = true: codes of keys are not kept on the device");
    require_device(device);
    DeviceScope scope(device);
    FAISS_SAAP_CUDA_CHECK(cudaDeviceGetAttribute(
            &processors_, cudaDevAttrMultiProcessorCount, device));
    team_blocks_ = most_team_blocks();
    route_room_ = route_room();
    fault_ = std::make_unique<Fault>();
    for (size_t h = 0; h < partitions.size(); h++) {
        auto lowered = std::make_shared<Lowered>();
        for (const Partition& partition : partitions[h]) {
            lowered->partitions.push_back(
                    lower(partition, static_cast<int>(h), group_, nullptr));
        }
        partitions_.push_back(std::move(lowered));
    }
}

GpuAttentionAdapter::GpuAttentionAdapter(
        const AdapterParams& params,
        const std::vector<Partition>& partitions,
        int device)
        : GpuAttentionAdapter(
                  params,
                  [&] {
                      HeadPartitions heads;
                      for (const Partition& p : partitions) {
                          heads.push_back({p});
                      }
                      return heads;
                  }(),
                  device) {}

GpuAttentionAdapter::~GpuAttentionAdapter() = default;

void GpuAttentionAdapter::check() const {
    const cudaError_t error = fault_->lasting();
    if (loses_context(error)) {
        throw_cuda("an earlier call", error);
    }
    const FaultFlag word = *static_cast<volatile FaultFlag*>(fault_->host);
    const auto fault = static_cast<gpu::Fault>(static_cast<uint32_t>(word));
    if (fault == gpu::Fault::none) {
        return;
    }
    const auto index = static_cast<int>(word >> 32);
    *static_cast<volatile FaultFlag*>(fault_->host) = 0;
    for (const auto& entry : sequences_) {
        entry.second->length_known = false;
    }
    const char* what = "";
    switch (fault) {
        case gpu::Fault::append_capacity:
            what = "append: an item of a batch outgrew the tokens reserved for "
                   "its sequence, and was not appended; item";
            break;
        case gpu::Fault::append_view:
            what = "append: an item's view has fewer slots than its sequence "
                   "would have tokens, and it was not appended; item";
            break;
        case gpu::Fault::append_key:
            what = "append: a new key is not finite, and its sequence was not "
                   "appended; item";
            break;
        case gpu::Fault::append_page:
            what = "append: the page table names a page that is not there, and "
                   "the sequence was not appended; item";
            break;
        case gpu::Fault::route_query:
            what = "route: the query assigner gives a score that is not finite, "
                   "as for a query that is not; token";
            break;
        case gpu::Fault::attend_view:
            what = "attend: an item's view has fewer slots than its sequence has "
                   "tokens; item";
            break;
        case gpu::Fault::attend_cell:
            what = "attend_preassigned: a probed cell, or the number of cells, is "
                   "out of range; row";
            break;
        case gpu::Fault::attend_page:
            what = "attend: the page table names a page that is not there; item";
            break;
        case gpu::Fault::none:
            break;
    }
    FAISS_THROW_FMT("%s %d", what, index);
}

GpuAttentionAdapter::Sequence& GpuAttentionAdapter::at(int64_t sequence) const {
    const auto found = sequences_.find(sequence);
    FAISS_THROW_IF_NOT_FMT(
            found != sequences_.end(),
            "sequence = %" PRId64 " was freed or never made",
            sequence);
    return *found->second;
}

int64_t GpuAttentionAdapter::insert(std::unique_ptr<Sequence> sequence) {
    sequences_.emplace(next_sequence_, std::move(sequence));
    return next_sequence_++;
}

namespace {

/// Places the lists in an arena for `capacity` tokens; without memory, only
/// counts it.
size_t place(std::vector<ListState>& lists, int64_t capacity, int d, char* base) {
    Layout layout(base);
    for (ListState& l : lists) {
        const bool means = l.query.reads_means;
        l.count = layout.take<int32_t>(l.ncell);
        l.newest = layout.take<int32_t>(l.ncell);
        l.extents = layout.take<uint32_t>(int64_t(l.ncell) * kExtents);
        l.progress = layout.take<ListProgress>(1);
        l.cells = layout.take<uint16_t>(capacity);
        l.means = means ? layout.take<float>(int64_t(l.ncell) * d) : nullptr;
        l.slots = layout.take<int32_t>(arena_size(capacity, l.ncell));
    }
    return layout.size();
}

/// What empty lists hold.
void clear(const std::vector<ListState>& lists, int d, cudaStream_t stream) {
    for (const ListState& l : lists) {
        const auto set = [&](void* p, int value, size_t bytes) {
            FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(p, value, bytes, stream));
        };
        set(l.count, 0, l.ncell * sizeof(int32_t));
        set(l.newest, -1, l.ncell * sizeof(int32_t));
        set(l.extents, -1, size_t(l.ncell) * kExtents * sizeof(uint32_t));
        set(l.progress, 0, sizeof(ListProgress));
        if (l.means) {
            set(l.means, 0, size_t(l.ncell) * d * sizeof(float));
        }
    }
}

/// Copies lists into others with at least their capacity.
void copy_lists(
        const std::vector<ListState>& from,
        const std::vector<ListState>& to,
        int64_t capacity,
        int d,
        cudaStream_t stream) {
    for (size_t i = 0; i < from.size(); i++) {
        const ListState &a = from[i], &b = to[i];
        const auto array = [&](auto* target, const auto* source, int64_t n) {
            copy(target,
                 source,
                 n * sizeof(*source),
                 cudaMemcpyDeviceToDevice,
                 stream);
        };
        array(b.count, a.count, a.ncell);
        array(b.newest, a.newest, a.ncell);
        array(b.extents, a.extents, int64_t(a.ncell) * kExtents);
        array(b.progress, a.progress, 1);
        array(b.cells, a.cells, capacity);
        array(b.slots, a.slots, arena_size(capacity, a.ncell));
        if (a.means) {
            array(b.means, a.means, int64_t(a.ncell) * d);
        }
    }
}

void check_reserve(int64_t tokens) {
    FAISS_THROW_IF_NOT_FMT(
            tokens >= 1 && tokens <= kMaxTokens,
            "reserve = %" PRId64 " tokens must be between 1 and %" PRId64,
            tokens,
            kMaxTokens);
}

} // namespace

std::unique_ptr<GpuAttentionAdapter::Sequence> GpuAttentionAdapter::make_sequence(
        std::vector<std::shared_ptr<const Lowered>> partitions,
        int64_t reserve,
        cudaStream_t stream) const {
    check_reserve(reserve);
    auto s = std::make_unique<Sequence>();
    s->partitions = std::move(partitions);
    for (int h = 0; h < params_.heads_kv; h++) {
        s->first_list.push_back(static_cast<int>(s->lists.size()));
        int first_cell = 0, number = 0;
        for (size_t i = h; i < s->partitions.size(); i += params_.heads_kv) {
            for (const LoweredPartition& p : s->partitions[i]->partitions) {
                ListState list;
                list.ncell = p.ncell;
                list.kv_head = h;
                list.partition = number++;
                list.first_cell = first_cell;
                list.rotary = p.rotary;
                list.key = p.key;
                list.query = p.query;
                first_cell += p.ncell;
                s->lists.push_back(list);
            }
        }
        FAISS_THROW_IF_NOT_FMT(number > 0, "KV head %d has no partition", h);
        FAISS_THROW_IF_NOT_FMT(
                number <= kMaxPartitions,
                "KV head %d has %d partitions, on the device there are at most %d",
                h,
                number,
                kMaxPartitions);
    }
    s->first_list.push_back(static_cast<int>(s->lists.size()));
    s->capacity = reserve;
    s->arena = DeviceBuffer(place(s->lists, reserve, params_.d, nullptr), stream);
    place(s->lists, reserve, params_.d, s->arena.data());
    s->fixed = DeviceBuffer(256 + s->lists.size() * sizeof(ListState), stream);
    return s;
}

namespace {

void upload_sequence(
        SequenceState* state,
        ListState* device_lists,
        const std::vector<ListState>& lists,
        int64_t capacity,
        cudaStream_t stream) {
    copy(device_lists,
         lists.data(),
         lists.size() * sizeof(ListState),
         cudaMemcpyHostToDevice,
         stream);
    copy(&state->capacity,
         &capacity,
         sizeof(capacity),
         cudaMemcpyHostToDevice,
         stream);
    copy(&state->lists,
         &device_lists,
         sizeof(device_lists),
         cudaMemcpyHostToDevice,
         stream);
}

} // namespace

int64_t GpuAttentionAdapter::create(
        const HeadPartitions& own,
        int64_t reserve,
        cudaStream_t stream) {
    check();
    if (!own.empty()) {
        AttentionAdapter checked(params_, own);
    }
    DeviceScope scope(device_);
    auto partitions = partitions_;
    for (size_t h = 0; h < own.size(); h++) {
        auto lowered = std::make_shared<Lowered>();
        for (const Partition& partition : own[h]) {
            lowered->partitions.push_back(
                    lower(partition, static_cast<int>(h), group_, stream));
        }
        partitions.push_back(std::move(lowered));
    }
    auto s = make_sequence(std::move(partitions), reserve, stream);
    clear(s->lists, params_.d, stream);
    FAISS_SAAP_CUDA_CHECK(
            cudaMemsetAsync(s->fixed.data(), 0, sizeof(SequenceState), stream));
    upload_sequence(s->state(), s->device_lists(), s->lists, s->capacity, stream);
    return insert(std::move(s));
}

int64_t GpuAttentionAdapter::fork(int64_t sequence, cudaStream_t stream) {
    check();
    const Sequence& from = at(sequence);
    DeviceScope scope(device_);
    auto s = make_sequence(from.partitions, from.capacity, stream);
    copy_lists(from.lists, s->lists, from.capacity, params_.d, stream);
    copy(s->fixed.data(),
         from.fixed.data(),
         sizeof(SequenceState),
         cudaMemcpyDeviceToDevice,
         stream);
    upload_sequence(s->state(), s->device_lists(), s->lists, s->capacity, stream);
    s->length = from.length;
    s->length_known = from.length_known;
    return insert(std::move(s));
}

void GpuAttentionAdapter::free(int64_t sequence, cudaStream_t stream) {
    check();
    Sequence& s = at(sequence);
    DeviceScope scope(device_);
    s.fixed.release(stream);
    s.arena.release(stream);
    sequences_.erase(sequence);
}

void GpuAttentionAdapter::reset(int64_t sequence, cudaStream_t stream) {
    check();
    Sequence& s = at(sequence);
    DeviceScope scope(device_);
    clear(s.lists, params_.d, stream);
    static_assert(offsetof(SequenceState, capacity) == 2 * sizeof(int64_t));
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(s.state(), 0, 2 * sizeof(int64_t), stream));
    s.length = 0;
    s.length_known = true;
}

void GpuAttentionAdapter::reserve(
        int64_t sequence,
        int64_t tokens,
        cudaStream_t stream) {
    check();
    check_reserve(tokens);
    Sequence& s = at(sequence);
    if (tokens <= s.capacity) {
        return;
    }
    DeviceScope scope(device_);
    std::vector<ListState> lists = s.lists;
    DeviceBuffer arena(place(lists, tokens, params_.d, nullptr), stream);
    place(lists, tokens, params_.d, arena.data());
    copy_lists(s.lists, lists, s.capacity, params_.d, stream);
    upload_sequence(s.state(), s.device_lists(), lists, tokens, stream);
    std::swap(s.arena, arena);
    s.lists = std::move(lists);
    s.capacity = tokens;
    arena.release(stream);
}

int64_t GpuAttentionAdapter::length(int64_t sequence, cudaStream_t stream) const {
    Sequence& s = at(sequence);
    if (!s.length_known) {
        DeviceScope scope(device_);
        copy(&s.length,
             &s.state()->length,
             sizeof(s.length),
             cudaMemcpyDeviceToHost,
             stream);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
        // A graph may run again: what is true now may not be later.
    }
    return s.length;
}

int GpuAttentionAdapter::npartition(int64_t sequence, int kv_head) const {
    const Sequence& s = at(sequence);
    FAISS_THROW_IF_NOT_FMT(
            kv_head >= 0 && kv_head < params_.heads_kv,
            "kv_head = %d, the adapter has heads_kv = %d",
            kv_head,
            params_.heads_kv);
    return s.first_list[kv_head + 1] - s.first_list[kv_head];
}

size_t GpuAttentionAdapter::bytes_used() const {
    size_t bytes = 0;
    for (const auto& entry : sequences_) {
        bytes += entry.second->fixed.size() + entry.second->arena.size();
    }
    return bytes;
}

void GpuAttentionAdapter::check_view(const KvView& kv) const {
    kv.check_shape();
    FAISS_THROW_IF_NOT_FMT(
            kv.heads == params_.heads_kv,
            "kv.heads = %d, the adapter has heads_kv = %d",
            kv.heads,
            params_.heads_kv);
    FAISS_THROW_IF_NOT_FMT(
            kv.d == params_.d,
            "kv.d = %d, the adapter has d = %d",
            kv.d,
            params_.d);
    FAISS_THROW_IF_NOT_FMT(
            kv.d_v == kv.d,
            "kv.d_v = %d: on the device values have as many components as keys, "
            "%d",
            kv.d_v,
            kv.d);
    FAISS_THROW_IF_NOT_FMT(
            kv.dtype != DType::float32,
            "kv.dtype = %s: on the device there are float16 and bfloat16",
            name(kv.dtype));
    const auto aligned = [](const char* what, int64_t value, int64_t unit) {
        FAISS_THROW_IF_NOT_FMT(
                value % unit == 0,
                "%s = %" PRId64 ": on the device rows begin at multiples of 16 "
                "bytes",
                what,
                value);
    };
    aligned("kv.k", reinterpret_cast<intptr_t>(kv.k), 16);
    aligned("kv.v", reinterpret_cast<intptr_t>(kv.v), 16);
    aligned("kv.k_token_stride", kv.k_token_stride, 8);
    aligned("kv.v_token_stride", kv.v_token_stride, 8);
    aligned("kv.k_head_stride", kv.k_head_stride, 8);
    aligned("kv.v_head_stride", kv.v_head_stride, 8);
    aligned("kv.k_page_stride", kv.k_page_stride, 8);
    aligned("kv.v_page_stride", kv.v_page_stride, 8);
    const auto near = [&](const char* what, int64_t token, int64_t head, int64_t page) {
        FAISS_THROW_IF_NOT_FMT(
                token >= 0 && head >= 0 && page >= 0,
                "%s has strides of %" PRId64 ", %" PRId64 " and %" PRId64
                " for tokens, heads and pages: on the device they must not be negative",
                what,
                token,
                head,
                page);
        // As floating-point numbers, which do not wrap.
        const double last = kv.page_table
                ? double(kv.npages) * double(page) + double(kv.page_size) * double(token)
                : double(kv.length) * double(token);
        const double bytes = (last + double(kv.heads) * double(head)) *
                static_cast<double>(element_size(kv.dtype));
        FAISS_THROW_IF_NOT_FMT(
                bytes <= static_cast<double>(kMaxSpan),
                "%s spans %.0f bytes, on the device at most %" PRId64,
                what,
                bytes,
                kMaxSpan);
    };
    near("kv.k", kv.k_token_stride, kv.k_head_stride, kv.k_page_stride);
    near("kv.v", kv.v_token_stride, kv.v_head_stride, kv.v_page_stride);
}

std::unique_ptr<GpuBatch> GpuAttentionAdapter::plan(
        const std::vector<SequenceInput>& batch,
        cudaStream_t stream) const {
    check();
    auto state = std::make_unique<GpuBatch::State>();
    GpuBatch::State& b = *state;
    b.device = device_;
    b.adapter = number_;
    b.attends = true;
    if (batch.empty()) {
        return std::unique_ptr<GpuBatch>(new GpuBatch(std::move(state)));
    }
    std::vector<BatchItem> items;
    std::map<std::vector<const Lowered*>, std::vector<int32_t>> alike; ///< rows
    int64_t scores = 0;
    for (const SequenceInput& in : batch) {
        b.attends = b.attends && in.q_len <= kMostQueries;
    }
    for (const SequenceInput& in : batch) {
        const Sequence& s = at(in.sequence);
        FAISS_THROW_IF_NOT_FMT(
                std::find(b.sequences.begin(), b.sequences.end(), in.sequence) ==
                        b.sequences.end(),
                "sequence %" PRId64 " is in the batch twice",
                in.sequence);
        FAISS_THROW_IF_NOT_MSG(
                !in.positions,
                "positions must be null: on the device the last q_len tokens ask");
        FAISS_THROW_IF_NOT_FMT(
                in.q_len >= 0 && in.q_len <= kMaxTokens,
                "q_len = %" PRId64 " must be between 0 and %" PRId64,
                in.q_len,
                kMaxTokens);
        check_view(in.kv);
        FAISS_THROW_IF_NOT_FMT(
                in.kv.dtype == batch[0].kv.dtype,
                "kv.dtype = %s, that of the batch's first sequence is %s",
                name(in.kv.dtype),
                name(batch[0].kv.dtype));
        BatchItem item;
        item.sequence = s.state();
        item.kv = lower_view(in.kv);
        item.q_len = static_cast<int>(in.q_len);
        item.first_token = static_cast<int>(b.tokens);
        const int number = static_cast<int>(items.size());
        const int first = static_cast<int>(b.lists.size());
        item.first_list = first;
        item.nlist = static_cast<int>(s.lists.size());
        for (size_t l = 0; l < s.lists.size(); l++) {
            const ListState& list = s.lists[l];
            const DeviceAssigner& a = list.query;
            BatchList at;
            at.item = number;
            at.sequence = s.state();
            at.list = s.device_lists() + l;
            at.scores = scores;
            scores += in.q_len * group_ * list.ncell;
            b.keeps_means = b.keeps_means || a.reads_means;
            b.one_network = b.one_network && a.networks == 1;
            b.keys_are_bf16 = b.keys_are_bf16 && in.kv.dtype == DType::bfloat16 &&
                    list.key.input == RowInput::post_rope;
            b.most_cells = std::max(b.most_cells, list.ncell);
            b.most_cell_bytes = std::max(
                    b.most_cell_bytes, list.key.padded_cols * list.key.element());
            const bool networks = a.input == RowInput::hidden;
            b.most_cols =
                    std::max(b.most_cols, networks ? a.padded_d : a.padded_cols);
            b.most_width = std::max(b.most_width, networks ? a.padded_width : 0);
            b.most_post = std::max(b.most_post, a.blend ? params_.d : 0);
            b.lists.push_back(at);
        }
        for (int64_t t = 0; b.attends && t < in.q_len; t++) {
            for (int h = 0; h < params_.heads_kv; h++) {
                BatchRow row;
                row.item = number;
                row.sequence = s.state();
                row.lists = s.device_lists() + s.first_list[h];
                row.token = static_cast<int>(t);
                row.q_len = item.q_len;
                row.query = item.first_token + row.token;
                row.view_length = in.kv.length;
                row.kv_head = h;
                row.first_list = first + s.first_list[h];
                row.nlist = s.first_list[h + 1] - s.first_list[h];
                b.most_partitions = std::max(b.most_partitions, row.nlist);
                std::vector<const Lowered*> partitions;
                for (size_t i = h; i < s.partitions.size(); i += params_.heads_kv) {
                    partitions.push_back(s.partitions[i].get());
                }
                alike[std::move(partitions)].push_back(
                        static_cast<int32_t>(b.rows.size()));
                b.rows.push_back(row);
            }
        }
        for (int h = 0; h < params_.heads_kv; h++) {
            const ListState& last = s.lists[s.first_list[h + 1] - 1];
            b.stride = std::max<int64_t>(b.stride, last.first_cell + last.ncell);
        }
        b.sequences.push_back(in.sequence);
        b.q_len.push_back(in.q_len);
        b.view_length.push_back(in.kv.length);
        b.tokens += in.q_len;
        b.most_q_len = std::max(b.most_q_len, in.q_len);
        b.one_each = b.one_each && in.q_len == 1;
        b.dtype = in.kv.dtype;
        items.push_back(item);
    }
    const auto nrow = static_cast<int64_t>(b.rows.size());
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(b.lists.size()) <= kMostRows &&
                    nrow * group_ <= kMostRows,
            "the batch has %zd lists and %" PRId64 " rows, one launch numbers "
            "%" PRId64,
            b.lists.size(),
            nrow * group_,
            kMostRows);

    int64_t tiles = 0;
    for (const BatchRow& row : b.rows) {
        tiles += (row.view_length / kTile + 2) * group_;
    }
    FAISS_THROW_IF_NOT_FMT(
            tiles < INT32_MAX,
            "the batch has up to %" PRId64 " tiles of %d keys, one launch numbers "
            "%d",
            tiles,
            kTile,
            INT32_MAX);
    // So many rows a team that all teams of most blocks run at once.
    int64_t all_teams = 0;
    const auto teams_of = [&](int64_t rows) {
        all_teams = 0;
        for (const auto& entry : alike) {
            all_teams += (static_cast<int64_t>(entry.second.size()) + rows - 1) / rows;
        }
        return all_teams;
    };
    const int64_t at_once = 2 * processors_;
    RouteParams shape;
    shape.heads_q = params_.heads_q;
    shape.heads_kv = params_.heads_kv;
    shape.d = params_.d;
    shape.most_cells = b.most_cells;
    shape.most_cols = b.most_cols;
    shape.most_post = b.most_post;
    shape.most_width = b.most_width;
    FAISS_THROW_IF_NOT_FMT(
            route_needs(shape) <= route_room_,
            "%d cells a partition, or networks %d wide for groups of %d, take %zd "
            "bytes of shared memory, a block has %zd on this device",
            b.most_cells,
            b.most_width,
            group_,
            route_needs(shape),
            route_room_);
    const int most_rows = most_team_rows(shape);
    while (2 * b.most_team_rows <= most_rows &&
           teams_of(b.most_team_rows) * kMaxTeam > at_once) {
        b.most_team_rows *= 2;
    }
    b.nteam = static_cast<int>(teams_of(b.most_team_rows));
    constexpr int kLeastCells = 64; // of a block
    b.team_blocks = team_blocks_;
    while (b.team_blocks > 1 &&
           (b.nteam * b.team_blocks > at_once ||
            (b.team_blocks - 1) * kLeastCells >= b.most_cells)) {
        b.team_blocks /= 2;
    }
    std::vector<RowTeam> teams;
    std::vector<int32_t> team_rows, pairs_first, single;
    for (const auto& entry : alike) {
        const auto n = static_cast<int>(entry.second.size());
        for (int i = 0; i < n; i += b.most_team_rows) {
            teams.push_back(
                    {static_cast<int>(team_rows.size()) + i,
                     std::min(b.most_team_rows, n - i)});
        }
        team_rows.insert(team_rows.end(), entry.second.begin(), entry.second.end());
        const auto end = entry.second.begin() + n / 2 * 2;
        pairs_first.insert(pairs_first.end(), entry.second.begin(), end);
        single.insert(single.end(), end, entry.second.end());
    }
    const size_t paired = pairs_first.size();
    pairs_first.insert(pairs_first.end(), single.begin(), single.end());

    DeviceScope scope(device_);
    const int64_t heads = nrow * group_;
    b.work.stride = b.stride;
    b.work.probed_words = (b.stride + 31) / 32;
    b.probed.stride = b.stride;
    const auto lay = [&](char* base) {
        Layout layout(base);
        b.d_items = layout.take<BatchItem>(items.size());
        b.d_lists = layout.take<BatchList>(b.lists.size());
        b.d_rows = layout.take<BatchRow>(nrow);
        b.d_decode_rows = layout.take<DecodeRow>(b.may_decode() ? nrow : 0);
        b.d_teams = layout.take<RowTeam>(b.nteam);
        b.d_team_rows = layout.take<int32_t>(nrow);
        b.d_pairs_first = layout.take<int32_t>(b.may_decode() ? nrow : 0);
        const auto nlist = static_cast<int>(b.lists.size());
        if (b.most_q_len <= kFewTokens) {
            b.best = layout.take<unsigned long long>(nlist * b.most_q_len);
        } else {
            b.centroids = layout.take<__nv_bfloat16>(
                    append_centroids(nlist, b.most_cells, params_.d));
            b.counts = layout.take<int32_t>(
                    append_counts(nlist, b.most_q_len, b.most_cells));
        }
        if (b.attends) {
            b.scores = layout.take<float>(scores);
            b.probed.cells = layout.take<int32_t>(heads * b.stride);
            b.probed.count = layout.take<int32_t>(heads);
            b.work.plans = layout.take<RowPlan>(heads);
            b.work.cells = layout.take<RowCell>(heads * b.stride);
            b.work.probed = layout.take<uint32_t>(heads * b.work.probed_words);
            // Rows and blocks, of a group's queries each; a choice for each query
            // head needs fewer.
            const int64_t pieces = 2 * (nrow + processors_) * group_;
            b.part = layout.take<float>(pieces * params_.d);
            b.part_lse = layout.take<float>(pieces);
            b.row_done = layout.take<int32_t>(nrow);
        }
        return layout.size();
    };
    b.memory = DeviceBuffer(lay(nullptr), stream);
    lay(b.memory.data());
    copy(b.d_items,
         items.data(),
         items.size() * sizeof(BatchItem),
         cudaMemcpyHostToDevice,
         stream);
    if (b.best) {
        FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(
                b.best,
                0,
                b.lists.size() * b.most_q_len * sizeof(*b.best),
                stream));
    }
    copy(b.d_lists,
         b.lists.data(),
         b.lists.size() * sizeof(BatchList),
         cudaMemcpyHostToDevice,
         stream);
    copy(b.d_rows,
         b.rows.data(),
         nrow * sizeof(BatchRow),
         cudaMemcpyHostToDevice,
         stream);
    copy(b.d_teams,
         teams.data(),
         teams.size() * sizeof(RowTeam),
         cudaMemcpyHostToDevice,
         stream);
    copy(b.d_team_rows,
         team_rows.data(),
         team_rows.size() * sizeof(int32_t),
         cudaMemcpyHostToDevice,
         stream);
    DecodeParams& d = b.decode;
    d.items = b.d_items;
    d.rows = b.d_decode_rows;
    d.nrow = static_cast<int>(nrow);
    d.most_cells = b.most_cells;
    d.most_cell_bytes = b.most_cell_bytes;
    d.most_cols = b.most_cols;
    d.most_width = b.most_width;
    d.heads_q = params_.heads_q;
    d.heads_kv = params_.heads_kv;
    d.d = params_.d;
    d.sink = params_.sink;
    d.window = params_.window;
    d.position_offset = params_.position_offset;
    d.dense_below = params_.dense_below;
    d.scale = params_.scale;
    d.attend_dense = params_.attend_dense;
    d.bf16 = b.dtype == DType::bfloat16;
    d.flag = fault_->device;
    // The blocks of all rows are 2 * processors_ at most (dense_blocks): there is room.
    d.pieces = b.part;
    d.piece_lse = b.part_lse;
    d.row_done = b.row_done;
    d.paired = b.one_network ? static_cast<int>(paired) : 0;
    d.all_near = 1;
    for (int64_t length : b.view_length) {
        d.most_keys = std::max(d.most_keys, length);
        d.all_near &= length <= params_.sink + params_.window;
        const int64_t dense = std::min(length, params_.sink + params_.window);
        d.bytes += params_.heads_kv * 2 * params_.d * 2 *
                (dense + params_.policy.key_limit(length - dense));
    }
    d.grid = b.may_decode() ? decode_grid(d) : DecodeGrid();
    if (d.grid.row_blocks > 0) {
        FAISS_SAAP_CUDA_CHECK(
                cudaMemsetAsync(b.row_done, 0, nrow * sizeof(int32_t), stream));
        if (d.grid.pairs) {
            copy(b.d_pairs_first,
                 pairs_first.data(),
                 nrow * sizeof(int32_t),
                 cudaMemcpyHostToDevice,
                 stream);
        }
        // By the device, as a copy of so much would wait for the stream.
        FAISS_SAAP_CUDA_CHECK(describe_rows(
                d.nrow,
                b.d_rows,
                b.d_items,
                d.grid.pairs ? b.d_pairs_first : nullptr,
                b.d_decode_rows,
                stream));
    }
    return std::unique_ptr<GpuBatch>(new GpuBatch(std::move(state)));
}

void GpuAttentionAdapter::check_batch(const GpuBatch& batch, bool attends) const {
    const GpuBatch::State& b = *batch.state_;
    FAISS_THROW_IF_NOT_FMT(
            b.device == device_,
            "the batch lies on device %d, the adapter on %d",
            b.device,
            device_);
    FAISS_THROW_IF_NOT_MSG(
            b.adapter == number_, "the batch was planned by another adapter");
    FAISS_THROW_IF_NOT_MSG(!b.released, "the batch was released");
    for (int64_t sequence : b.sequences) {
        at(sequence);
    }
    FAISS_THROW_IF_NOT_FMT(
            b.attends || !attends,
            "q_len = %" PRId64 ": the batch can be appended, but at most %" PRId64
            " tokens of a sequence attend in one call",
            b.most_q_len,
            kMostQueries);
}

void GpuAttentionAdapter::prepare_append(
        const GpuBatch& batch,
        cudaStream_t stream) {
    const GpuBatch::State& b = *batch.state_;
    if (capturing(stream)) {
        for (int64_t sequence : b.sequences) {
            at(sequence).length_known = false;
        }
    } else {
        std::vector<int64_t> after;
        for (size_t i = 0; i < b.sequences.size(); i++) {
            after.push_back(length(b.sequences[i], stream) + b.q_len[i]);
            FAISS_THROW_IF_NOT_FMT(
                    after[i] <= b.view_length[i],
                    "kv.length = %" PRId64 ", sequence %" PRId64
                    " would have %" PRId64 " tokens",
                    b.view_length[i],
                    b.sequences[i],
                    after[i]);
            check_reserve(std::max<int64_t>(1, after[i]));
        }
        for (size_t i = 0; i < b.sequences.size(); i++) {
            const int64_t capacity = at(b.sequences[i]).capacity;
            if (after[i] > capacity) {
                reserve(b.sequences[i],
                        std::min(kMaxTokens, std::max(after[i], 2 * capacity)),
                        stream);
            }
        }
        for (size_t i = 0; i < b.sequences.size(); i++) {
            Sequence& s = at(b.sequences[i]);
            s.length = after[i];
        }
    }
}

void GpuAttentionAdapter::append(const GpuBatch& batch, cudaStream_t stream) {
    check();
    check_batch(batch, false);
    const GpuBatch::State& b = *batch.state_;
    DeviceScope scope(device_);
    prepare_append(batch, stream);
    if (b.most_q_len == 0) {
        return;
    }
    AppendParams p;
    p.items = b.d_items;
    p.nitem = static_cast<int>(b.sequences.size());
    p.lists = b.d_lists;
    p.nlist = static_cast<int>(b.lists.size());
    p.best = b.best;
    p.centroids = b.centroids;
    p.counts = b.counts;
    p.keys_are_bf16 = b.keys_are_bf16;
    p.most_tokens = static_cast<int>(b.most_q_len);
    p.most_cells = b.most_cells;
    p.heads_kv = params_.heads_kv;
    p.d = params_.d;
    p.sink = params_.sink;
    p.window = params_.window;
    p.position_offset = params_.position_offset;
    p.keeps_means = b.keeps_means;
    p.flag = fault_->device;
    FAISS_SAAP_CUDA_CHECK(gpu::append(p, stream));
}

void GpuAttentionAdapter::truncate(
        int64_t sequence,
        int64_t length,
        const KvView& kv,
        cudaStream_t stream) {
    check();
    Sequence& s = at(sequence);
    DeviceScope scope(device_);
    const int64_t before = this->length(sequence, stream);
    FAISS_THROW_IF_NOT_FMT(
            length >= 0 && length <= before,
            "length = %" PRId64 " must be between 0 and the %" PRId64
            " tokens of sequence %" PRId64,
            length,
            before,
            sequence);
    check_view(kv);
    FAISS_THROW_IF_NOT_FMT(
            kv.length >= length,
            "kv.length = %" PRId64 ", %" PRId64 " tokens are needed",
            kv.length,
            length);
    TruncateParams p;
    p.sequence = s.state();
    p.nlist = static_cast<int>(s.lists.size());
    p.length = length;
    p.sink = params_.sink;
    p.window = params_.window;
    p.d = params_.d;
    p.slack = static_cast<uint32_t>(arena_slack(s.capacity));
    p.kv = lower_view(kv);
    FAISS_SAAP_CUDA_CHECK(gpu::truncate(p, stream));
    s.length = length;
}

void GpuAttentionAdapter::check_policy(
        const GpuBatch& batch,
        const ProbePolicy& policy) const {
    policy.check();
    FAISS_THROW_IF_NOT_FMT(
            policy.refine == 1,
            "policy.refine = %g: on the device keys are not ranked by codes",
            policy.refine);
    for (const BatchRow& row : batch.state_->rows) {
        policy.share(0, row.nlist); // fits, or throws
    }
}

const ProbePolicy& GpuAttentionAdapter::check_attend(
        const GpuBatch& batch,
        const void* queries,
        const AttendOutput& out,
        const ProbePolicy* policy) const {
    const ProbePolicy& chosen = policy ? *policy : params_.policy;
    check();
    check_batch(batch, true);
    check_output(batch, queries, out);
    check_policy(batch, chosen);
    return chosen;
}

void GpuAttentionAdapter::start_route(
        const GpuBatch& batch,
        const void* queries,
        const GpuProbedCells& probed,
        const ProbePolicy& policy,
        bool plans,
        cudaStream_t stream) const {
    const GpuBatch::State& b = *batch.state_;
    RouteParams p;
    p.items = b.d_items;
    p.lists = b.d_lists;
    p.rows = b.d_rows;
    p.teams = b.d_teams;
    p.team_rows = b.d_team_rows;
    p.nteam = b.nteam;
    p.team_blocks = b.team_blocks;
    p.most_team_rows = b.most_team_rows;
    p.most_cells = b.most_cells;
    p.most_cols = b.most_cols;
    p.most_post = b.most_post;
    p.most_width = b.most_width;
    p.room = route_room_;
    p.heads_q = params_.heads_q;
    p.heads_kv = params_.heads_kv;
    p.d = params_.d;
    p.sink = params_.sink;
    p.window = params_.window;
    p.position_offset = params_.position_offset;
    p.dense_below = params_.dense_below;
    p.scale = params_.scale;
    p.queries = queries;
    p.bf16 = b.dtype == DType::bfloat16;
    p.scores = b.scores;
    p.share_group = policy.share_group;
    p.nprobe = policy.nprobe;
    p.max_keys = policy.max_keys;
    p.max_selectivity = policy.max_selectivity;
    p.nsplit = static_cast<int>(policy.split.size());
    std::copy(policy.split.begin(), policy.split.end(), p.split);
    p.stride = probed.stride;
    p.cells = probed.cells;
    p.count = probed.count;
    p.attend_dense = params_.attend_dense;
    if (plans) {
        p.work = b.work;
    }
    p.flag = fault_->device;
    FAISS_SAAP_CUDA_CHECK(gpu::route(p, stream));
}

void GpuAttentionAdapter::route(
        const GpuBatch& batch,
        const void* queries,
        const GpuProbedCells& probed,
        const ProbePolicy* policy,
        cudaStream_t stream) const {
    check();
    check_batch(batch, true);
    const ProbePolicy& chosen = policy ? *policy : params_.policy;
    const GpuBatch::State& b = *batch.state_;
    FAISS_THROW_IF_NOT_FMT(
            probed.share_group == chosen.share_group,
            "probed.share_group = %d, the policy's is %d",
            probed.share_group,
            chosen.share_group);
    if (b.tokens == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_FMT(
            probed.stride >= b.stride,
            "probed.stride = %" PRId64 ", a KV head has up to %" PRId64 " cells",
            probed.stride,
            b.stride);
    FAISS_THROW_IF_NOT_MSG(probed.cells, "probed.cells is null");
    FAISS_THROW_IF_NOT_MSG(probed.count, "probed.count is null");
    check_policy(batch, chosen);
    FAISS_THROW_IF_NOT_MSG(queries, "queries is null");
    DeviceScope scope(device_);
    start_route(
            batch,
            queries,
            probed,
            chosen,
            /*plans=*/false,
            stream);
}

void GpuAttentionAdapter::attend_preassigned(
        const GpuBatch& batch,
        const void* queries,
        const GpuProbedCells& probed,
        const AttendOutput& out,
        cudaStream_t stream) const {
    check();
    check_batch(batch, true);
    check_output(batch, queries, out);
    DeviceScope scope(device_);
    start_attend(batch, queries, probed, /*planned=*/false, out, stream);
}

void GpuAttentionAdapter::check_output(
        const GpuBatch& batch,
        const void* queries,
        const AttendOutput& out) const {
    if (batch.tokens() == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(queries, "queries is null");
    FAISS_THROW_IF_NOT_FMT(
            reinterpret_cast<intptr_t>(queries) % 16 == 0,
            "queries = %p must be a multiple of 16",
            queries);
    FAISS_THROW_IF_NOT_MSG(out.output, "output is null");
    FAISS_THROW_IF_NOT_FMT(
            reinterpret_cast<intptr_t>(out.output) % 16 == 0,
            "output = %p must be a multiple of 16",
            static_cast<void*>(out.output));
    FAISS_THROW_IF_NOT_MSG(
            out.lse || !out.merge, "lse is null, but merging needs it");
}

void GpuAttentionAdapter::start_attend(
        const GpuBatch& batch,
        const void* queries,
        const GpuProbedCells& probed,
        bool planned,
        const AttendOutput& out,
        cudaStream_t stream) const {
    const GpuBatch::State& b = *batch.state_;
    if (b.tokens == 0) {
        return;
    }
    FAISS_THROW_IF_NOT_MSG(probed.cells, "probed.cells is null");
    FAISS_THROW_IF_NOT_MSG(probed.count, "probed.count is null");
    FAISS_THROW_IF_NOT_FMT(
            probed.stride >= 1,
            "probed.stride = %" PRId64 " must be at least 1",
            probed.stride);
    AttendParams p;
    p.items = b.d_items;
    p.rows = b.d_rows;
    p.nrow = static_cast<int>(b.rows.size());
    p.most_cells = b.most_cells;
    p.heads_q = params_.heads_q;
    p.heads_kv = params_.heads_kv;
    p.d = params_.d;
    p.sink = params_.sink;
    p.window = params_.window;
    p.scale = params_.scale;
    p.attend_dense = params_.attend_dense;
    p.bf16 = b.dtype == DType::bfloat16;
    p.queries = queries;
    p.share_group = probed.share_group;
    p.stride = probed.stride;
    p.cells = probed.cells;
    p.count = probed.count;
    p.work = b.work;
    p.blocks = processors_;
    p.part = b.part;
    p.part_lse = b.part_lse;
    p.pieces = p.nrow * (p.share_group ? 1 : group_) + processors_;
    p.out = out;
    p.flag = fault_->device;
    if (!planned) {
        FAISS_SAAP_CUDA_CHECK(gpu::plan_rows(p, stream));
    }
    FAISS_SAAP_CUDA_CHECK(gpu::attend(p, stream));
}

void GpuAttentionAdapter::start_decode(
        const GpuBatch& batch,
        const void* queries,
        const AttendOutput& out,
        const ProbePolicy& policy,
        bool appends,
        cudaStream_t stream) const {
    const GpuBatch::State& b = *batch.state_;
    DecodeParams p = b.decode;
    p.queries = queries;
    p.appends = appends;
    p.nprobe = policy.nprobe;
    p.max_keys = policy.max_keys;
    p.max_selectivity = policy.max_selectivity;
    p.share = policy.share(0, 1);
    p.out = out;
    FAISS_SAAP_CUDA_CHECK(gpu::decode(p, stream));
}

void GpuAttentionAdapter::attend(
        const GpuBatch& batch,
        const void* queries,
        const AttendOutput& out,
        const ProbePolicy* policy,
        cudaStream_t stream) const {
    const ProbePolicy& chosen = check_attend(batch, queries, out, policy);
    DeviceScope scope(device_);
    if (batch.state_->decodes(chosen)) {
        start_decode(batch, queries, out, chosen, /*appends=*/false, stream);
        return;
    }
    GpuProbedCells probed = batch.state_->probed;
    probed.share_group = chosen.share_group;
    start_route(batch, queries, probed, chosen, /*plans=*/true, stream);
    start_attend(batch, queries, probed, /*planned=*/true, out, stream);
}

void GpuAttentionAdapter::step(
        const GpuBatch& batch,
        const void* queries,
        const AttendOutput& out,
        const ProbePolicy* policy,
        cudaStream_t stream) {
    const ProbePolicy& chosen = check_attend(batch, queries, out, policy);
    DeviceScope scope(device_);
    if (batch.state_->decodes(chosen)) {
        prepare_append(batch, stream);
        start_decode(batch, queries, out, chosen, /*appends=*/true, stream);
        return;
    }
    append(batch, stream);
    attend(batch, queries, out, &chosen, stream);
}

GpuListsCopy GpuAttentionAdapter::lists(
        int64_t sequence,
        int kv_head,
        int partition,
        cudaStream_t stream) const {
    const int n = npartition(sequence, kv_head);
    FAISS_THROW_IF_NOT_FMT(
            partition >= 0 && partition < n,
            "partition = %d, KV head %d has %d",
            partition,
            kv_head,
            n);
    const Sequence& s = at(sequence);
    const ListState& l = s.lists[s.first_list[kv_head] + partition];
    DeviceScope scope(device_);
    std::vector<int32_t> count(l.ncell), slots(arena_size(s.capacity, l.ncell));
    std::vector<uint32_t> extents(size_t(l.ncell) * kExtents);
    GpuListsCopy lists;
    lists.means.resize(l.means ? size_t(l.ncell) * params_.d : 0);
    const auto fetch = [&](auto& to, const void* from) {
        copy(to.data(),
             from,
             to.size() * sizeof(to[0]),
             cudaMemcpyDeviceToHost,
             stream);
    };
    fetch(count, l.count);
    fetch(extents, l.extents);
    fetch(slots, l.slots);
    fetch(lists.means, l.means);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int c = 0; c < l.ncell; c++) {
        std::vector<int32_t> of_cell;
        for (int32_t i = 0; i < count[c]; i++) {
            const int e = extent_of(i);
            of_cell.push_back(
                    slots[extents[size_t(c) * kExtents + e] + i - extent_begin(e)]);
        }
        lists.slots.push_back(std::move(of_cell));
    }
    return lists;
}

} // namespace faiss_saap::gpu
