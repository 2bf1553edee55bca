#include <faiss_saap/AttentionAdapter.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>
#include <string>

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
        if (needs & NEEDS_PRE_ROPE) {
            FAISS_THROW_IF_NOT_FMT(
                    partition.rope.d != 0,
                    "partitions[%zd] reads pre-RoPE vectors but has no RoPE "
                    "parameters; a model without rotation has the same vectors "
                    "post-RoPE",
                    h);
            FAISS_THROW_IF_NOT_FMT(
                    partition.rope.d == p.d,
                    "partitions[%zd].rope.d = %d: partial rotary embeddings "
                    "(here of d = %d) are not supported",
                    h,
                    partition.rope.d,
                    p.d);
            rotary_.push_back(
                    std::make_shared<const RotaryEmbedding>(partition.rope));
        } else {
            rotary_.push_back(nullptr);
        }
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
    std::vector<int32_t> head;
    std::vector<float> pre_rope;
    RoutingInput input;

    Routed(const RotaryEmbedding* rotary,
           const CellAssigner& assigner,
           int64_t n,
           const float* post_rope,
           std::vector<int64_t> positions)
            : position(std::move(positions)) {
        input.n = n;
        input.d = assigner.d;
        input.post_rope = post_rope;
        input.position = position.data();
        if (assigner.needs & NEEDS_HEAD) { // then the vectors are a group
            head.resize(n);
            std::iota(head.begin(), head.end(), 0);
            input.head = head.data();
        }
        if (assigner.needs & NEEDS_PRE_ROPE) {
            pre_rope.assign(post_rope, post_rope + n * assigner.d);
            rotary->derotate(n, position.data(), pre_rope.data());
            input.pre_rope = pre_rope.data();
        }
    }
};

} // namespace

std::vector<int32_t> AttentionAdapter::assign_keys(
        const KvView& kv,
        int h,
        int64_t begin,
        int64_t end) const {
    constexpr int64_t kBlock = 4096; // bounds the memory of a long prefill
    const int64_t d = params_.d;
    const CellAssigner& assigner = *partitions_[h].key;
    std::vector<int32_t> cells(end - begin);
    std::vector<float> keys(std::min(kBlock, end - begin) * d);
    for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t n = std::min(kBlock, end - first);
        std::vector<int64_t> position(n);
        for (int64_t i = 0; i < n; i++) {
            position[i] = first + i + params_.position_offset;
            to_float(kv.dtype, kv.key(h, first + i), d, keys.data() + i * d);
        }
        const Routed routed(
                rotary_[h].get(), assigner, n, keys.data(), std::move(position));
        int32_t* out = cells.data() + (first - begin);
        assigner.assign(routed.input, nullptr, 1, out, nullptr);
        for (int64_t i = 0; i < n; i++) {
            FAISS_THROW_IF_NOT_FMT(
                    out[i] >= 0 && out[i] < assigner.ncell,
                    "the key assigner of head %d puts slot %" PRId64
                    " into cell %d, there are %d cells",
                    h,
                    first + i,
                    out[i],
                    assigner.ncell);
        }
    }
    return cells;
}

