#include <faiss_saap/AttentionAdapter.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>
#include <string>
#include <unordered_set>
#include <utility>

#include <faiss_saap/faiss_compat.h>

#include "adapter_state.h"
#include "check.h"
#include "parallel_for.h"

namespace faiss_saap {

namespace {

/// One partition for each head.
HeadPartitions one_each(const std::vector<Partition>& partitions) {
    HeadPartitions heads;
    for (const Partition& p : partitions) {
        heads.push_back({p});
    }
    return heads;
}

void check_partitions(const AdapterParams& p, const HeadPartitions& heads) {
    FAISS_THROW_IF_NOT_FMT(
            heads.size() == static_cast<size_t>(p.heads_kv),
            "partitions for %zd heads, but heads_kv = %d",
            heads.size(),
            p.heads_kv);
    for (size_t h = 0; h < heads.size(); h++) {
        for (const Partition& partition : heads[h]) {
            partition.check();
            FAISS_THROW_IF_NOT_FMT(
                    partition.d() == p.d,
                    "a partition of KV head %zd has d = %d, the adapter has "
                    "d = %d",
                    h,
                    partition.d(),
                    p.d);
            const int group = partition.query->group;
            FAISS_THROW_IF_NOT_FMT(
                    group == 0 || group == p.heads_q / p.heads_kv,
                    "a partition of KV head %zd has a query assigner for %d query "
                    "heads, the adapter has heads_q / heads_kv = %d",
                    h,
                    group,
                    p.heads_q / p.heads_kv);
            const unsigned needs =
                    partition.key->needs | partition.query->needs;
            if (!(needs & NEEDS_PRE_ROPE)) {
                continue;
            }
            FAISS_THROW_IF_NOT_FMT(
                    partition.rope.d != 0,
                    "a partition of KV head %zd reads pre-RoPE vectors but has "
                    "no RoPE parameters; a model without rotation has the same "
                    "vectors post-RoPE",
                    h);
            FAISS_THROW_IF_NOT_FMT(
                    partition.rope.d == p.d,
                    "a partition of KV head %zd has rope.d = %d: partial rotary "
                    "embeddings (here of d = %d) are not supported",
                    h,
                    partition.rope.d,
                    p.d);
            RotaryEmbedding checked(partition.rope);
        }
    }
}

} // namespace

AttentionAdapter::AttentionAdapter(
        const AdapterParams& params,
        HeadPartitions partitions)
        : params_(params), partitions_(std::move(partitions)) {
    AdapterParams& p = params_;
    FAISS_THROW_IF_NOT_FMT(
            p.heads_kv >= 1, "heads_kv = %d must be at least 1", p.heads_kv);
    FAISS_THROW_IF_NOT_FMT(
            p.heads_q >= 1 && p.heads_q % p.heads_kv == 0,
            "heads_q = %d must be a multiple of heads_kv = %d",
            p.heads_q,
            p.heads_kv);
    FAISS_THROW_IF_NOT_FMT(p.d >= 1, "d = %d must be at least 1", p.d);
    FAISS_THROW_IF_NOT_FMT(
            p.sink >= 0 && p.sink <= INT32_MAX,
            "sink = %" PRId64 " must be between 0 and 2^31 - 1",
            p.sink);
    FAISS_THROW_IF_NOT_FMT(
            p.window >= 0 && p.window <= INT32_MAX,
            "window = %" PRId64 " must be between 0 and 2^31 - 1",
            p.window);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(p.scale) && p.scale >= 0,
            "scale = %f must be positive, or 0 for 1 / sqrt(d)",
            p.scale);
    FAISS_THROW_IF_NOT_FMT(
            p.position_offset >= 0 && p.position_offset <= int64_t(1) << 40,
            "position_offset = %" PRId64 " must be between 0 and 2^40",
            p.position_offset);
    FAISS_THROW_IF_NOT_FMT(
            p.dense_below >= 0,
            "dense_below = %" PRId64 " must not be negative",
            p.dense_below);
    check_policy(p.policy);
    if (p.scale == 0) {
        p.scale = 1 / std::sqrt(static_cast<float>(p.d));
    }
    group_ = p.heads_q / p.heads_kv;
    if (!partitions_.empty()) {
        check_partitions(p, partitions_);
    }
    for (int h = 0; h < p.heads_kv; h++) {
        pools_.push_back(std::make_shared<SlotPool>());
    }
}

AttentionAdapter::AttentionAdapter(
        const AdapterParams& params,
        const std::vector<Partition>& partitions)
        : AttentionAdapter(params, one_each(partitions)) {}

void AttentionAdapter::check_policy(const ProbePolicy& policy) const {
    policy.check();
    FAISS_THROW_IF_NOT_FMT(
            policy.refine == 1 || params_.key_codes,
            "policy.refine = %g ranks keys by their codes, but the adapter was "
            "made with key_codes = false",
            policy.refine);
}

