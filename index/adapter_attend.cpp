// What AttentionAdapter does with queries: route, then attend.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <memory>

#include <omp.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/faiss_compat.h>

#include "adapter_state.h"
#include "check.h"
#include "far_keys.h"
#include "parallel_for.h"
#include "partial_results.h"
#include "vector_kernels.h"

namespace faiss_saap {

/// A call of `route` or `attend`: a batch, its queries, and the tokens that ask.
struct AttentionAdapter::Call {
    /// A token of a batch, and what it attends to: [0, sink_end) and [window_begin,
    /// window_end) densely, the slots between them through cells.
    struct Token {
        const SequenceInput* from = nullptr;
        const Sequence* sequence = nullptr;
        int64_t sink_end = 0, window_begin = 0, window_end = 0;

        int64_t slot() const {
            return window_end - 1;
        }
        int64_t far_keys() const {
            return window_begin - sink_end;
        }
    };

    const AttentionAdapter& adapter;
    const std::vector<SequenceInput>& batch;
    const float* queries;
    std::vector<Token> tokens;
    const AdapterParams& params = adapter.params_;
    const int group = adapter.group_;

    /// Throws unless the batch is valid.
    Call(const AttentionAdapter& to,
         const std::vector<SequenceInput>& batch_in,
         const float* queries_in);
    void check_policy_of_heads(const ProbePolicy& policy) const;
    void check_views() const;
    void check_output(const AttendOutput& out) const;
    void check_probed(const ProbedCells& probed) const;

    int64_t ntoken() const {
        return static_cast<int64_t>(tokens.size());
    }
    const float* queries_of(int64_t token, int kv_head) const {
        return queries + (token * params.heads_q + kv_head * group) * params.d;
    }

