// Compiled once per instruction set: foreach_target.h includes this file again
// and again (Highway's dynamic dispatch).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/vector_kernels.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "vector_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace faiss_saap {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_HAVE_SCALABLE
using D = hn::CappedTag<float, 4>; // halving needs a size known at compile time
#else
using D = hn::CappedTag<float, 16>;
#endif
using V = hn::Vec<D>;

/// Rows per tile: one maximum and one rescaling per tile, and sums short
/// enough for float32. Keys and values of a tile stay in the first cache.
constexpr int kTile = 64;
/// Queries that share the loads of a row.
constexpr int kQueries = 4;

HWY_INLINE V load(D d, const float* p) {
    return hn::LoadU(d, p);
}
template <class T>
HWY_INLINE V load(D d, const T* p) {
    const hn::Rebind<T, D> dt;
    return hn::PromoteTo(d, hn::LoadU(dt, p));
}

HWY_INLINE float to_scalar(const float* p) {
    return *p;
}
HWY_INLINE float to_scalar(const hwy::float16_t* p) {
    float x;
    to_float(DType::float16, p, 1, &x);
    return x;
}
HWY_INLINE float to_scalar(const hwy::bfloat16_t* p) {
    float x;
    to_float(DType::bfloat16, p, 1, &x);
    return x;
}

/// Adds halves until four partial sums are left, and stores them.
template <class DV, class VV>
HWY_INLINE void store_quarters(DV d, VV v, float* to) {
#if HWY_TARGET != HWY_SCALAR
    if constexpr (hn::MaxLanes(DV()) > 4) {
        const hn::Half<DV> half;
        store_quarters(
                half,
                hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)),
                to);
        return;
    }
    if constexpr (hn::MaxLanes(DV()) == 4) {
        hn::StoreU(v, d, to);
        return;
    }
#endif
    to[0] = hn::GetLane(hn::SumOfLanes(d, v));
    to[1] = to[2] = to[3] = 0;
}

/// Four partial sums of q.k for each row and NQ queries.
/// @param sums  size NQ * kTile * 4
template <int NQ, class T>
HWY_INLINE void partial_scores(
        const T* const* rows,
        int n,
        int width,
        const float* q,
        float* sums) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const int whole = width / lanes * lanes;
    for (int i = 0; i < n; i += 2) {
        // Two rows share the loads of the queries; an odd last row pairs with
        // itself.
        const T* a = rows[i];
        const T* b = rows[std::min(i + 1, n - 1)];
        V sa[NQ], sb[NQ];
        for (int h = 0; h < NQ; h++) {
            sa[h] = sb[h] = hn::Zero(d);
        }
        for (int c = 0; c < whole; c += lanes) {
            const V ka = load(d, a + c), kb = load(d, b + c);
            for (int h = 0; h < NQ; h++) {
                const V x = hn::LoadU(d, q + h * width + c);
                sa[h] = hn::MulAdd(ka, x, sa[h]);
                sb[h] = hn::MulAdd(kb, x, sb[h]);
            }
        }
        for (int h = 0; h < NQ; h++) {
            float* to = sums + (h * kTile + i) * 4;
            store_quarters(d, sa[h], to);
            store_quarters(d, sb[h], to + 4);
            for (int c = whole; c < width; c++) {
                to[0] += to_scalar(a + c) * q[h * width + c];
                to[4] += to_scalar(b + c) * q[h * width + c];
            }
        }
    }
}

/// Sums up the four parts and scales.
HWY_INLINE void finish_scores(
        const float* sums,
        int n,
        float scale,
        float* weights) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const V factor = hn::Set(d, scale);
    for (int i = 0; i < n; i += lanes) {
        V s0, s1, s2, s3;
        hn::LoadInterleaved4(d, sums + i * 4, s0, s1, s2, s3);
        const V sum = hn::Add(hn::Add(s0, s1), hn::Add(s2, s3));
        hn::StoreU(hn::Mul(sum, factor), d, weights + i);
    }
}

