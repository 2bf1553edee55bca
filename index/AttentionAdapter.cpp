#include <faiss_saap/AttentionAdapter.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include <faiss_saap/attend_slots.h>
#include <faiss_saap/faiss_compat.h>
#include <faiss_saap/merge_states.h>

#include "check.h"
#include "parallel_for.h"

namespace faiss_saap {

/// What a query at one slot attends to: [0, sink_end) and [window_begin,
/// window_end) densely, the slots between them through cells.
struct AttentionAdapter::Zones {
    int64_t sink_end, window_begin, window_end;
    int64_t far_keys() const {
        return window_begin - sink_end;
    }
};

AttentionAdapter::AttentionAdapter(
        const AdapterParams& params,
        std::vector<Partition> partitions)
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
            std::isfinite(p.scale), "scale = %f must be finite", p.scale);
    FAISS_THROW_IF_NOT_FMT(
            p.position_offset >= 0,
            "position_offset = %" PRId64 " must not be negative",
            p.position_offset);
    FAISS_THROW_IF_NOT_FMT(
            p.dense_below >= 0,
            "dense_below = %" PRId64 " must not be negative",
            p.dense_below);
    p.policy.check();
    if (p.scale == 0) {
        p.scale = 1 / std::sqrt(static_cast<float>(p.d));
    }
    group_ = p.heads_q / p.heads_kv;

    FAISS_THROW_IF_NOT_FMT(
            partitions_.size() == static_cast<size_t>(p.heads_kv),
            "%zd partitions for heads_kv = %d",
            partitions_.size(),
            p.heads_kv);
    for (size_t h = 0; h < partitions_.size(); h++) {
        const Partition& partition = partitions_[h];
        partition.check();
        FAISS_THROW_IF_NOT_FMT(
                partition.d() == p.d,
                "partitions[%zd] has d = %d, the adapter has d = %d",
                h,
                partition.d(),
                p.d);
        const unsigned needs = partition.key->needs | partition.query->needs;
        FAISS_THROW_IF_NOT_FMT(
                !(needs & NEEDS_PRE_ROPE) || partition.rope.d == 0 ||
                        partition.rope.d == p.d,
                "partitions[%zd].rope.d = %d: partial rotary embeddings (here "
                "of d = %d) are not supported",
                h,
                partition.rope.d,
                p.d);
        lists_.emplace_back(
                partition.ncell(), p.d, p.sink, needs & NEEDS_STATS);
    }
}

size_t AttentionAdapter::bytes_used() const {
    size_t bytes = 0;
    for (const CellLists& l : lists_) {
        bytes += l.bytes_used();
    }
    return bytes;
}

void AttentionAdapter::check_view(const KvView& kv) const {
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
            kv.length >= length_,
            "kv.length = %" PRId64 ", the adapter has seen %" PRId64 " tokens",
            kv.length,
            length_);
}

namespace {

/// Keys or queries with the vectors that an assigner wants: pre-RoPE ones are
/// computed from post-RoPE ones.
struct Routed {
    std::vector<int64_t> position;
    std::vector<float> pre_rope;
    RoutingInput input;

    Routed(const Partition& partition,
           const CellAssigner& assigner,
           int64_t n,
           const float* post_rope,
           std::vector<int64_t> positions)
            : position(std::move(positions)) {
        input.n = n;
        input.d = assigner.d;
        input.post_rope = post_rope;
        input.position = position.data();
        if (assigner.needs & NEEDS_PRE_ROPE) {
            if (partition.rope.d == 0) {
                input.pre_rope = post_rope; // the model does not rotate
            } else {
                pre_rope.assign(post_rope, post_rope + n * assigner.d);
                RotaryEmbedding(partition.rope)
                        .derotate(n, position.data(), pre_rope.data());
                input.pre_rope = pre_rope.data();
            }
        }
    }
};

} // namespace