AttentionAdapter::~AttentionAdapter() = default;
AttentionAdapter::AttentionAdapter(AttentionAdapter&&) noexcept = default;
AttentionAdapter& AttentionAdapter::operator=(AttentionAdapter&&) noexcept =
        default;

AttentionAdapter::Sequence& AttentionAdapter::at(int64_t sequence) {
    return const_cast<Sequence&>(std::as_const(*this).at(sequence));
}

const AttentionAdapter::Sequence& AttentionAdapter::at(
        int64_t sequence) const {
    const auto found = sequences_.find(sequence);
    FAISS_THROW_IF_NOT_FMT(
            found != sequences_.end(),
            "sequence %" PRId64 " was %s",
            sequence,
            sequence >= 0 && sequence < next_sequence_ ? "freed"
                                                       : "never made");
    return *found->second;
}

int64_t AttentionAdapter::insert(std::unique_ptr<Sequence> sequence) {
    sequences_.emplace(next_sequence_, std::move(sequence));
    return next_sequence_++;
}

std::unique_ptr<AttentionAdapter::Sequence> AttentionAdapter::make_sequence(
        const HeadPartitions& own) const {
    FAISS_THROW_IF_NOT_MSG(
            !pools_.empty(), "this adapter was moved from: it has no sequences");
    if (!own.empty()) {
        check_partitions(params_, own);
    }
    auto sequence = std::make_unique<Sequence>();
    sequence->heads.resize(params_.heads_kv);
    sequence->codes.reserve(params_.key_codes ? params_.heads_kv : 0);
    for (int h = 0; h < params_.heads_kv; h++) {
        auto& head = sequence->heads[h];
        for (const HeadPartitions* from : {&partitions_, &own}) {
            for (size_t i = 0; !from->empty() && i < (*from)[h].size(); i++) {
                const Partition& p = (*from)[h][i];
                const unsigned needs = p.key->needs | p.query->needs;
                head.push_back(
                        {p,
                         needs & NEEDS_PRE_ROPE
                                 ? std::make_shared<const RotaryEmbedding>(
                                           p.rope)
                                 : nullptr,
                         CellLists(
                                 p.ncell(),
                                 params_.d,
                                 params_.sink,
                                 needs & NEEDS_STATS,
                                 pools_[h],
                                 needs & NEEDS_NEWEST_KEYS)});
            }
        }
        FAISS_THROW_IF_NOT_FMT(
                !head.empty(), "KV head %d has no partition", h);
        if (params_.key_codes) {
            sequence->codes.emplace_back(params_.d, params_.sink);
        }
    }
    return sequence;
}

int64_t AttentionAdapter::create(const HeadPartitions& own) {
    return insert(make_sequence(own));
}

int64_t AttentionAdapter::fork(int64_t sequence) {
    return insert(std::make_unique<Sequence>(at(sequence)));
}

void AttentionAdapter::free(int64_t sequence) {
    at(sequence);
    sequences_.erase(sequence);
}

void AttentionAdapter::reset(int64_t sequence) {
    auto empty = std::make_unique<Sequence>(at(sequence));
    for (auto& head : empty->heads) {
        for (auto& listed : head) {
            listed.lists = CellLists(
                    listed.lists.ncell(),
                    params_.d,
                    params_.sink,
                    listed.lists.with_means(),
                    listed.lists.pool(),
                    listed.lists.with_newest_keys());
        }
    }
    for (KeyCodes& codes : empty->codes) {
        codes = KeyCodes(params_.d, params_.sink);
    }
    empty->length = 0;
    sequences_[sequence].swap(empty);
}

int64_t AttentionAdapter::length(int64_t sequence) const {
    return at(sequence).length;
}

int AttentionAdapter::npartition(int64_t sequence, int kv_head) const {
    const Sequence& s = at(sequence);
    FAISS_THROW_IF_NOT_FMT(
            kv_head >= 0 && kv_head < params_.heads_kv,
            "kv_head = %d, the adapter has heads_kv = %d",
            kv_head,
            params_.heads_kv);
    return static_cast<int>(s.heads[kv_head].size());
}

const Partition& AttentionAdapter::partition(
        int64_t sequence,
        int kv_head,
        int partition) const {
    const int n = npartition(sequence, kv_head);
    FAISS_THROW_IF_NOT_FMT(
            partition >= 0 && partition < n,
            "partition = %d, KV head %d has %d",
            partition,
            kv_head,
            n);
    return at(sequence).heads[kv_head][partition].partition;
}