    /// Cells that a KV head of a token probes, for each choice of the policy.
    std::vector<std::vector<int32_t>> probe(
            int64_t token,
            int kv_head,
            const ProbePolicy& policy) const;
    /// The far keys in some cells.
    FarKeys far_keys(
            int64_t token,
            int kv_head,
            const int32_t* cells,
            const int32_t* cells_end) const;
    /// Keeps the best of them for some query heads of the group, by their codes, where the
    /// policy ranks keys.
    void rank(
            int64_t token,
            int kv_head,
            int first_head,
            int nheads,
            const ProbePolicy& policy,
            FarKeys& far) const;
    /// Attends to sink, window and far keys.
    /// @param far  for each token and KV head one, or one for each query head
    void attend(const std::vector<FarKeys>& far, const AttendOutput& out) const;
};

AttentionAdapter::Call::Call(
        const AttentionAdapter& to,
        const std::vector<SequenceInput>& batch_in,
        const float* queries_in)
        : adapter(to), batch(batch_in), queries(queries_in) {
    for (const SequenceInput& in : batch) {
        const Sequence& s = adapter.at(in.sequence);
        FAISS_THROW_IF_NOT_FMT(
                in.q_len >= 0,
                "q_len = %" PRId64 " must not be negative",
                in.q_len);
        FAISS_THROW_IF_NOT_FMT(
                in.positions || in.q_len <= s.length,
                "q_len = %" PRId64 " exceeds the %" PRId64
                " tokens of sequence %" PRId64,
                in.q_len,
                s.length,
                in.sequence);
        for (int64_t t = 0; t < in.q_len; t++) {
            const int64_t first = params.position_offset;
            if (in.positions) {
                FAISS_THROW_IF_NOT_FMT(
                        in.positions[t] >= first &&
                                in.positions[t] < first + s.length,
                        "positions[%" PRId64 "] = %" PRId64
                        " is outside sequence %" PRId64
                        ", which covers %" PRId64 " .. %" PRId64,
                        t,
                        in.positions[t],
                        in.sequence,
                        first,
                        first + s.length - 1);
            }
            const int64_t slot = in.positions ? in.positions[t] - first
                                              : s.length - in.q_len + t;
            Token token;
            token.from = &in;
            token.sequence = &s;
            token.window_end = slot + 1;
            token.sink_end = std::min(params.sink, slot + 1);
            token.window_begin =
                    std::max(token.sink_end, slot + 1 - params.window);
            tokens.push_back(token);
        }
    }
    FAISS_THROW_IF_NOT_MSG(tokens.empty() || queries, "queries is null");
    check_finite(queries, ntoken() * params.heads_q, params.d, "queries");
}

void AttentionAdapter::Call::check_policy_of_heads(const ProbePolicy& policy) const {
    adapter.check_policy(policy);
    FAISS_THROW_IF_NOT_FMT(
            policy.head_split.empty() ||
                    policy.head_split.size() == static_cast<size_t>(params.heads_kv),
            "policy.head_split is for %zd KV heads, the adapter has %d",
            policy.head_split.size(),
            params.heads_kv);
    for (const SequenceInput& in : batch) {
        const auto& heads = adapter.at(in.sequence).heads;
        for (int h = 0; h < params.heads_kv; h++) {
            // fits, or throws
            policy.share(h, 0, static_cast<int>(heads[h].size()));
        }
    }
}

void AttentionAdapter::Call::check_views() const {
    for (const SequenceInput& in : batch) {
        const Sequence& s = adapter.at(in.sequence);
        adapter.check_view(in.kv, s.length);
        FAISS_THROW_IF_NOT_FMT(
                in.positions || in.kv.length == s.length,
                "kv.length = %" PRId64 ", but %" PRId64
                " tokens were appended to sequence %" PRId64
                ": append first, or give positions",
                in.kv.length,
                s.length,
                in.sequence);
        FAISS_THROW_IF_NOT_FMT(
                in.kv.d_v == batch[0].kv.d_v,
                "kv.d_v = %d, that of the batch's first sequence is %d",
                in.kv.d_v,
                batch[0].kv.d_v);
    }
}

void AttentionAdapter::Call::check_output(const AttendOutput& out) const {
    FAISS_THROW_IF_NOT_MSG(ntoken() == 0 || out.output, "output is null");
    FAISS_THROW_IF_NOT_MSG(
            ntoken() == 0 || out.lse || !out.merge,
            "lse is null, but merging needs it");
}

void AttentionAdapter::Call::check_probed(const ProbedCells& probed) const {
    const int choices = probed.share_group ? 1 : group;
    const int64_t rows_per_token = int64_t(params.heads_kv) * choices;
    const int64_t rows = ntoken() * rows_per_token;
    FAISS_THROW_IF_NOT_FMT(
            probed.begin.size() == static_cast<size_t>(rows) + 1,
            "probed.begin has %zd entries, %" PRId64
            " rows need one more than that",
            probed.begin.size(),
            rows);
    for (int64_t r = 0; r <= rows; r++) {
        FAISS_THROW_IF_NOT_FMT(
                (r > 0 ? probed.begin[r - 1] : 0) <= probed.begin[r] &&
                        probed.begin[r] <= static_cast<int64_t>(probed.cells.size()),
                "probed.begin[%" PRId64 "] = %" PRId64
                " is out of order, or beyond the %zd probed.cells",
                r,
                probed.begin[r],
                probed.cells.size());
    }
    for (int64_t r = 0; r < rows; r++) {
        const auto h = static_cast<int>(r / choices % params.heads_kv);
        int64_t ncell = 0;
        for (const auto& l : tokens[r / rows_per_token].sequence->heads[h]) {
            ncell += l.lists.ncell();
        }
        for (int64_t i = probed.begin[r]; i < probed.begin[r + 1]; i++) {
            FAISS_THROW_IF_NOT_FMT(
                    probed.cells[i] >= 0 && probed.cells[i] < ncell,
                    "probed.cells[%" PRId64
                    "] = %d, KV head %d has %" PRId64 " cells",
                    i,
                    probed.cells[i],
                    h,
                    ncell);
        }
    }
}

std::vector<std::vector<int32_t>> AttentionAdapter::Call::probe(
        int64_t t,
        int h,
        const ProbePolicy& policy) const {
    const Token& token = tokens[t];
    const auto& head = token.sequence->heads[h];
    const int npartition = static_cast<int>(head.size());
    const int64_t far_keys = token.far_keys();
    std::vector<std::vector<int32_t>> chosen(policy.share_group ? 1 : group);
    int32_t first_cell = 0;
    std::vector<int64_t> left(
            chosen.size(), policy.candidate_limit(far_keys)); // of each choice
    for (int p = 0; p < npartition && far_keys > 0; p++) {
        const Partition& partition = head[p].partition;
        const CellLists& lists = head[p].lists;
        const int ncell = lists.ncell();
        const double share = policy.share(h, p, npartition);
        std::vector<int64_t> counts(ncell);
        for (int c = 0; c < ncell; c++) {
            counts[c] = lists.count_before(c, token.window_begin);
        }
        if (far_keys <= params.dense_below) {
            // One partition covers them all.
            for (int c = 0; p == 0 && c < ncell; c++) {
                for (auto& row : chosen) {
                    if (counts[c]) {
                        row.push_back(c);
                    }
                }
            }
            continue;
        }
        if (share == 0) {
            first_cell += ncell;
            continue;
        }
        const RoutedVectors routed(
                head[p].rotary.get(),
                *partition.query,
                group,
                queries_of(t, h),
                std::vector<int64_t>(
                        group, token.slot() + params.position_offset));
        std::vector<float> scores(size_t(group) * ncell);
        const CellStats stats = lists.stats();
        partition.query->scores(routed.input, &stats, scores.data());
        int wrong = 0; // counted first, as that loop is vectors
        for (const float score : scores) {
            wrong += !(score < INFINITY); // NaN, too
        }
        for (size_t i = 0; wrong > 0 && i < scores.size(); i++) {
            FAISS_THROW_IF_NOT_FMT(
                    scores[i] < INFINITY,
                    "the query assigner of KV head %d gives cell %d a "
                    "score of %f",
                    h,
                    static_cast<int>(i % ncell),
                    double(scores[i]));
        }
        if (policy.share_group) {
            std::vector<float> shared(ncell);
            share_scores(
                    group,
                    ncell,
                    scores.data(),
                    counts.data(),
                    params.scale,
                    shared.data());
            scores = std::move(shared);
        }
        const int64_t limit =
                policy.candidate_limit(h, p, npartition, far_keys);
        for (size_t g = 0; g < chosen.size(); g++) {
            auto& row = chosen[g];
            for (int32_t c : take_cells(
                         ncell,
                         scores.data() + g * ncell,
                         counts.data(),
                         policy.nprobe,
                         std::min(limit, left[g]),
                         /*at_least_one=*/row.empty())) {
                row.push_back(first_cell + c);
                left[g] -= counts[c];
            }
        }
        first_cell += ncell;
    }
    return chosen;
}

FarKeys AttentionAdapter::Call::far_keys(
        int64_t t,
        int h,
        const int32_t* cells,
        const int32_t* cells_end) const {
    const Token& token = tokens[t];
    const auto& head = token.sequence->heads[h];
    std::vector<int64_t> first_cell = {0}; // of each partition
    for (const auto& l : head) {
        first_cell.push_back(first_cell.back() + l.lists.ncell());
    }
    FarKeys far(token.sink_end, token.far_keys());
    std::vector<bool> seen(first_cell.back(), false);
    std::vector<std::vector<int32_t>> of_partition(head.size());
    for (; cells != cells_end; ++cells) {
        if (seen[*cells]) {
            continue;
        }
        seen[*cells] = true;
        far.cells++;
        size_t p = 0;
        while (*cells >= first_cell[p + 1]) {
            p++;
        }
        of_partition[p].push_back(
                static_cast<int32_t>(*cells - first_cell[p]));
    }
    for (size_t p = 0; p < head.size(); p++) {
        head[p].lists.mark_slots(
                of_partition[p], token.window_begin, far.words.data());
    }
    far.count();
    return far;
}

void AttentionAdapter::Call::rank(
        int64_t t,
        int h,
        int first_head,
        int nheads,
        const ProbePolicy& policy,
        FarKeys& far) const {
    const Token& token = tokens[t];
    if (policy.refine == 1 || token.far_keys() <= params.dense_below) {
        return;
    }
    const auto npartition = static_cast<int>(token.sequence->heads[h].size());
    bool any = false;
    for (int p = 0; p < npartition; p++) {
        any |= policy.share(h, p, npartition) > 0;
    }
    const int64_t limit = std::max<int64_t>(
            any, policy.head_limit(h, npartition, token.far_keys()));
    if (limit < far.n) {
        far.ranked = far.n;
        far.assign(token.sequence->codes[h].best(
                nheads,
                queries_of(t, h) + first_head * params.d,
                params.scale,
                far.slots(),
                limit));
    }
}

namespace {

/// Slots begin .. end - 1 of a token's cache, or its far keys in such words.
struct Piece {
    int64_t token, begin, end;
    int64_t far_keys; ///< 0: slots
};

void cut_dense(
        int64_t token,
        int64_t begin,
        int64_t end,
        int64_t length,
        std::vector<Piece>& pieces) {
    for (; begin < end; begin += length) {
        pieces.push_back({token, begin, std::min(begin + length, end), 0});
    }
}

} // namespace

void AttentionAdapter::Call::attend(
        const std::vector<FarKeys>& far,
        const AttendOutput& out) const {
    if (tokens.empty()) {
        return;
    }
    const int64_t rows = static_cast<int64_t>(far.size()) / ntoken(); // of a token
    const int nq = params.heads_q / static_cast<int>(rows); // query heads of a row
    // Tokens are cut into pieces, so that one long sequence occupies all cores;
    // partial results merge exactly. Few pieces, because results must be merged and the
    // first rows of each are read without a prefetch, but some for every thread.
    int64_t keys = 0;
    for (const FarKeys& f : far) {
        keys += f.n;
    }
    const int threads = omp_get_max_threads();
    const int64_t length = std::max<int64_t>(keys / (4 * threads), 512);
    std::vector<Piece> pieces;
    std::vector<int64_t> first_piece = {0}; // of each token
    for (int64_t t = 0; t < ntoken(); t++) {
        for (const FarPiece& p : cut_far(far.data() + t * rows, rows, length)) {
            pieces.push_back({t, p.begin, p.end, p.keys});
        }
        if (params.attend_dense) {
            // Shorter than pieces of far keys: they come last, and while the
            // last one is at work other threads wait. Not so many, where there are
            // many tokens, that partial results fill the memory.
            const Token& token = tokens[t];
            const int64_t dense = token.window_end - token.far_keys();
            const int64_t most = int64_t(64) * threads / ntoken() + 1;
            const int64_t stretch = std::max<int64_t>(
                    {64, length / (2 * params.heads_kv), dense / most});
            cut_dense(t, 0, token.sink_end, stretch, pieces);
            cut_dense(t, token.window_begin, token.window_end, stretch, pieces);
        }
        first_piece.push_back(static_cast<int64_t>(pieces.size()));
    }
    const int d_v = tokens[0].from->kv.d_v;
    const int64_t results = params.heads_q; // of a piece
    PartialResults parts(static_cast<int64_t>(pieces.size()), results, d_v);
    parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece& piece = pieces[i];
        const int64_t t = piece.token;
        AttendKernelParams p;
        p.kv = &tokens[t].from->kv;
        p.scale = params.scale;
        p.queries = queries_of(t, 0);
        std::unique_ptr<int32_t[]> slots;
        std::vector<SlotList> lists;
        if (piece.far_keys > 0) {
            slots.reset(new int32_t[piece.far_keys + 1]);
            int32_t* begin = slots.get();
            for (int64_t r = 0; r < rows; r++) {
                int32_t* end =
                        far[t * rows + r].copy_slots(piece.begin, piece.end, begin);
                lists.push_back(
                        {static_cast<int>(r * params.heads_kv / rows), begin, end - begin});
                begin = end;
            }
            p.lists = lists.data();
            p.heads = static_cast<int>(rows);
            p.nq = nq;
        } else {
            p.heads = params.heads_kv;
            p.nq = group;
            p.begin = piece.begin;
            p.end = piece.end;
        }
        p.output = parts.output(i);
        p.lse = parts.lse(i);
        attend_kernel(p);
    });

    parallel_for(ntoken() * results, [&](int64_t row) { // of a query head
        const int64_t t = row / results;
        const int64_t query = row % results;
        const int64_t begin = first_piece[t], end = first_piece[t + 1];
        const float lse = parts.merge(
                begin,
                end,
                query,
                out.output + row * d_v,
                out.merge ? out.lse[row] : -INFINITY);
        if (out.lse) {
            out.lse[row] = lse;
        }
        if (out.stats) {
            float dense = 0;
            for (int64_t i = begin; i < end && lse > -INFINITY; i++) {
                if (pieces[i].far_keys == 0) {
                    dense += std::exp(parts.lse(i)[query] - lse);
                }
            }
            AttendStats& stats = out.stats[row];
            const FarKeys& keys_of_row = far[row / nq];
            stats.cells = keys_of_row.cells;
            stats.keys_ranked = static_cast<int32_t>(keys_of_row.ranked);
            stats.keys_read = keys_of_row.n;
            stats.far_keys = tokens[t].far_keys();
            stats.dense_mass = std::min(dense, 1.0f);
        }
    });
}