void AttentionAdapter::append(const KvView& kv) {
    check_view(kv);
    const int64_t d = params_.d;
    const int64_t fresh = kv.length - length_;
    parallel_for(params_.heads_kv, [&](int64_t h) {
        std::vector<float> key(d);
        for (int64_t slot = length_; slot < kv.length; slot++) {
            to_float(kv.dtype, kv.key(h, slot), d, key.data());
            const int64_t at = first_not_finite(key.data(), d);
            FAISS_THROW_IF_NOT_FMT(
                    at < 0,
                    "key of slot %" PRId64 ", head %" PRId64
                    ": component %" PRId64 " is %f",
                    slot,
                    h,
                    at,
                    double(key[at]));
        }
    });

    // Tokens that have left the window since the last call.
    const int64_t begin = std::max(params_.sink, length_ - params_.window);
    const int64_t end =
            std::max(params_.sink, length_ + fresh - params_.window);
    // Cells first, for all heads: assigning may throw, listing does not.
    std::vector<std::vector<int32_t>> cells(params_.heads_kv);
    std::vector<std::vector<float>> keys(params_.heads_kv);
    parallel_for(params_.heads_kv, [&](int64_t h) {
        const int64_t n = end - begin;
        cells[h].resize(n);
        keys[h].resize(n * d);
        std::vector<int64_t> position(n);
        for (int64_t i = 0; i < n; i++) {
            position[i] = begin + i + params_.position_offset;
            to_float(
                    kv.dtype,
                    kv.key(h, begin + i),
                    d,
                    keys[h].data() + i * d);
        }
        const Partition& partition = partitions_[h];
        const Routed routed(
                partition,
                *partition.key,
                n,
                keys[h].data(),
                std::move(position));
        partition.key->assign(
                routed.input, nullptr, 1, cells[h].data(), nullptr);
        for (int64_t i = 0; i < n; i++) {
            FAISS_THROW_IF_NOT_FMT(
                    cells[h][i] >= 0,
                    "the key assigner of head %" PRId64
                    " finds no cell for slot %" PRId64,
                    h,
                    begin + i);
        }
    });
    for (int h = 0; h < params_.heads_kv; h++) {
        for (int64_t i = 0; i < end - begin; i++) {
            lists_[h].append(
                    cells[h][i],
                    keys[h].data() + i * d,
                    begin + i + params_.position_offset);
        }
    }
    length_ += fresh;
}

void AttentionAdapter::check_queries(
        int64_t q_len,
        const float* queries,
        const int64_t* positions) const {
    FAISS_THROW_IF_NOT_FMT(
            q_len >= 0, "q_len = %" PRId64 " must not be negative", q_len);
    FAISS_THROW_IF_NOT_MSG(q_len == 0 || queries, "queries is null");
    FAISS_THROW_IF_NOT_FMT(
            positions || q_len <= length_,
            "q_len = %" PRId64 " exceeds the %" PRId64 " tokens seen",
            q_len,
            length_);
    for (int64_t t = 0; positions && t < q_len; t++) {
        const int64_t slot = positions[t] - params_.position_offset;
        FAISS_THROW_IF_NOT_FMT(
                slot >= 0 && slot < length_,
                "positions[%" PRId64 "] = %" PRId64
                " is outside the sequence, which covers %" PRId64
                " .. %" PRId64,
                t,
                positions[t],
                params_.position_offset,
                params_.position_offset + length_ - 1);
    }
    check_finite(
            queries, q_len * params_.heads_q, params_.d, "queries");
}

AttentionAdapter::Zones AttentionAdapter::zones(
        int64_t q_len,
        const int64_t* positions,
        int64_t token) const {
    const int64_t slot = positions
            ? positions[token] - params_.position_offset
            : length_ - q_len + token;
    Zones z;
    z.window_end = slot + 1;
    z.sink_end = std::min(params_.sink, z.window_end);
    z.window_begin = std::max(z.sink_end, z.window_end - params_.window);
    return z;
}

ProbedCells AttentionAdapter::route(
        int64_t q_len,
        const float* queries,
        const int64_t* positions,
        const ProbePolicy* policy) const {
    check_queries(q_len, queries, positions);
    const ProbePolicy& p = policy ? *policy : params_.policy;
    p.check();

    const int choices = p.share_group ? 1 : group_; // per KV head
    const int64_t rows = q_len * params_.heads_kv * choices;
    std::vector<std::vector<int32_t>> chosen(rows);
    parallel_for(q_len * params_.heads_kv, [&](int64_t task) {
        const int64_t t = task / params_.heads_kv;
        const int h = static_cast<int>(task % params_.heads_kv);
        const Partition& partition = partitions_[h];
        const CellLists& lists = lists_[h];
        const int ncell = partition.ncell();
        const Zones z = zones(q_len, positions, t);
        const int64_t far_keys = z.far_keys();
        if (far_keys == 0) {
            return;
        }
        std::vector<int64_t> counts(ncell);
        for (int c = 0; c < ncell; c++) {
            counts[c] = lists.count_before(c, z.window_begin);
        }

        const float* q = queries +
                (t * params_.heads_q + int64_t(h) * group_) * params_.d;
        const Routed routed(
                partition,
                *partition.query,
                group_,
                q,
                std::vector<int64_t>(
                        group_, z.window_end - 1 + params_.position_offset));
        std::vector<float> scores(size_t(group_) * ncell);
        const CellStats stats = lists.stats();
        partition.query->scores(routed.input, &stats, scores.data());
        if (p.share_group) {
            std::vector<float> shared(ncell);
            share_scores(
                    group_,
                    ncell,
                    scores.data(),
                    counts.data(),
                    params_.scale,
                    shared.data());
            scores = std::move(shared);
        }
        const bool all = far_keys <= params_.dense_below;
        for (int g = 0; g < choices; g++) {
            auto& row = chosen[task * choices + g];
            if (all) {
                for (int c = 0; c < ncell; c++) {
                    if (counts[c]) {
                        row.push_back(c);
                    }
                }
                continue;
            }
            row = take_cells(
                    ncell,
                    scores.data() + int64_t(g) * ncell,
                    counts.data(),
                    p.nprobe,
                    p.key_limit(far_keys),
                    /*at_least_one=*/true);
        }
    });

    ProbedCells probed;
    probed.share_group = p.share_group;
    probed.begin.push_back(0);
    for (const auto& row : chosen) {
        probed.cells.insert(probed.cells.end(), row.begin(), row.end());
        probed.begin.push_back(static_cast<int64_t>(probed.cells.size()));
    }
    return probed;
}

