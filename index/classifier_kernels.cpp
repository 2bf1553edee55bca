// Compiled once per instruction set: foreach_target.h includes this file again
// and again (Highway's dynamic dispatch).
// Arrays of vectors need a size that the compiler knows; Arm has NEON anyway.
#define HWY_DISABLED_TARGETS \
    (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/classifier_kernels.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "classifier_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace faiss_saap {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
/// Rows are padded to multiples of 8, which wider vectors overrun.
using D8 = hn::CappedTag<float, 8>;

template <class DT>
HWY_INLINE hn::Vec<DT> load(DT d, const float* p) {
    return hn::LoadU(d, p);
}
template <class DT>
HWY_INLINE hn::Vec<DT> load(DT d, const hwy::bfloat16_t* p) {
    const hn::Rebind<hwy::bfloat16_t, DT> dt;
    return hn::PromoteTo(d, hn::LoadU(dt, p));
}

/// Products of kRows rows with x.
template <int kRows, class T>
HWY_INLINE void row_products(
        const T* w,
        int cols,
        const float* x,
        float* out) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    V sum[kRows];
    for (int r = 0; r < kRows; r++) {
        sum[r] = hn::Zero(d);
    }
    int c = 0;
    for (; c + lanes <= cols; c += lanes) {
        const V xc = load(d, x + c);
        for (int r = 0; r < kRows; r++) {
            const T* row = w + int64_t(r) * cols;
            sum[r] = hn::MulAdd(load(d, row + c), xc, sum[r]);
        }
    }
    for (int r = 0; r < kRows; r++) {
        out[r] = hn::GetLane(hn::SumOfLanes(d, sum[r]));
    }
    const D8 d8;
    const int lanes8 = static_cast<int>(hn::Lanes(d8));
    for (; c < cols; c += lanes8) {
        const auto xc = load(d8, x + c);
        for (int r = 0; r < kRows; r++) {
            const T* row = w + int64_t(r) * cols;
            const auto product = hn::Mul(load(d8, row + c), xc);
            out[r] += hn::GetLane(hn::SumOfLanes(d8, product));
        }
    }
}

template <class T>
void dense_layer_of(const DenseLayerParams& p) {
    constexpr int kRows = 8; // enough sums in flight to hide their latency
    const T* w = static_cast<const T*>(p.w);
    float out[kRows];
    for (int r = 0; r < p.rows; r += kRows) {
        const int n = std::min(kRows, p.rows - r);
        const T* row = w + int64_t(r) * p.cols;
        if (n == kRows) {
            row_products<kRows>(row, p.cols, p.x, out);
        } else {
            for (int i = 0; i < n; i++) {
                row_products<1>(
                        row + int64_t(i) * p.cols, p.cols, p.x, out + i);
            }
        }
        for (int i = 0; i < n; i++) {
            const float y =
                    out[i] + p.bias[r + i] + (p.add ? p.y[r + i] : 0.0f);
            p.y[r + i] = p.relu && y < 0 ? 0.0f : y; // NaN stays
        }
    }
}

void DenseLayer(const DenseLayerParams& p) {
    if (p.type == DType::float32) {
        dense_layer_of<float>(p);
    } else {
        dense_layer_of<hwy::bfloat16_t>(p);
    }
}

HWY_INLINE float largest_of(const float* x, int64_t n) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    float best = -INFINITY;
    int64_t i = 0;
    if (n >= lanes) {
        V v = hn::LoadU(d, x);
        for (i = lanes; i + lanes <= n; i += lanes) {
            v = hn::Max(v, hn::LoadU(d, x + i));
        }
        best = hn::GetLane(hn::MaxOfLanes(d, v));
    }
    for (; i < n; i++) {
        best = std::max(best, x[i]);
    }
    return best;
}

float SumAttentionPerCell(
        int64_t n,
        float scale,
        float* scores,
        const int32_t* cells,
        int64_t begin,
        int64_t end,
        int ncell,
        float* mass) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    const float largest = largest_of(scores, n);
    const V factor = hn::Set(d, scale), shift = hn::Set(d, -scale * largest);
    V sums = hn::Zero(d);
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        const V w = hn::Exp(
                d, hn::MulAdd(hn::LoadU(d, scores + j), factor, shift));
        hn::StoreU(w, d, scores + j);
        sums = hn::Add(sums, w);
    }
    float sum = hn::GetLane(hn::SumOfLanes(d, sums));
    for (; j < n; j++) {
        scores[j] = std::exp(scale * (scores[j] - largest));
        sum += scores[j];
    }
    std::fill(mass, mass + ncell, 0.0f);
    for (j = begin; j < end; j++) {
        mass[cells[j]] += scores[j];
    }
    float total = 0;
    const float norm = 1 / sum;
    for (int c = 0; c < ncell; c++) {
        mass[c] *= norm;
        total += mass[c];
    }
    return total;
}

