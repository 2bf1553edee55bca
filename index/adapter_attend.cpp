// What AttentionAdapter does with queries: route, then attend.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <memory>

#include <omp.h>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/faiss_compat.h>
#include <faiss_saap/merge_states.h>

#include "adapter_state.h"
#include "check.h"
#include "parallel_for.h"
#include "vector_kernels.h"

namespace faiss_saap {

/// A token of a batch, and what it attends to: [0, sink_end) and [window_begin,
/// window_end) densely, the slots between them through cells.
struct AttentionAdapter::Token {
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

std::vector<AttentionAdapter::Token> AttentionAdapter::tokens_of(
        const std::vector<SequenceInput>& batch,
        const float* queries) const {
    std::vector<Token> tokens;
    for (const SequenceInput& in : batch) {
        const Sequence& s = at(in.sequence);
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
            const int64_t first = params_.position_offset;
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
            token.sink_end = std::min(params_.sink, slot + 1);
            token.window_begin =
                    std::max(token.sink_end, slot + 1 - params_.window);
            tokens.push_back(token);
        }
    }
    FAISS_THROW_IF_NOT_MSG(tokens.empty() || queries, "queries is null");
    check_finite(
            queries,
            static_cast<int64_t>(tokens.size()) * params_.heads_q,
            params_.d,
            "queries");
    return tokens;
}

ProbedCells AttentionAdapter::route(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const ProbePolicy* given) const {
    const ProbePolicy& policy = given ? *given : params_.policy;
    policy.check();
    check_refine(policy);
    const std::vector<Token> tokens = tokens_of(batch, queries);
    for (const SequenceInput& in : batch) {
        const auto& heads = at(in.sequence).heads;
        for (int h = 0; h < params_.heads_kv; h++) {
            // fits, or throws
            policy.share(h, 0, static_cast<int>(heads[h].size()));
        }
    }

    const int choices = policy.share_group ? 1 : group_; // per KV head
    const auto tasks = static_cast<int64_t>(tokens.size()) * params_.heads_kv;
    std::vector<std::vector<int32_t>> chosen(tasks * choices);
    parallel_for(tasks, [&](int64_t task) {
        const Token& token = tokens[task / params_.heads_kv];
        const int h = static_cast<int>(task % params_.heads_kv);
        const auto& head = token.sequence->heads[h];
        const int npartition = static_cast<int>(head.size());
        const int64_t far_keys = token.far_keys();
        const float* q = queries + task * group_ * params_.d;
        int32_t first_cell = 0;
        for (int p = 0; p < npartition && far_keys > 0; p++) {
            const Partition& partition = head[p].partition;
            const CellLists& lists = head[p].lists;
            const int ncell = lists.ncell();
            const double share = policy.share(h, p, npartition);
            std::vector<int64_t> counts(ncell);
            for (int c = 0; c < ncell; c++) {
                counts[c] = lists.count_before(c, token.window_begin);
            }
            if (far_keys <= params_.dense_below) {
                // One partition covers them all.
                for (int g = 0; p == 0 && g < choices; g++) {
                    for (int c = 0; c < ncell; c++) {
                        if (counts[c]) {
                            chosen[task * choices + g].push_back(c);
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
                    group_,
                    q,
                    std::vector<int64_t>(
                            group_, token.slot() + params_.position_offset));
            std::vector<float> scores(size_t(group_) * ncell);
            const CellStats stats = lists.stats();
            partition.query->scores(routed.input, &stats, scores.data());
            for (size_t i = 0; i < scores.size(); i++) {
                FAISS_THROW_IF_NOT_FMT(
                        scores[i] < INFINITY, // false for NaN
                        "the query assigner of KV head %d gives cell %d a "
                        "score of %f",
                        h,
                        static_cast<int>(i % ncell),
                        double(scores[i]));
            }
            if (policy.share_group) {
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
            const int64_t limit =
                    policy.candidate_limit(h, p, npartition, far_keys);
            for (int g = 0; g < choices; g++) {
                auto& row = chosen[task * choices + g];
                for (int32_t c : take_cells(
                             ncell,
                             scores.data() + int64_t(g) * ncell,
                             counts.data(),
                             policy.nprobe,
                             limit,
                             /*at_least_one=*/row.empty())) {
                    row.push_back(first_cell + c);
                }
            }
            first_cell += ncell;
        }
    });

    ProbedCells probed;
    probed.share_group = policy.share_group;
    probed.begin.push_back(0);
    for (const auto& row : chosen) {
        probed.cells.insert(probed.cells.end(), row.begin(), row.end());
        probed.begin.push_back(static_cast<int64_t>(probed.cells.size()));
    }
    return probed;
}

namespace {

/// The far keys that one row of probed cells reads.
struct FarKeys {
    int64_t cells = 0;          ///< distinct ones
    int32_t ranked = 0;         ///< keys compared by their codes
    std::vector<int32_t> slots; ///< ascending, each once
};

/// Slots begin .. end - 1 of a token's cache: all of them, or its far keys.
struct Piece {
    bool far;
    int64_t begin, end;
};

void cut_dense(
        int64_t begin,
        int64_t end,
        int64_t length,
        std::vector<Piece>& pieces) {
    for (; begin < end; begin += length) {
        pieces.push_back({false, begin, std::min(begin + length, end)});
    }
}

/// Cuts the far keys of a token where all its rows together have about `length`
/// slots, so that a piece reads the rows of all KV heads where they are
/// neighbours.
void cut_far(
        const FarKeys* far,
        int64_t rows,
        int64_t length,
        std::vector<Piece>& pieces) {
    constexpr int64_t kSamples = 16; // of a piece
    const int64_t step = std::max<int64_t>(1, length / kSamples);
    std::vector<int32_t> samples;
    int64_t slots = 0;
    for (int64_t r = 0; r < rows; r++) {
        const auto n = static_cast<int64_t>(far[r].slots.size());
        slots += n;
        for (int64_t i = step / 2; i < n; i += step) {
            samples.push_back(far[r].slots[i]);
        }
    }
    std::sort(samples.begin(), samples.end());
    int64_t begin = 0;
    for (size_t i = kSamples; i < samples.size(); i += kSamples) {
        pieces.push_back({true, begin, samples[i]});
        begin = samples[i];
    }
    if (slots > 0) {
        pieces.push_back({true, begin, INT64_MAX});
    }
}

/// The part of ascending slots that lies in [begin, end).
SlotList slots_between(
        int kv_head,
        const std::vector<int32_t>& slots,
        int64_t begin,
        int64_t end) {
    const auto first = std::lower_bound(slots.begin(), slots.end(), begin);
    const auto last = std::lower_bound(first, slots.end(), end);
    return {kv_head, slots.data() + (first - slots.begin()), last - first};
}

} // namespace

void AttentionAdapter::attend_preassigned(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const ProbedCells& probed,
        const AttendOutput& out,
        const ProbePolicy* policy) const {
    if (policy) {
        policy->check();
        check_refine(*policy);
    }
    for (const SequenceInput& in : batch) {
        const Sequence& s = at(in.sequence);
        check_view(in.kv, s.length);
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
    const std::vector<Token> tokens = tokens_of(batch, queries);
    const auto ntoken = static_cast<int64_t>(tokens.size());
    FAISS_THROW_IF_NOT_MSG(ntoken == 0 || out.output, "output is null");
    FAISS_THROW_IF_NOT_MSG(
            ntoken == 0 || out.lse || !out.merge,
            "lse is null, but merging needs it");
    const int choices = probed.share_group ? 1 : group_;
    const int64_t rows_per_token = int64_t(params_.heads_kv) * choices;
    const int64_t rows = ntoken * rows_per_token;
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
        const auto h = static_cast<int>(r / choices % params_.heads_kv);
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

    const int nq = probed.share_group ? group_ : 1; // query heads of a row
    std::vector<FarKeys> far(rows);
    parallel_for(rows, [&](int64_t r) {
        const Token& token = tokens[r / rows_per_token];
        const auto h = static_cast<int>(r / choices % params_.heads_kv);
        far[r].slots = far_slots(
                token,
                h,
                probed.cells.data() + probed.begin[r],
                probed.cells.data() + probed.begin[r + 1],
                &far[r].cells);
        if (!policy || policy->refine == 1 ||
            token.far_keys() <= params_.dense_below) {
            return;
        }
        const int64_t limit = std::max<int64_t>(
                1,
                policy->head_limit(
                        h,
                        static_cast<int>(token.sequence->heads[h].size()),
                        token.far_keys()));
        if (limit < static_cast<int64_t>(far[r].slots.size())) {
            far[r].ranked = static_cast<int32_t>(far[r].slots.size());
            far[r].slots = token.sequence->codes[h].best(
                    nq,
                    queries + r * nq * params_.d,
                    params_.scale,
                    far[r].slots,
                    limit);
        }
    });

    // Tokens are cut into pieces, so that one long sequence occupies all cores;
    // partial results merge exactly. Long pieces, because the first rows of
    // each are read without a prefetch, but some for every thread.
    int64_t slots = 0;
    for (int64_t r = 0; r < rows; r++) {
        slots += static_cast<int64_t>(far[r].slots.size());
    }
    const int64_t length =
            std::max<int64_t>(slots / (4 * omp_get_max_threads()), 2048);
    std::vector<Piece> pieces;
    std::vector<int64_t> first_piece = {0}; // of each token
    for (int64_t t = 0; t < ntoken; t++) {
        cut_far(far.data() + t * rows_per_token, rows_per_token, length, pieces);
        if (params_.attend_dense) {
            // Shorter than pieces of far keys: they come last, and while the
            // last one is at work other threads wait. Not so many, where there are
            // many tokens, that partial results fill the memory.
            const Token& token = tokens[t];
            const int64_t dense = token.window_end - token.far_keys();
            const int64_t most = 64 * omp_get_max_threads() / ntoken + 1;
            const int64_t stretch = std::max<int64_t>(
                    {64, length / (4 * params_.heads_kv), dense / most});
            cut_dense(0, token.sink_end, stretch, pieces);
            cut_dense(token.window_begin, token.window_end, stretch, pieces);
        }
        first_piece.push_back(static_cast<int64_t>(pieces.size()));
    }
    std::vector<int64_t> token_of(pieces.size());
    for (int64_t t = 0; t < ntoken; t++) {
        std::fill(
                token_of.begin() + first_piece[t],
                token_of.begin() + first_piece[t + 1],
                t);
    }
    const int d_v = ntoken ? tokens[0].from->kv.d_v : 0;
    const int64_t results = params_.heads_q; // of a piece
    // Not a vector, which would fill it with zeros first.
    const std::unique_ptr<float[]> part(
            new float[pieces.size() * results * d_v]);
    std::vector<float> part_lse(pieces.size() * results);
    parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece& piece = pieces[i];
        const int64_t t = token_of[i];
        AttendKernelParams p;
        p.kv = &tokens[t].from->kv;
        p.scale = params_.scale;
        p.queries = queries + t * results * params_.d;
        std::vector<SlotList> lists;
        if (piece.far) {
            for (int64_t r = 0; r < rows_per_token; r++) {
                lists.push_back(slots_between(
                        static_cast<int>(r / choices),
                        far[t * rows_per_token + r].slots,
                        piece.begin,
                        piece.end));
            }
            p.lists = lists.data();
            p.heads = static_cast<int>(rows_per_token);
            p.nq = nq;
        } else {
            p.heads = params_.heads_kv;
            p.nq = group_;
            p.begin = piece.begin;
            p.end = piece.end;
        }
        p.output = part.get() + i * results * d_v;
        p.lse = part_lse.data() + i * results;
        attend_kernel(p);
    });

    parallel_for(ntoken * params_.heads_kv, [&](int64_t task) {
        const int64_t t = task / params_.heads_kv;
        const int64_t row = task * group_; // the first of a group
        const int64_t of_piece = row - t * results;
        float* output = out.output + row * d_v;
        std::vector<float> lse(group_, -INFINITY), dense(group_, -INFINITY);
        if (out.merge) {
            std::copy_n(out.lse + row, group_, lse.data());
        } else {
            std::fill_n(output, int64_t(group_) * d_v, 0.0f);
        }
        for (int64_t i = first_piece[t]; i < first_piece[t + 1]; i++) {
            const int64_t from = i * results + of_piece;
            const float* l = part_lse.data() + from;
            merge_states(
                    group_, d_v, output, lse.data(), part.get() + from * d_v, l);
            for (int g = 0; !pieces[i].far && g < group_; g++) {
                dense[g] = merge_weights(dense[g], l[g]).lse;
            }
        }
        for (int g = 0; out.stats && g < group_; g++) {
            AttendStats& stats = out.stats[row + g];
            const FarKeys& keys = far[(row + g) / nq];
            stats.cells = keys.cells;
            stats.keys_ranked = keys.ranked;
            stats.keys_read = static_cast<int64_t>(keys.slots.size());
            stats.far_keys = tokens[t].far_keys();
            stats.dense_mass =
                    lse[g] == -INFINITY ? 0 : std::exp(dense[g] - lse[g]);
        }
        if (out.lse) {
            std::copy_n(lse.data(), group_, out.lse + row);
        }
    });
}

std::vector<int32_t> AttentionAdapter::far_slots(
        const Token& token,
        int kv_head,
        const int32_t* cells,
        const int32_t* cells_end,
        int64_t* distinct) const {
    const auto& head = token.sequence->heads[kv_head];
    std::vector<int64_t> first_cell = {0}; // of each partition
    for (const auto& l : head) {
        first_cell.push_back(first_cell.back() + l.lists.ncell());
    }
    std::vector<bool> seen(first_cell.back(), false);
    std::vector<std::vector<int32_t>> of_partition(head.size());
    *distinct = 0;
    for (; cells != cells_end; ++cells) {
        if (seen[*cells]) {
            continue;
        }
        seen[*cells] = true;
        ++*distinct;
        size_t p = 0;
        while (*cells >= first_cell[p + 1]) {
            p++;
        }
        of_partition[p].push_back(
                static_cast<int32_t>(*cells - first_cell[p]));
    }
    // A bitmap puts the slots into ascending order, which is kinder to the
    // memory, and drops those that two cells share, in one pass over the lists.
    std::vector<uint64_t> bits((token.far_keys() + 63) / 64, 0);
    int64_t n = 0;
    for (size_t p = 0; p < head.size(); p++) {
        n += head[p].lists.mark_slots(
                of_partition[p], token.window_begin, bits.data());
    }
    // Five at a time without a branch for each, as most words hold a few: what
    // is not there is overwritten.
    constexpr int kAtOnce = 5;
    std::vector<int32_t> slots(n + 1);
    int32_t* to = slots.data();
    for (size_t w = 0; w < bits.size(); w++) {
        const auto first = static_cast<int32_t>(token.sink_end + 64 * w);
        uint64_t left = bits[w];
        do {
            for (int i = 0; i < kAtOnce; i++) {
                *to = first + __builtin_ctzll(left | uint64_t(1) << 63);
                to += left != 0;
                left &= left - 1;
            }
        } while (left);
    }
    slots.resize(to - slots.data());
    return slots;
}

void AttentionAdapter::attend(
        const std::vector<SequenceInput>& batch,
        const float* queries,
        const AttendOutput& out,
        const ProbePolicy* policy) const {
    const ProbePolicy& chosen = policy ? *policy : params_.policy;
    attend_preassigned(
            batch, queries, route(batch, queries, &chosen), out, &chosen);
}

} // namespace faiss_saap