void AttentionAdapter::attend_preassigned(
        const KvView& kv,
        int64_t q_len,
        const float* queries,
        const int64_t* positions,
        const ProbedCells& probed,
        float* output,
        float* lse,
        AttendStats* stats) const {
    check_view(kv);
    check_queries(q_len, queries, positions);
    FAISS_THROW_IF_NOT_MSG(q_len == 0 || output, "output is null");
    const int choices = probed.share_group ? 1 : group_;
    const int64_t rows = q_len * params_.heads_kv * choices;
    FAISS_THROW_IF_NOT_FMT(
            probed.begin.size() == static_cast<size_t>(rows) + 1,
            "probed.begin has %zd entries, %" PRId64
            " rows need one more than that",
            probed.begin.size(),
            rows);
    for (int64_t r = 0; r < rows; r++) {
        FAISS_THROW_IF_NOT_FMT(
                0 <= probed.begin[r] &&
                        probed.begin[r] <= probed.begin[r + 1] &&
                        probed.begin[r + 1] <=
                                static_cast<int64_t>(probed.cells.size()),
                "probed.begin[%" PRId64 "] = %" PRId64 " is out of order",
                r,
                probed.begin[r]);
        const int h = static_cast<int>(r / choices % params_.heads_kv);
        for (int64_t i = probed.begin[r]; i < probed.begin[r + 1]; i++) {
            FAISS_THROW_IF_NOT_FMT(
                    probed.cells[i] >= 0 &&
                            probed.cells[i] < lists_[h].ncell(),
                    "probed.cells[%" PRId64 "] = %d, KV head %d has %d cells",
                    i,
                    probed.cells[i],
                    h,
                    lists_[h].ncell());
        }
    }

    const int heads_per_choice = probed.share_group ? group_ : 1;
    parallel_for(rows, [&](int64_t r) {
        const int64_t t = r / (params_.heads_kv * choices);
        const int h = static_cast<int>(r / choices % params_.heads_kv);
        const Zones z = zones(q_len, positions, t);
        const int64_t first = r * heads_per_choice; // of q_len * heads_q
        const float* q = queries + first * params_.d;
        float* out = output + first * kv.d_v;

        std::vector<int32_t> cells(
                probed.cells.begin() + probed.begin[r],
                probed.cells.begin() + probed.begin[r + 1]);
        std::sort(cells.begin(), cells.end());
        cells.erase(std::unique(cells.begin(), cells.end()), cells.end());
        std::vector<int32_t> slots;
        for (int32_t c : cells) {
            const auto& list = lists_[h].slots(c);
            slots.insert(
                    slots.end(),
                    list.begin(),
                    list.begin() + lists_[h].count_before(c, z.window_begin));
        }
        // Ascending addresses are kinder to the memory system.
        std::sort(slots.begin(), slots.end());

        const int nq = heads_per_choice;
        std::vector<float> part(size_t(nq) * kv.d_v), part_lse(nq), total(nq);
        attend_range(
                kv, h, nq, q, params_.scale, 0, z.sink_end, out, total.data());
        attend_range(
                kv,
                h,
                nq,
                q,
                params_.scale,
                z.window_begin,
                z.window_end,
                part.data(),
                part_lse.data());
        merge_states(
                nq, kv.d_v, out, total.data(), part.data(), part_lse.data());
        const std::vector<float> dense = total;
        attend_slots(
                kv,
                h,
                nq,
                q,
                params_.scale,
                static_cast<int64_t>(slots.size()),
                slots.data(),
                part.data(),
                part_lse.data());
        merge_states(
                nq, kv.d_v, out, total.data(), part.data(), part_lse.data());
        for (int i = 0; i < nq; i++) {
            if (lse) {
                lse[first + i] = total[i];
            }
            if (stats) {
                AttendStats& s = stats[first + i];
                s.cells = static_cast<int64_t>(cells.size());
                s.keys_read = static_cast<int64_t>(slots.size());
                s.far_keys = z.far_keys();
                s.dense_mass = std::exp(dense[i] - total[i]);
            }
        }
    });
}

void AttentionAdapter::attend(
        const KvView& kv,
        int64_t q_len,
        const float* queries,
        const int64_t* positions,
        float* output,
        float* lse,
        AttendStats* stats,
        const ProbePolicy* policy) const {
    check_view(kv);
    FAISS_THROW_IF_NOT_MSG(q_len <= 0 || output, "output is null");
    attend_preassigned(
            kv,
            q_len,
            queries,
            positions,
            route(q_len, queries, positions, policy),
            output,
            lse,
            stats);
}

} // namespace faiss_saap