/// 0, or NaN when one of n values is not finite.
HWY_INLINE float poison_of(const float* x, int n) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    V sum = hn::Zero(d);
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        sum = hn::MulAdd(hn::LoadU(d, x + i), hn::Zero(d), sum);
    }
    float poison = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; i < n; i++) {
        poison += x[i] * 0.0f;
    }
    return poison;
}

HWY_INLINE float maximum_of(const float* x) {
    const D d;
    V best = hn::LoadU(d, x);
    for (int i = static_cast<int>(hn::Lanes(d)); i < kTile;
         i += static_cast<int>(hn::Lanes(d))) {
        best = hn::Max(best, hn::LoadU(d, x + i));
    }
    return hn::GetLane(hn::MaxOfLanes(d, best));
}

/// weights <- exp(weights - maximum); returns their sum.
HWY_INLINE float exponentiate(float maximum, float* weights) {
    const D d;
    const V shift = hn::Set(d, maximum);
    V sum = hn::Zero(d);
    for (int i = 0; i < kTile; i += static_cast<int>(hn::Lanes(d))) {
        const V w = hn::Exp(d, hn::Sub(hn::LoadU(d, weights + i), shift));
        hn::StoreU(w, d, weights + i);
        sum = hn::Add(sum, w);
    }
    return hn::GetLane(hn::SumOfLanes(d, sum));
}

/// output <- output * shrink + sum of weight * row, for NQ queries.
template <int NQ, class T>
HWY_INLINE void add_values(
        const T* const* rows,
        int n,
        int width,
        const float* weights, // NQ * kTile
        const float* shrink,
        float* output) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    int c = 0;
    for (; c + 2 * lanes <= width; c += 2 * lanes) {
        V s0[NQ], s1[NQ];
        for (int h = 0; h < NQ; h++) {
            s0[h] = s1[h] = hn::Zero(d);
        }
        for (int i = 0; i < n; i++) {
            const V v0 = load(d, rows[i] + c);
            const V v1 = load(d, rows[i] + c + lanes);
            for (int h = 0; h < NQ; h++) {
                const V w = hn::Set(d, weights[h * kTile + i]);
                s0[h] = hn::MulAdd(w, v0, s0[h]);
                s1[h] = hn::MulAdd(w, v1, s1[h]);
            }
        }
        for (int h = 0; h < NQ; h++) {
            float* o = output + h * width + c;
            const V f = hn::Set(d, shrink[h]);
            hn::StoreU(hn::MulAdd(hn::LoadU(d, o), f, s0[h]), d, o);
            hn::StoreU(
                    hn::MulAdd(hn::LoadU(d, o + lanes), f, s1[h]),
                    d,
                    o + lanes);
        }
    }
    for (; c < width; c++) {
        for (int h = 0; h < NQ; h++) {
            float sum = 0;
            for (int i = 0; i < n; i++) {
                sum += weights[h * kTile + i] * to_scalar(rows[i] + c);
            }
            float& o = output[h * width + c];
            o = o * shrink[h] + sum;
        }
    }
}

/// An online softmax (Milakov and Gimelshein, arXiv 1805.02867) over tiles.
template <class T>
struct OnlineSoftmax {
    const AttendKernelParams& p;
    std::vector<float> maximum, sum, poison, sums, weights;
    const T* keys[2][kTile];
    const T* values[2][kTile];

    explicit OnlineSoftmax(const AttendKernelParams& params)
            : p(params),
              maximum(p.nq, -INFINITY),
              sum(p.nq, 0.0f),
              poison(p.nq, 0.0f),
              sums(kQueries * kTile * 4),
              weights(kQueries * kTile) {}

    /// Resolves the rows of a tile and asks the memory for them: chosen slots
    /// lie anywhere, and a tile ahead hides the latency. Into the second cache:
    /// the first one is full of the tile at work.
    int fetch(int64_t begin, int which) {
        const int n =
                static_cast<int>(std::clamp<int64_t>(p.n - begin, 0, kTile));
        constexpr size_t line = 64;
        const auto ask = [](const T* row, size_t width) {
            const char* bytes = reinterpret_cast<const char*>(row);
            for (size_t at = 0; at < width * sizeof(T); at += line) {
                __builtin_prefetch(bytes + at, 0, 2);
            }
        };
        for (int i = 0; i < n; i++) {
            const int64_t slot =
                    p.slots ? p.slots[begin + i] : p.begin + begin + i;
            const T* k = static_cast<const T*>(p.kv->key(p.kv_head, slot));
            const T* v = static_cast<const T*>(p.kv->value(p.kv_head, slot));
            keys[which][i] = k;
            values[which][i] = v;
            ask(k, p.kv->d);
            ask(v, p.kv->d_v);
        }
        return n;
    }