ProbedCells AttentionAdapter::route(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const ProbePolicy* given) const {
    const ProbePolicy& policy = given ? *given : params_.policy;
    const Call call(*this, batch, queries);
    call.check_policy_of_heads(policy);
    const int64_t heads = call.ntoken() * params_.heads_kv;
    std::vector<std::vector<std::vector<int32_t>>> chosen(heads);
    parallel_for(heads, [&](int64_t i) {
        chosen[i] = call.probe(
                i / params_.heads_kv, static_cast<int>(i % params_.heads_kv), policy);
    });
    ProbedCells probed;
    probed.share_group = policy.share_group;
    probed.begin.push_back(0);
    for (const auto& of_head : chosen) {
        for (const auto& row : of_head) {
            probed.cells.insert(probed.cells.end(), row.begin(), row.end());
            probed.begin.push_back(static_cast<int64_t>(probed.cells.size()));
        }
    }
    return probed;
}

void AttentionAdapter::attend_preassigned(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const ProbedCells& probed,
        const AttendOutput& out,
        const ProbePolicy* policy) const {
    const Call call(*this, batch, queries);
    if (policy) {
        call.check_policy_of_heads(*policy);
    }
    call.check_views();
    call.check_output(out);
    call.check_probed(probed);
    const int choices = probed.share_group ? 1 : group_, nheads = group_ / choices;
    const int64_t of_token = int64_t(params_.heads_kv) * choices;
    std::vector<FarKeys> far(call.ntoken() * of_token);
    parallel_for(static_cast<int64_t>(far.size()), [&](int64_t r) {
        const int64_t t = r / of_token;
        const auto h = static_cast<int>(r % of_token / choices);
        far[r] = call.far_keys(
                t,
                h,
                probed.cells.data() + probed.begin[r],
                probed.cells.data() + probed.begin[r + 1]);
        if (policy) {
            call.rank(t, h, static_cast<int>(r % choices), nheads, *policy, far[r]);
        }
    });
    call.attend(far, out);
}

void AttentionAdapter::attend(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const AttendOutput& out,
        const ProbePolicy* given) const {
    const ProbePolicy& policy = given ? *given : params_.policy;
    const Call call(*this, batch, queries);
    call.check_policy_of_heads(policy);
    call.check_views();
    call.check_output(out);
    const int choices = policy.share_group ? 1 : group_, nheads = group_ / choices;
    std::vector<FarKeys> far(call.ntoken() * params_.heads_kv * choices);
    // A head's cells and their keys, without waiting for other heads in between.
    parallel_for(call.ntoken() * params_.heads_kv, [&](int64_t i) {
        const int64_t t = i / params_.heads_kv;
        const auto h = static_cast<int>(i % params_.heads_kv);
        const auto cells = call.probe(t, h, policy);
        for (int c = 0; c < choices; c++) {
            FarKeys& row = far[i * choices + c];
            row = call.far_keys(
                    t, h, cells[c].data(), cells[c].data() + cells[c].size());
            call.rank(t, h, c, nheads, policy, row);
        }
    });
    call.attend(far, out);
}

} // namespace faiss_saap