const CellLists& AttentionAdapter::lists(
        int64_t sequence,
        int kv_head,
        int partition) const {
    this->partition(sequence, kv_head, partition);
    return at(sequence).heads[kv_head][partition].lists;
}

const KeyCodes& AttentionAdapter::codes(int64_t sequence, int kv_head) const {
    npartition(sequence, kv_head); // throws for a head that is not there
    FAISS_THROW_IF_NOT_MSG(
            params_.key_codes, "the adapter was made with key_codes = false");
    return at(sequence).codes[kv_head];
}

size_t AttentionAdapter::bytes_used() const {
    size_t bytes = 0;
    std::unordered_set<const void*> counted;
    for (const auto& pool : pools_) {
        bytes += pool->bytes_used();
    }
    for (const auto& entry : sequences_) {
        bytes += sizeof(Sequence);
        for (const KeyCodes& codes : entry.second->codes) {
            bytes += codes.bytes_used(&counted);
        }
        for (const auto& head : entry.second->heads) {
            bytes += sizeof(head) +
                    (head.capacity() - head.size()) * sizeof(head[0]);
            for (const auto& listed : head) {
                bytes += sizeof(listed) - sizeof(listed.lists) +
                        listed.lists.bytes_used(&counted);
            }
        }
    }
    return bytes;
}

void AttentionAdapter::check_view(const KvView& kv, int64_t length) const {
    kv.check();
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
            kv.length >= length,
            "kv.length = %" PRId64 ", %" PRId64 " tokens are needed",
            kv.length,
            length);
}

RoutedVectors::RoutedVectors(
        const RotaryEmbedding* rotary,
        const CellAssigner& assigner,
        int64_t n,
        const float* post_rope,
        std::vector<int64_t> positions)
        : position_(std::move(positions)) {
    input.n = n;
    input.d = assigner.d;
    input.post_rope = post_rope;
    input.position = position_.data();
    if (assigner.needs & NEEDS_HEAD) {
        head_.resize(n);
        std::iota(head_.begin(), head_.end(), 0);
        input.head = head_.data();
    }
    if (assigner.needs & NEEDS_PRE_ROPE) {
        pre_rope_.assign(post_rope, post_rope + n * assigner.d);
        rotary->derotate(n, position_.data(), pre_rope_.data());
        input.pre_rope = pre_rope_.data();
    }
}

namespace {

/// Calls body(first, n, keys) for blocks of the keys in slots begin .. end - 1,
/// which bounds the memory of a long prefill.
template <class Body>
void for_key_blocks(
        const KvView& kv,
        int h,
        int64_t begin,
        int64_t end,
        const Body& body) {
    constexpr int64_t kBlock = 4096;
    std::vector<float> keys(std::min(kBlock, end - begin) * kv.d);
    for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t n = std::min(kBlock, end - first);
        for (int64_t i = 0; i < n; i++) {
            to_float(
                    kv.dtype, kv.key(h, first + i), kv.d, keys.data() + i * kv.d);
        }
        body(first, n, keys.data());
    }
}

void check_keys(const KvView& kv, int h, int64_t begin, int64_t end) {
    for_key_blocks(
            kv, h, begin, end, [&](int64_t first, int64_t n, const float* keys) {
                for (int64_t i = 0; i < n; i++) {
                    if (!finite_norm(keys + i * kv.d, kv.d)) {
                        const std::string name = "key of slot " +
                                std::to_string(first + i) + ", head " +
                                std::to_string(h) + ": key";
                        check_finite(keys + i * kv.d, 1, kv.d, name.c_str());
                    }
                }
            });
}

} // namespace

