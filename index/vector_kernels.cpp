// Compiled once per instruction set: foreach_target.h includes this file again
// and again (Highway's dynamic dispatch).

// Arrays of vectors need a size that the compiler knows; Arm has NEON anyway.
#define HWY_DISABLED_TARGETS \
    (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/vector_kernels.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vector_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace faiss_saap {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

/// Rows per tile: one maximum and one rescaling per tile, and sums short
/// enough for float32. Keys and values of a tile stay in the first cache.
constexpr int kTile = 64;
/// Rows that share the loads of a query.
constexpr int kRows = 4;
/// Rows between one that is read and one that is prefetched: enough for the
/// latency of the memory, and few enough for its queues.
constexpr int kRowsAhead = 32;
/// Queries that share the loads of a row: kRows * kQueries sums stay in
/// registers, of which the older x86 sets have 16 instead of 32.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4 || \
        HWY_TARGET == HWY_SSSE3
constexpr int kQueries = 2;
#else
constexpr int kQueries = 4;
#endif

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

#if HWY_TARGET != HWY_SCALAR
/// Adds halves until four lanes are left, and stores them.
template <class DV, class VV>
HWY_INLINE void store_quarters(DV d, VV v, float* to) {
    if constexpr (hn::MaxLanes(DV()) > 4) {
        const hn::Half<DV> half;
        store_quarters(
                half,
                hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)),
                to);
    } else {
        hn::StoreU(v, d, to);
    }
}
#endif

/// Stores the sums of the lanes of four vectors.
HWY_INLINE void store_sums(V a, V b, V c, V e, float* to) {
#if HWY_TARGET == HWY_SCALAR
    to[0] = hn::GetLane(a);
    to[1] = hn::GetLane(b);
    to[2] = hn::GetLane(c);
    to[3] = hn::GetLane(e);
#else
    const D d;
    // Within blocks of four lanes, a transposition that adds on its way.
    const hn::Repartition<uint64_t, D> pairs;
    const auto ab = hn::BitCast(
            pairs,
            hn::Add(hn::InterleaveLower(d, a, b),
                    hn::InterleaveUpper(d, a, b)));
    const auto ce = hn::BitCast(
            pairs,
            hn::Add(hn::InterleaveLower(d, c, e),
                    hn::InterleaveUpper(d, c, e)));
    const V sums = hn::Add(
            hn::BitCast(d, hn::InterleaveLower(pairs, ab, ce)),
            hn::BitCast(d, hn::InterleaveUpper(pairs, ab, ce)));
    store_quarters(d, sums, to);
#endif
}

/// Asks the memory for columns of a row. Into the second cache: the first one
/// is full of the tile at work.
template <class T>
HWY_INLINE void prefetch(const T* row, int columns) {
    constexpr int per_line = 64 / sizeof(T);
    for (int c = 0; c < columns; c += per_line) {
        __builtin_prefetch(row + c, 0, 2);
    }
}

/// q.k of kRows rows and NQ queries.
/// @param next      rows to prefetch meanwhile; may be null
/// @param q         size NQ * width
/// @param products  output, NQ times kRows entries, kTile apart
template <int NQ, class T>
HWY_INLINE void inner_products_of_rows(
        const T* const* row,
        const T* const* next,
        int width,
        const float* q,
        float* products) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const int whole = width / lanes * lanes;
    for (int r = 0; next && r < kRows; r++) {
        prefetch(next[r], width);
    }
    V sum[NQ][kRows];
    for (int h = 0; h < NQ; h++) {
        for (int r = 0; r < kRows; r++) {
            sum[h][r] = hn::Zero(d);
        }
    }
    for (int c = 0; c < whole; c += lanes) {
        V k[kRows];
        for (int r = 0; r < kRows; r++) {
            k[r] = load(d, row[r] + c);
        }
        for (int h = 0; h < NQ; h++) {
            const V x = hn::LoadU(d, q + h * width + c);
            for (int r = 0; r < kRows; r++) {
                sum[h][r] = hn::MulAdd(k[r], x, sum[h][r]);
            }
        }
    }
    for (int h = 0; h < NQ; h++) {
        store_sums(
                sum[h][0],
                sum[h][1],
                sum[h][2],
                sum[h][3],
                products + h * kTile);
    }
    for (int c = whole; c < width; c++) {
        for (int h = 0; h < NQ; h++) {
            for (int r = 0; r < kRows; r++) {
                products[h * kTile + r] +=
                        to_scalar(row[r] + c) * q[h * width + c];
            }
        }
    }
}