float CrossEntropy(
        int n,
        float* logits,
        const float* log_count,
        const float* mass,
        float total,
        float weight) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    int c = 0;
    for (; c + lanes <= n; c += lanes) {
        const V z = hn::Add(
                hn::LoadU(d, logits + c), hn::LoadU(d, log_count + c));
        hn::StoreU(z, d, logits + c);
    }
    for (; c < n; c++) {
        logits[c] += log_count[c];
    }
    const float largest = largest_of(logits, n);
    // sum of p * z: empty cells have no mass, and -infinity times it is NaN
    const V shift = hn::Set(d, largest), zero = hn::Zero(d);
    const V none = hn::Set(d, -INFINITY);
    V sums = zero, products = zero;
    for (c = 0; c + lanes <= n; c += lanes) {
        const V z = hn::LoadU(d, logits + c);
        const auto there = hn::Gt(z, none);
        const V x = hn::Sub(z, shift);
        const V w = hn::IfThenElseZero(there, hn::Exp(d, x));
        products = hn::MulAdd(
                hn::LoadU(d, mass + c),
                hn::IfThenElseZero(there, x),
                products);
        sums = hn::Add(sums, w);
        hn::StoreU(w, d, logits + c);
    }
    float sum = hn::GetLane(hn::SumOfLanes(d, sums));
    float product = hn::GetLane(hn::SumOfLanes(d, products));
    for (; c < n; c++) {
        const float x = logits[c] - largest;
        product += x > -INFINITY ? mass[c] * x : 0.0f;
        logits[c] = x > -INFINITY ? std::exp(x) : 0.0f;
        sum += logits[c];
    }
    const float a = weight / sum, b = -weight / total;
    const V va = hn::Set(d, a), vb = hn::Set(d, b);
    for (c = 0; c + lanes <= n; c += lanes) {
        const V m = hn::Mul(vb, hn::LoadU(d, mass + c));
        hn::StoreU(hn::MulAdd(va, hn::LoadU(d, logits + c), m), d, logits + c);
    }
    for (; c < n; c++) {
        logits[c] = a * logits[c] + b * mass[c];
    }
    return weight * (std::log(sum) - product / total);
}

void AdamWStep(
        int64_t n,
        const AdamWParams& p,
        const float* gradient,
        float* parameters,
        float* first,
        float* second) {
    const float keep = 1 - p.rate * p.decay;
    const float rate = p.rate * p.correction1;
    for (int64_t i = 0; i < n; i++) {
        const float g = gradient[i];
        first[i] = p.beta1 * first[i] + (1 - p.beta1) * g;
        second[i] = p.beta2 * second[i] + (1 - p.beta2) * g * g;
        parameters[i] = keep * parameters[i] -
                rate * first[i] /
                        (std::sqrt(second[i] * p.correction2) + p.epsilon);
    }
}

} // namespace HWY_NAMESPACE
} // namespace faiss_saap
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace faiss_saap {

HWY_EXPORT(DenseLayer);
HWY_EXPORT(SumAttentionPerCell);
HWY_EXPORT(CrossEntropy);
HWY_EXPORT(AdamWStep);

void dense_layer(const DenseLayerParams& params) {
    HWY_DYNAMIC_DISPATCH(DenseLayer)(params);
}

float sum_attention_per_cell(
        int64_t n,
        float scale,
        float* scores,
        const int32_t* cells,
        int64_t begin,
        int64_t end,
        int ncell,
        float* mass) {
    return HWY_DYNAMIC_DISPATCH(SumAttentionPerCell)(
            n, scale, scores, cells, begin, end, ncell, mass);
}

float cross_entropy(
        int n,
        float* logits,
        const float* log_count,
        const float* mass,
        float total,
        float weight) {
    return HWY_DYNAMIC_DISPATCH(CrossEntropy)(
            n, logits, log_count, mass, total, weight);
}

void adamw_step(
        int64_t n,
        const AdamWParams& params,
        const float* gradient,
        float* parameters,
        float* first,
        float* second) {
    HWY_DYNAMIC_DISPATCH(AdamWStep)
    (n, params, gradient, parameters, first, second);
}

} // namespace faiss_saap
#endif