    template <int NQ>
    void add(int first, int n, int which) {
        partial_scores<NQ>(
                keys[which],
                n,
                p.kv->d,
                p.queries + int64_t(first) * p.kv->d,
                sums.data());
        float shrink[NQ];
        for (int h = 0; h < NQ; h++) {
            float* w = weights.data() + h * kTile;
            finish_scores(sums.data() + h * kTile * 4, n, p.scale, w);
            // Neither the maximum nor Highway's exponential lets a NaN
            // through.
            poison[first + h] += poison_of(w, n);
            std::fill(w + n, w + kTile, -INFINITY);
            const float before = maximum[first + h];
            const float now = std::max(before, maximum_of(w));
            // exp(-inf - -inf) would be NaN
            shrink[h] = before == now ? 1.0f : std::exp(before - now);
            const float base = now == -INFINITY ? 0.0f : now;
            sum[first + h] = sum[first + h] * shrink[h] + exponentiate(base, w);
            maximum[first + h] = now;
        }
        add_values<NQ>(
                values[which],
                n,
                p.kv->d_v,
                weights.data(),
                shrink,
                p.output + int64_t(first) * p.kv->d_v);
    }

    void run() {
        std::fill(p.output, p.output + int64_t(p.nq) * p.kv->d_v, 0.0f);
        int n = fetch(0, 0), which = 0;
        for (int64_t begin = 0; begin < p.n; begin += kTile) {
            const int next = fetch(begin + kTile, 1 - which);
            int h = 0;
            for (; h + kQueries <= p.nq; h += kQueries) {
                add<kQueries>(h, n, which);
            }
            switch (p.nq - h) {
                case 3:
                    add<3>(h, n, which);
                    break;
                case 2:
                    add<2>(h, n, which);
                    break;
                case 1:
                    add<1>(h, n, which);
                    break;
                default:
                    break;
            }
            n = next;
            which = 1 - which;
        }
        for (int i = 0; i < p.nq; i++) {
            const float norm =
                    (sum[i] > 0 ? 1 / sum[i] : 0.0f) + poison[i];
            for (int j = 0; j < p.kv->d_v; j++) {
                p.output[int64_t(i) * p.kv->d_v + j] *= norm;
            }
            p.lse[i] =
                    sum[i] > 0 ? maximum[i] + std::log(sum[i]) : -INFINITY;
            p.lse[i] += poison[i];
        }
    }
};

void Attend(const AttendKernelParams& p) {
    switch (p.kv->dtype) {
        case DType::float32:
            OnlineSoftmax<float>(p).run();
            break;
        case DType::float16:
            OnlineSoftmax<hwy::float16_t>(p).run();
            break;
        case DType::bfloat16:
            OnlineSoftmax<hwy::bfloat16_t>(p).run();
            break;
    }
}

template <int NQ>
void inner_products_of(
        int d,
        const float* q,
        int64_t n,
        const float* rows,
        float* out) {
    float sums[NQ * kTile * 4];
    float products[kTile];
    const float* row[kTile];
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int tile = static_cast<int>(std::min<int64_t>(kTile, n - begin));
        for (int i = 0; i < tile; i++) {
            row[i] = rows + (begin + i) * d;
        }
        partial_scores<NQ>(row, tile, d, q, sums);
        for (int h = 0; h < NQ; h++) {
            finish_scores(sums + h * kTile * 4, tile, 1, products);
            std::copy_n(products, tile, out + h * n + begin);
        }
    }
}

