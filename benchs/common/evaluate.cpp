#include "evaluate.h"

#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include <faiss_saap/attend_slots.h>
#include <faiss_saap/merge_states.h>

#include "report.h"

namespace faiss_saap::benchs {

void Sums::add(const Sums& o) {
    read += o.read;
    far += o.far;
    ceiling += o.ceiling;
    error += o.error;
    seconds += o.seconds;
    selectivity += o.selectivity;
    head_selectivity += o.head_selectivity;
    index_bytes += o.index_bytes;
    queries += o.queries;
}

std::vector<int64_t> query_tokens(int64_t tokens, int queries) {
    std::vector<int64_t> at;
    const int64_t step = std::max<int64_t>(1, tokens / (2 * queries));
    for (int64_t i = tokens / 2;
         i < tokens && static_cast<int>(at.size()) < queries;
         i += step) {
        at.push_back(i);
    }
    return at;
}

namespace {

/// Sink, window and what the method selected, merged.
std::vector<float> attend(const Step& step, int head, const Selection& chosen) {
    const HeadData& data = step.data;
    const KvView kv = data.view(step.token + 1);
    const float* q = data.query_post(step.token, head);
    const int d = data.d;
    std::vector<float> out(d), part(d);
    float lse, part_lse;
    const auto range = [&](int64_t begin, int64_t end, float* o, float* l) {
        attend_range(kv, 0, 1, q, data.scale, begin, end, o, l);
    };
    range(0, step.far.begin, out.data(), &lse);
    range(step.far.end, step.token + 1, part.data(), &part_lse);
    merge_states(1, d, out.data(), &lse, part.data(), &part_lse);
    if (chosen.attended.empty()) {
        const auto& slots = chosen.slots[head];
        attend_slots(
                kv,
                0,
                1,
                q,
                data.scale,
                static_cast<int64_t>(slots.size()),
                slots.data(),
                part.data(),
                &part_lse);
    } else {
        part = chosen.attended[head].output;
        part_lse = chosen.attended[head].lse;
    }
    merge_states(1, d, out.data(), &lse, part.data(), &part_lse);
    return out;
}

/// Least share of the far keys that holds this share of their mass.
double keys_for_mass(const GroundTruth& truth, FarRange far, double share) {
    std::vector<double> mass(
            truth.mass.begin() + far.begin, truth.mass.begin() + far.end);
    std::sort(mass.begin(), mass.end(), std::greater<double>());
    const double wanted = share * truth.mass_of(far.begin, far.end);
    double sum = 0;
    size_t n = 0;
    while (n < mass.size() && sum < wanted) {
        sum += mass[n++];
    }
    return mass.empty() ? 0.0 : static_cast<double>(n) / mass.size();
}

/// Everything that one query tells about every method and budget.
void evaluate_query(
        const HeadData& data,
        const Evaluation& evaluation,
        const std::vector<std::unique_ptr<Method>>& methods,
        int64_t token,
        Figures& figures) {
    std::vector<GroundTruth> truth;
    for (int h = 0; h < data.group; h++) {
        truth.emplace_back(data, token, h);
    }
    const FarRange far =
            far_range(token, evaluation.sink, evaluation.window);
    const Step step{data, token, far, truth};
    for (int h = 0; h < data.group; h++) {
        figures.keys_for_95[h].push_back(keys_for_mass(truth[h], far, .95));
    }
    std::vector<char> read_by_group(token + 1);
    size_t at = 0;
    for (const auto& method : methods) {
        for (double budget : evaluation.budgets) {
            const auto limit = static_cast<int64_t>(budget * far.size());
            double start = thread_seconds_now();
            const Selection chosen = method->probe(step, limit);
            const double choosing = (thread_seconds_now() - start) / data.group;
            const auto ceiling = method->ceiling(step, limit);
            std::fill(read_by_group.begin(), read_by_group.end(), 0);
            int64_t distinct = 0;
            for (int h = 0; h < data.group; h++) {
                Sums& s = figures.sums[at + h];
                const auto& slots = chosen.slots[h];
                start = thread_seconds_now();
                const auto out = attend(step, h, chosen);
                s.seconds += choosing + thread_seconds_now() - start;
                s.queries++;
                s.read += truth[h].mass_of(slots);
                s.far += truth[h].mass_of(far.begin, far.end);
                s.ceiling += ceiling[h];
                s.error += truth[h].error_of(out.data());
                s.index_bytes += chosen.index_bytes;
                for (int32_t j : slots) {
                    distinct += !read_by_group[j];
                    read_by_group[j] = 1;
                }
            }
            for (int h = 0; h < data.group && far.size() > 0; h++) {
                const auto n = static_cast<double>(far.size());
                Sums& s = figures.sums[at + h];
                s.head_selectivity +=
                        static_cast<double>(chosen.slots[h].size()) / n;
                s.selectivity += static_cast<double>(distinct) / n;
            }
            at += data.group;
        }
    }
}

} // namespace

Figures evaluate(
        const HeadData& data,
        const Evaluation& evaluation,
        const std::vector<std::unique_ptr<Method>>& methods) {
    const auto tokens = query_tokens(data.tokens, evaluation.queries);
    Figures all;
    all.sums.resize(methods.size() * evaluation.budgets.size() * data.group);
    all.keys_for_95.resize(data.group);
    Progress progress(
            fmt::format("layer {}, KV head {}", data.layer, data.kv_head),
            static_cast<int64_t>(tokens.size()));
    // Statistics of cells move on in blocks, so that queries can share threads,
    // sixteen times at least, and not past a query that looks at the newest keys.
    bool exact = false;
    for (const auto& method : methods) {
        exact = exact || method->needs_newest_keys();
    }
    const size_t block = !evaluation.decoding
            ? tokens.size()
            : exact ? 1
                    : std::clamp<size_t>(tokens.size() / 16, 1, 32);
    for (size_t begin = 0; begin < tokens.size(); begin += block) {
        const size_t end = std::min(begin + block, tokens.size());
        const int64_t listed = !evaluation.decoding
                ? data.tokens
                : far_range(tokens[end - 1],
                            evaluation.sink,
                            evaluation.window)
                          .end;
        for (const auto& method : methods) {
            method->build(data, listed);
        }
#pragma omp parallel
        {
            Figures mine;
            mine.sums.resize(all.sums.size());
            mine.keys_for_95.resize(data.group);
#pragma omp for schedule(dynamic)
            for (size_t i = begin; i < end; i++) {
                evaluate_query(data, evaluation, methods, tokens[i], mine);
                progress.advance();
            }
#pragma omp critical
            {
                for (size_t i = 0; i < all.sums.size(); i++) {
                    all.sums[i].add(mine.sums[i]);
                }
                for (int h = 0; h < data.group; h++) {
                    all.keys_for_95[h].insert(
                            all.keys_for_95[h].end(),
                            mine.keys_for_95[h].begin(),
                            mine.keys_for_95[h].end());
                }
            }
        }
    }
    return all;
}

} // namespace faiss_saap::benchs