/// x <- factor * x over a tile; returns 0, or NaN when a result is not finite.
HWY_INLINE float multiply(float factor, float* x) {
    const D d;
    const V f = hn::Set(d, factor);
    V poison = hn::Zero(d);
    for (int i = 0; i < kTile; i += static_cast<int>(hn::Lanes(d))) {
        const V product = hn::Mul(f, hn::LoadU(d, x + i));
        hn::StoreU(product, d, x + i);
        poison = hn::MulAdd(product, hn::Zero(d), poison);
    }
    return hn::GetLane(hn::SumOfLanes(d, poison));
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

/// output <- output * shrink + sum of weight * row over NV vectors of n rows,
/// for NQ queries.
template <int NQ, int NV, class T>
HWY_INLINE void add_value_columns(
        const T* const* rows,
        int n,
        const T* const* next,
        int column,
        int width,
        const float* weights,
        const float* shrink,
        float* output) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    V sum[NQ][NV];
    for (int h = 0; h < NQ; h++) {
        const V factor = hn::Set(d, shrink[h]);
        for (int j = 0; j < NV; j++) {
            const float* o = output + h * width + column + j * lanes;
            sum[h][j] = hn::Mul(hn::LoadU(d, o), factor);
        }
    }
    for (int i = 0; i < n; i++) {
        if (next) {
            prefetch(next[i] + column, NV * lanes);
        }
        V v[NV];
        for (int j = 0; j < NV; j++) {
            v[j] = load(d, rows[i] + column + j * lanes);
        }
        for (int h = 0; h < NQ; h++) {
            const V w = hn::Set(d, weights[h * kTile + i]);
            for (int j = 0; j < NV; j++) {
                sum[h][j] = hn::MulAdd(w, v[j], sum[h][j]);
            }
        }
    }
    for (int h = 0; h < NQ; h++) {
        for (int j = 0; j < NV; j++) {
            hn::StoreU(
                    sum[h][j],
                    d,
                    output + h * width + column + j * lanes);
        }
    }
}

/// The same over whole rows.
/// @param next     rows to prefetch meanwhile; may be null
/// @param weights  NQ times n entries, kTile apart
/// @param output   size NQ * width
template <int NQ, class T>
HWY_INLINE void add_values(
        const T* const* rows,
        int n,
        const T* const* next,
        int width,
        const float* weights,
        const float* shrink,
        float* output) {
    const int lanes = static_cast<int>(hn::Lanes(D()));
    int c = 0;
    for (; c + 4 * lanes <= width; c += 4 * lanes) {
        add_value_columns<NQ, 4>(
                rows, n, next, c, width, weights, shrink, output);
    }
    for (; c + lanes <= width; c += lanes) {
        add_value_columns<NQ, 1>(
                rows, n, next, c, width, weights, shrink, output);
    }
    for (; c < width; c++) {
        for (int h = 0; h < NQ; h++) {
            float& o = output[h * width + c];
            o *= shrink[h];
            for (int i = 0; i < n; i++) {
                o += weights[h * kTile + i] * to_scalar(rows[i] + c);
            }
        }
    }
}

/// An online softmax (Milakov and Gimelshein, arXiv 1805.02867) over tiles of
/// tokens. Within a tile the heads take turns on a few tokens, because their
/// rows are neighbours in the usual layout: read in this order, memory gives
/// nearly what it gives to a sequential reader, and half of it head by head.
template <class T>
struct OnlineSoftmax {
    const AttendKernelParams& p;
    const int queries; ///< of all heads
    std::vector<float> maximum, sum, poison, shrink;
    std::vector<float> weights; ///< of the tile, size queries * kTile
    /// Rows of two tiles, the one at work and the next, as a ring; size heads *
    /// kRing.
    std::vector<const T*> keys, values;
    static constexpr int kRing = 2 * kTile;
    /// Tokens that a head reads in its turn.
    const int turn;
    explicit OnlineSoftmax(const AttendKernelParams& params)
            : p(params),
              queries(p.heads * p.nq),
              maximum(queries, -INFINITY),
              sum(queries, 0.0f),
              poison(queries, 0.0f),
              shrink(queries),
              weights(size_t(queries) * kTile),
              keys(size_t(p.heads) * kRing),
              values(size_t(p.heads) * kRing),
              turn(std::max(kRows, kRowsAhead / p.heads / kRows * kRows)) {}