void AttentionAdapter::append(int64_t sequence, const KvView& kv) {
    Sequence& s = at(sequence);
    check_view(kv, s.length);
    // Tokens that have left the window since the last call.
    const int64_t begin = std::max(params_.sink, s.length - params_.window);
    const int64_t end = std::max(params_.sink, kv.length - params_.window);
    // Cells first, for all heads and partitions: assigning may throw.
    std::vector<std::vector<std::vector<int32_t>>> cells(params_.heads_kv);
    parallel_for(params_.heads_kv, [&](int64_t head) {
        const int h = static_cast<int>(head);
        check_keys(kv, h, s.length, kv.length);
        for (const auto& listed : s.heads[h]) {
            const CellAssigner& assigner = *listed.partition.key;
            std::vector<int32_t> to(end - begin);
            for_key_blocks(
                    kv,
                    h,
                    begin,
                    end,
                    [&](int64_t first, int64_t n, const float* keys) {
                        std::vector<int64_t> positions(n);
                        std::iota(
                                positions.begin(),
                                positions.end(),
                                first + params_.position_offset);
                        const RoutedVectors routed(
                                listed.rotary.get(),
                                assigner,
                                n,
                                keys,
                                std::move(positions));
                        assigner.assign(
                                routed.input,
                                nullptr,
                                1,
                                to.data() + (first - begin),
                                nullptr);
                    });
            for (int64_t i = 0; i < end - begin; i++) {
                FAISS_THROW_IF_NOT_FMT(
                        to[i] >= 0 && to[i] < assigner.ncell,
                        "the key assigner of head %d puts slot %" PRId64
                        " into cell %d, there are %d cells",
                        h,
                        begin + i,
                        to[i],
                        assigner.ncell);
            }
            cells[h].push_back(std::move(to));
        }
    });
    const auto list = [&](int h) {
        if (params_.key_codes) {
            for_key_blocks(
                    kv,
                    h,
                    begin,
                    end,
                    [&](int64_t, int64_t n, const float* keys) {
                        for (int64_t i = 0; i < n; i++) {
                            s.codes[h].append(keys + i * kv.d);
                        }
                    });
        }
        for (size_t p = 0; p < s.heads[h].size(); p++) {
            CellLists& lists = s.heads[h][p].lists;
            const auto& to = cells[h][p];
            if (!lists.with_means() && !lists.with_newest_keys()) {
                for (int64_t i = begin; i < end; i++) {
                    lists.append(
                            to[i - begin], nullptr, i + params_.position_offset);
                }
                continue;
            }
            for_key_blocks(
                    kv,
                    h,
                    begin,
                    end,
                    [&](int64_t first, int64_t n, const float* keys) {
                        for (int64_t i = 0; i < n; i++) {
                            lists.append(
                                    to[first + i - begin],
                                    keys + i * kv.d,
                                    first + i + params_.position_offset);
                        }
                    });
        }
    };
    try {
        parallel_for(params_.heads_kv, [&](int64_t h) {
            list(static_cast<int>(h));
        });
    } catch (...) { // out of memory
        for (int h = 0; h < params_.heads_kv; h++) {
            truncate_lists(s, h, begin - params_.sink, kv);
        }
        throw;
    }
    s.length = kv.length;
}

void AttentionAdapter::truncate_lists(
        Sequence& sequence,
        int h,
        int64_t size,
        const KvView& kv) const {
    if (params_.key_codes && sequence.codes[h].size() > size) {
        sequence.codes[h].truncate(size);
    }
    for (auto& listed : sequence.heads[h]) {
        if (listed.lists.size() > size) {
            listed.lists.truncate(size, [&](int64_t slot, float* key) {
                to_float(kv.dtype, kv.key(h, slot), kv.d, key);
            });
        }
    }
}

void AttentionAdapter::truncate(
        int64_t sequence,
        int64_t length,
        const KvView& kv) {
    Sequence& s = at(sequence);
    FAISS_THROW_IF_NOT_FMT(
            length >= 0 && length <= s.length,
            "length = %" PRId64 " must be between 0 and the %" PRId64
            " tokens of sequence %" PRId64,
            length,
            s.length,
            sequence);
    check_view(kv, length);
    const int64_t size =
            std::max(params_.sink, length - params_.window) - params_.sink;
    parallel_for(params_.heads_kv, [&](int64_t h) {
        truncate_lists(s, static_cast<int>(h), size, kv);
    });
    s.length = length;
}

HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        int ncell,
        const KMeansParams& params) {
    FAISS_THROW_IF_NOT_FMT(ncell >= 1, "ncell = %d must be at least 1", ncell);
    kv.check_shape();
    return sequence_partitions(
            kv, begin, end, std::vector<int>(kv.heads, ncell), params);
}

HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        const std::vector<int>& ncell,
        const KMeansParams& params) {
    kv.check();
    FAISS_THROW_IF_NOT_FMT(
            begin >= 0 && begin <= end && end <= kv.length,
            "slots %" PRId64 " .. %" PRId64
            " - 1 are outside the view, which has %" PRId64,
            begin,
            end,
            kv.length);
    FAISS_THROW_IF_NOT_FMT(
            ncell.size() == static_cast<size_t>(kv.heads),
            "ncell has %zd entries, the view has %d KV heads",
            ncell.size(),
            kv.heads);
    HeadPartitions heads(kv.heads);
    std::vector<float> keys((end - begin) * kv.d);
    for (int h = 0; h < kv.heads; h++) {
        if (ncell[h] == 0) {
            continue;
        }
        for (int64_t i = begin; i < end; i++) {
            to_float(
                    kv.dtype,
                    kv.key(h, i),
                    kv.d,
                    keys.data() + (i - begin) * kv.d);
        }
        heads[h].push_back(kmeans_partition(
                end - begin,
                kv.d,
                keys.data(),
                ncell[h],
                NEEDS_POST_ROPE,
                params));
    }
    return heads;
}

} // namespace faiss_saap