void InnerProducts(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const float* rows,
        float* out) {
    int i = 0;
    for (; i + kQueries <= nq; i += kQueries) {
        inner_products_of<kQueries>(
                d, q + int64_t(i) * d, n, rows, out + i * n);
    }
    for (; i < nq; i++) {
        inner_products_of<1>(d, q + int64_t(i) * d, n, rows, out + i * n);
    }
}

void ShareScores(
        int nhead,
        int ncell,
        const float* scores,
        const float* counts,
        float scale,
        float* shared) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const int padded = (ncell + lanes - 1) / lanes * lanes;
    const V none = hn::Set(d, -INFINITY), zero = hn::Zero(d);
    // Logits of all heads, -infinity for empty cells and in the padding.
    std::vector<float> logits(size_t(nhead) * padded, -INFINITY);
    std::vector<float> weight(padded, 0.0f);
    std::copy_n(counts, ncell, weight.data());
    for (int h = 0; h < nhead; h++) {
        float* x = logits.data() + size_t(h) * padded;
        std::copy_n(scores + size_t(h) * ncell, ncell, x);
        const V factor = hn::Set(d, scale);
        V best = none;
        for (int c = 0; c < padded; c += lanes) {
            const auto there = hn::Gt(hn::LoadU(d, weight.data() + c), zero);
            const V logit = hn::IfThenElse(
                    there, hn::Mul(factor, hn::LoadU(d, x + c)), none);
            hn::StoreU(logit, d, x + c);
            best = hn::Max(best, logit);
        }
        const float maximum = hn::GetLane(hn::MaxOfLanes(d, best));
        if (maximum == -INFINITY) {
            continue; // nothing to read, or nothing this head wants to read
        }
        const V shift = hn::Set(d, maximum);
        V total = zero;
        for (int c = 0; c < padded; c += lanes) {
            const V mass = hn::Exp(d, hn::Sub(hn::LoadU(d, x + c), shift));
            total = hn::MulAdd(mass, hn::LoadU(d, weight.data() + c), total);
        }
        const V log_total = hn::Set(
                d,
                maximum + std::log(hn::GetLane(hn::SumOfLanes(d, total))));
        for (int c = 0; c < padded; c += lanes) {
            hn::StoreU(hn::Sub(hn::LoadU(d, x + c), log_total), d, x + c);
        }
    }
    // In logarithms: a mass too small for a float still ranks.
    std::vector<float> result(padded);
    for (int c = 0; c < padded; c += lanes) {
        V best = none;
        for (int h = 0; h < nhead; h++) {
            best = hn::Max(
                    best, hn::LoadU(d, logits.data() + size_t(h) * padded + c));
        }
        const auto wanted = hn::Gt(best, none);
        const V base = hn::IfThenElseZero(wanted, best);
        V sum = zero;
        for (int h = 0; h < nhead; h++) {
            const V x = hn::LoadU(d, logits.data() + size_t(h) * padded + c);
            sum = hn::Add(sum, hn::Exp(d, hn::Sub(x, base)));
        }
        const V one = hn::Set(d, 1.0f);
        const V log_sum = hn::Log(d, hn::IfThenElse(wanted, sum, one));
        hn::StoreU(
                hn::IfThenElse(wanted, hn::Add(base, log_sum), none),
                d,
                result.data() + c);
    }
    std::copy_n(result.data(), ncell, shared);
}

} // namespace HWY_NAMESPACE
} // namespace faiss_saap
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace faiss_saap {

HWY_EXPORT(Attend);
HWY_EXPORT(InnerProducts);
HWY_EXPORT(ShareScores);

void attend_kernel(const AttendKernelParams& params) {
    HWY_DYNAMIC_DISPATCH(Attend)(params);
}

void inner_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const float* rows,
        float* out) {
    HWY_DYNAMIC_DISPATCH(InnerProducts)(nq, d, q, n, rows, out);
}

void share_scores_kernel(
        int nhead,
        int ncell,
        const float* scores,
        const float* counts,
        float scale,
        float* shared) {
    HWY_DYNAMIC_DISPATCH(ShareScores)
    (nhead, ncell, scores, counts, scale, shared);
}

} // namespace faiss_saap
#endif