    /// Pointers to the rows of the tile at `begin`; the last row stands in for
    /// missing ones.
    void resolve(int64_t begin) {
        const int ring = static_cast<int>(begin % kRing);
        for (int i = 0; p.n && i < kTile; i++) {
            const int64_t at = std::min(begin + i, p.n - 1);
            const int64_t slot = p.slots ? p.slots[at] : p.begin + at;
            for (int h = 0; h < p.heads; h++) {
                const int to = h * kRing + ring + i;
                keys[to] =
                        static_cast<const T*>(p.kv->key(p.kv_head + h, slot));
                values[to] =
                        static_cast<const T*>(p.kv->value(p.kv_head + h, slot));
            }
        }
    }
    /// Calls body(query, count) for the queries of a head, in groups
    /// that share the loads of a row.
    template <class Body>
    void for_queries(int head, const Body& body) {
        int q = head * p.nq;
        const int end = q + p.nq;
        for (; q + kQueries <= end; q += kQueries) {
            body(q, std::integral_constant<int, kQueries>());
        }
        for (; q < end; q++) {
            body(q, std::integral_constant<int, 1>());
        }
    }

    void add_tile(int64_t begin, int n) {
        const int ring = static_cast<int>(begin % kRing);
        // A turn ahead is prefetched; before the last turn, the next tile.
        const auto next = [&](const std::vector<const T*>& rows, int h, int i) {
            return rows.data() + h * kRing + (ring + i + turn) % kRing;
        };
        for (int first = 0; first < n; first += turn) {
            for (int h = 0; h < p.heads; h++) {
                for (int i = first; i < std::min(n, first + turn); i += kRows) {
                    const T* const* ahead = next(keys, h, i);
                    for_queries(h, [&](int q, auto count) {
                        inner_products_of_rows<count>(
                                keys.data() + h * kRing + ring + i,
                                ahead,
                                p.kv->d,
                                p.queries + int64_t(q) * p.kv->d,
                                weights.data() + q * kTile + i);
                        ahead = nullptr;
                    });
                }
            }
        }
        for (int q = 0; q < queries; q++) {
            float* w = weights.data() + q * kTile;
            std::fill(w + n, w + kTile, 0.0f);
            // Neither the maximum nor Highway's exponential lets a NaN
            // through.
            poison[q] += multiply(p.scale, w);
            std::fill(w + n, w + kTile, -INFINITY);
            const float before = maximum[q];
            const float now = std::max(before, maximum_of(w));
            // exp(-inf - -inf) would be NaN
            shrink[q] = before == now ? 1.0f : std::exp(before - now);
            const float base = now == -INFINITY ? 0.0f : now;
            sum[q] = sum[q] * shrink[q] + exponentiate(base, w);
            maximum[q] = now;
        }
        for (int first = 0; first < n; first += turn) {
            for (int h = 0; h < p.heads; h++) {
                const T* const* ahead = next(values, h, first);
                for_queries(h, [&](int q, auto count) {
                    add_values<count>(
                            values.data() + h * kRing + ring + first,
                            std::min(n - first, turn),
                            ahead,
                            p.kv->d_v,
                            weights.data() + q * kTile + first,
                            shrink.data() + q,
                            p.output + int64_t(q) * p.kv->d_v);
                    ahead = nullptr;
                });
            }
            std::fill(shrink.begin(), shrink.end(), 1.0f);
        }
    }

    void run() {
        std::fill(p.output, p.output + int64_t(queries) * p.kv->d_v, 0.0f);
        resolve(0);
        for (int64_t begin = 0; begin < p.n; begin += kTile) {
            resolve(begin + kTile);
            add_tile(
                    begin,
                    static_cast<int>(std::min<int64_t>(kTile, p.n - begin)));
        }
        for (int64_t i = 0; i < queries; i++) {
            const float norm =
                    (sum[i] > 0 ? 1 / sum[i] : 0.0f) + poison[i];
            for (int j = 0; j < p.kv->d_v; j++) {
                p.output[i * p.kv->d_v + j] *= norm;
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
    float products[NQ * kTile];
    for (int64_t begin = 0; begin < n; begin += kRows) {
        const int64_t count = std::min<int64_t>(kRows, n - begin);
        const float* row[kRows]; // the last row stands in for missing ones
        for (int r = 0; r < kRows; r++) {
            row[r] = rows + (begin + std::min<int64_t>(r, count - 1)) * d;
        }
        inner_products_of_rows<NQ, float>(row, nullptr, d, q, products);
        for (int h = 0; h < NQ; h++) {
            std::copy_n(products + h * kTile, count, out + h * n + begin);
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
