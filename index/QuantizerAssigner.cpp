#include <faiss_saap/QuantizerAssigner.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include <faiss/IndexFlat.h>
#include <faiss/utils/distances.h>

#include <faiss_saap/dtype.h>

#include "check.h"
#include "parallel_for.h"
#include "vector_kernels.h"

namespace faiss_saap {

namespace {

/// faiss distance -> score
float to_score(faiss::MetricType metric, float distance) {
    return metric == faiss::METRIC_L2 ? -0.5f * distance : distance;
}

/// n floats as bfloat16 where it holds every one exactly, else empty.
std::vector<uint16_t> exact_bfloat16(int64_t n, const float* x) {
    std::vector<uint16_t> held(n);
    from_float(DType::bfloat16, x, n, held.data());
    std::vector<float> back(n);
    to_float(DType::bfloat16, held.data(), n, back.data());
    if (!std::equal(back.begin(), back.end(), x)) {
        held.clear();
    }
    return held;
}

} // namespace

QuantizerAssigner::QuantizerAssigner(
        std::shared_ptr<const faiss::Index> q,
        RoutingNeeds space)
        : CellAssigner(
                  not_null(q, "quantizer").d,
                  static_cast<int>(std::min<idx_t>(not_null(q, "quantizer").ntotal, 65537)),
                  space),
          quantizer(std::move(q)) {
    FAISS_THROW_IF_NOT_FMT(
            space == NEEDS_PRE_ROPE || space == NEEDS_POST_ROPE,
            "space = %u must be NEEDS_PRE_ROPE or NEEDS_POST_ROPE",
            static_cast<unsigned>(space));
    FAISS_THROW_IF_NOT_FMT(
            quantizer->metric_type == faiss::METRIC_L2 ||
                    quantizer->metric_type == faiss::METRIC_INNER_PRODUCT,
            "quantizer's metric_type = %d: only METRIC_L2 and "
            "METRIC_INNER_PRODUCT give scores",
            static_cast<int>(quantizer->metric_type));
    const auto* flat = dynamic_cast<const faiss::IndexFlat*>(quantizer.get());
    if (flat) {
        check_finite(flat->get_xb(), ncell, d, "quantizer's vectors");
        bfloat16_vectors = exact_bfloat16(int64_t(ncell) * d, flat->get_xb());
    }
    if (flat && flat->metric_type == faiss::METRIC_L2) {
        for (int c = 0; c < ncell; c++) {
            const float* y = flat->get_xb() + int64_t(c) * d;
            half_norm.push_back(faiss::fvec_norm_L2sqr(y, d) / 2);
        }
    }
}

void QuantizerAssigner::scores(
        const RoutingInput& input,
        const CellStats* stats,
        float* scores) const {
    check(input, stats);
    // Ranking all cells is wasted on a flat quantizer, which compares with all
    // of them anyway.
    if (const auto* flat =
                dynamic_cast<const faiss::IndexFlat*>(quantizer.get())) {
        const float* x = vectors(input);
        const VectorRows rows = bfloat16_vectors.empty()
                ? VectorRows(flat->get_xb())
                : VectorRows(bfloat16_vectors.data(), DType::bfloat16);
        inner_products(static_cast<int>(input.n), d, x, ncell, rows, scores);
        for (int64_t i = 0; !half_norm.empty() && i < input.n; i++) {
            const float own = faiss::fvec_norm_L2sqr(x + i * d, d) / 2;
            for (int c = 0; c < ncell; c++) {
                scores[i * ncell + c] -= half_norm[c] + own;
            }
        }
        return;
    }
    std::vector<int32_t> cells(static_cast<size_t>(input.n) * ncell);
    std::vector<float> ranked(cells.size());
    assign(input, stats, ncell, cells.data(), ranked.data());
    std::fill(scores, scores + cells.size(), -INFINITY);
    for (int64_t i = 0; i < input.n; i++) {
        for (int64_t j = i * ncell; j < (i + 1) * ncell; j++) {
            if (cells[j] >= 0) {
                scores[i * ncell + cells[j]] = ranked[j];
            }
        }
    }
}

/// One kernel for one vector and for many, so that a key's cell does not depend
/// on how many come with it, to the last bit; faiss::IndexFlat changes its
/// method at 20 vectors.
void QuantizerAssigner::assign_to_best(
        const RoutingInput& input,
        const CellStats* stats,
        int32_t* cells,
        float* best_scores) const {
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (input.n + kBlock - 1) / kBlock;
    parallel_for(blocks, [&](int64_t b) {
        RoutingInput block = input;
        const int64_t first = b * kBlock;
        block.n = std::min(kBlock, input.n - first);
        (needs & NEEDS_PRE_ROPE ? block.pre_rope : block.post_rope) =
                vectors(input) + first * d;
        std::vector<float> all(block.n * ncell);
        scores(block, stats, all.data());
        for (int64_t i = 0; i < block.n; i++) {
            const float* s = all.data() + i * ncell;
            const auto best = std::max_element(s, s + ncell) - s;
            cells[first + i] = static_cast<int32_t>(best);
            if (best_scores) {
                best_scores[first + i] = s[best];
            }
        }
    });
}

void QuantizerAssigner::assign(
        const RoutingInput& input,
        const CellStats* stats,
        int k,
        int32_t* cells,
        float* best_scores) const {
    check(input, stats);
    check_k(k);
    if (input.n == 0) {
        return;
    }
    if (k == 1 && dynamic_cast<const faiss::IndexFlat*>(quantizer.get())) {
        assign_to_best(input, stats, cells, best_scores);
        return;
    }
    const size_t size = static_cast<size_t>(input.n) * k;
    std::vector<float> distances(size);
    std::vector<idx_t> labels(size);
    quantizer->search(
            input.n, vectors(input), k, distances.data(), labels.data());
    for (size_t i = 0; i < size; i++) {
        FAISS_THROW_IF_NOT_FMT(
                labels[i] < ncell,
                "the quantizer returned vector %lld, the assigner was made for "
                "%d",
                static_cast<long long>(labels[i]),
                ncell);
    }
    for (size_t i = 0; i < size; i++) {
        cells[i] = static_cast<int32_t>(labels[i]);
        if (best_scores) {
            best_scores[i] = labels[i] < 0
                    ? -INFINITY
                    : to_score(quantizer->metric_type, distances[i]);
        }
    }
}

size_t QuantizerAssigner::bytes_read() const {
    const size_t element = bfloat16_vectors.empty() ? sizeof(float) : sizeof(uint16_t);
    return static_cast<size_t>(ncell) * d * element;
}

} // namespace faiss_saap