void AttentionAdapter::append(const KvView& kv) {
    check_view(kv);
    const int64_t d = params_.d;
    parallel_for(params_.heads_kv, [&](int64_t h) {
        std::vector<float> key(d);
        for (int64_t slot = length_; slot < kv.length; slot++) {
            to_float(kv.dtype, kv.key(h, slot), d, key.data());
            if (!finite_norm(key.data(), d)) {
                const std::string name = "key of slot " + std::to_string(slot) +
                        ", head " + std::to_string(h) + ": key";
                check_finite(key.data(), 1, d, name.c_str());
            }
        }
    });

    // Tokens that have left the window since the last call.
    const int64_t begin = std::max(params_.sink, length_ - params_.window);
    const int64_t end = std::max(params_.sink, kv.length - params_.window);
    // Cells first, for all heads: assigning may throw, listing does not.
    std::vector<std::vector<int32_t>> cells(params_.heads_kv);
    parallel_for(params_.heads_kv, [&](int64_t h) {
        cells[h] = assign_keys(kv, static_cast<int>(h), begin, end);
    });
    parallel_for(params_.heads_kv, [&](int64_t h) {
        const bool means = partitions_[h].query->needs & NEEDS_STATS;
        std::vector<float> key(d);
        for (int64_t slot = begin; slot < end; slot++) {
            if (means) {
                to_float(kv.dtype, kv.key(h, slot), d, key.data());
            }
            lists_[h].append(
                    cells[h][slot - begin],
                    means ? key.data() : nullptr,
                    slot + params_.position_offset);
        }
    });
    length_ = kv.length;
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
        FAISS_THROW_IF_NOT_FMT(
                positions[t] >= params_.position_offset &&
                        positions[t] < params_.position_offset + length_,
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

std::vector<int32_t> AttentionAdapter::far_slots(
        int kv_head,
        const Zones& z,
        const int32_t* cells,
        const int32_t* cells_end,
        int64_t* distinct) const {
    // A bitmap puts the slots into ascending order, which is kinder to the
    // memory system, in one pass over the lists.
    const CellLists& lists = lists_[kv_head];
    std::vector<uint64_t> bits((z.far_keys() + 63) / 64, 0);
    std::vector<bool> seen(lists.ncell(), false);
    int64_t n = 0;
    *distinct = 0;
    for (; cells != cells_end; ++cells) {
        if (seen[*cells]) {
            continue;
        }
        seen[*cells] = true;
        ++*distinct;
        const auto& list = lists.slots(*cells);
        const int64_t count = lists.count_before(*cells, z.window_begin);
        n += count;
        for (int64_t i = 0; i < count; i++) {
            const uint64_t at = list[i] - z.sink_end;
            bits[at / 64] |= uint64_t(1) << (at % 64);
        }
    }
    std::vector<int32_t> slots;
    slots.reserve(n);
    for (size_t w = 0; w < bits.size(); w++) {
        for (uint64_t left = bits[w]; left; left &= left - 1) {
            slots.push_back(static_cast<int32_t>(
                    z.sink_end + 64 * w + __builtin_ctzll(left)));
        }
    }
    return slots;
}

namespace {

constexpr int64_t kPiece = 4096;

/// Slots begin .. end - 1, of the cache or of a row's chosen ones.
struct Piece {
    enum Kind { dense, chosen };
    int64_t row;
    Kind kind;
    int64_t begin, end;
};

void cut(
        int64_t row,
        Piece::Kind kind,
        int64_t begin,
        int64_t end,
        std::vector<Piece>& pieces) {
    for (; begin < end; begin += kPiece) {
        pieces.push_back({row, kind, begin, std::min(begin + kPiece, end)});
    }
}

} // namespace

/// What one row of probed cells reads.
struct AttentionAdapter::Row {
    int kv_head = 0;
    Zones zones{};
    int64_t cells = 0;
    std::vector<int32_t> slots;
};

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
                rotary_[h].get(),
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
    FAISS_THROW_IF_NOT_FMT(
            positions || kv.length == length_,
            "kv.length = %" PRId64 ", but %" PRId64
            " tokens were appended: append first, or give positions",
            kv.length,
            length_);
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

    // Every row is cut into pieces of at most kPiece slots, so that one long
    // sequence occupies all cores; partial results merge exactly.
    const int nq = probed.share_group ? group_ : 1; // query heads of a row
    std::vector<Row> all(rows);
    parallel_for(rows, [&](int64_t r) {
        Row& row = all[r];
        row.kv_head = static_cast<int>(r / choices % params_.heads_kv);
        row.zones = zones(q_len, positions, r / (params_.heads_kv * choices));
        row.slots = far_slots(
                row.kv_head,
                row.zones,
                probed.cells.data() + probed.begin[r],
                probed.cells.data() + probed.begin[r + 1],
                &row.cells);
    });
    std::vector<Piece> pieces;
    for (int64_t r = 0; r < rows; r++) {
        const Zones& z = all[r].zones;
        if (params_.attend_dense) {
            cut(r, Piece::dense, 0, z.sink_end, pieces);
            cut(r, Piece::dense, z.window_begin, z.window_end, pieces);
        }
        cut(r,
            Piece::chosen,
            0,
            static_cast<int64_t>(all[r].slots.size()),
            pieces);
    }
    const auto count = static_cast<int64_t>(pieces.size());
    std::vector<float> part(count * nq * kv.d_v), part_lse(count * nq);
    parallel_for(count, [&](int64_t i) {
        const Piece& p = pieces[i];
        const Row& row = all[p.row];
        const float* q = queries + p.row * nq * params_.d;
        float* o = part.data() + i * nq * kv.d_v;
        float* l = part_lse.data() + i * nq;
        if (p.kind == Piece::dense) {
            attend_range(
                    kv, row.kv_head, nq, q, params_.scale, p.begin, p.end, o, l);
        } else {
            attend_slots(
                    kv,
                    row.kv_head,
                    nq,
                    q,
                    params_.scale,
                    p.end - p.begin,
                    row.slots.data() + p.begin,
                    o,
                    l);
        }
    });

    const int64_t results = rows * nq; // q_len * heads_q
    std::fill(output, output + results * kv.d_v, 0.0f);
    std::vector<float> total(results, -INFINITY), dense(results, -INFINITY);
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = pieces[i].row * nq;
        const float* l = part_lse.data() + i * nq;
        merge_states(
                nq,
                kv.d_v,
                output + first * kv.d_v,
                total.data() + first,
                part.data() + i * nq * kv.d_v,
                l);
        for (int h = 0; pieces[i].kind == Piece::dense && h < nq; h++) {
            dense[first + h] = merge_weights(dense[first + h], l[h]).lse;
        }
    }
    for (int64_t i = 0; i < results; i++) {
        if (lse) {
            lse[i] = total[i];
        }
        if (stats) {
            const Row& row = all[i / nq];
            stats[i].cells = row.cells;
            stats[i].keys_read = static_cast<int64_t>(row.slots.size());
            stats[i].far_keys = row.zones.far_keys();
            stats[i].dense_mass = total[i] == -INFINITY
                    ? 0.0f
                    : std::exp(dense[i] - total[i]);
        }
    }
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
