// Compiled once per instruction set: foreach_target.h includes this file again
// and again (Highway's dynamic dispatch).

// Arrays of vectors need a size that the compiler knows; Arm has NEON anyway.
#define HWY_DISABLED_TARGETS \
    (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/vector_kernels.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h
#include <hwy/aligned_allocator.h>
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vector_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace faiss_saap {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

/// What is loaded again and again starts on a cache line: a load that lies on
/// two of them takes twice as long.
template <class T>
using Aligned = hwy::AlignedFreeUniquePtr<T[]>;

/// Rows per tile: one maximum and one rescaling per tile, and sums short
/// enough for float32. The values of a head's tile and the keys of the next one
/// stay in the first cache.
constexpr int kTile = 96;
/// Keys and values of two tiles, the one at work and the next, stay in the
/// second cache.
constexpr int64_t kTileBytes = 128 << 10;
/// Rows that share the loads of a query.
constexpr int kRows = 4;
/// Queries that share the loads of a row: kRows * kQueries sums stay in
/// registers, of which the older x86 sets have 16 instead of 32.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4 || \
        HWY_TARGET == HWY_SSSE3
constexpr int kQueries = 2;
#else
constexpr int kQueries = 4;
#endif
/// Products of kRows rows with kQueries queries, row by row for each query in turn: whole
/// vectors, whatever the instruction set.
constexpr int kBlock = kQueries * kRows;

HWY_INLINE V load(D d, const float* p) {
    return hn::LoadU(d, p);
}
template <class T>
HWY_INLINE V load(D d, const T* p) {
    const hn::Rebind<T, D> dt;
    return hn::PromoteTo(d, hn::LoadU(dt, p));
}

/// One of the two vectors that make a block of 2 * Lanes(d) components.
/// Pairs of bfloat16 are widened in place, the odd one by a mask and the even
/// one by a shift, which is cheaper than to bring them into order; queries and
/// sums are kept in the order in which rows come out (see `arrange_queries`).
template <int kHalf, class T>
HWY_INLINE V load_half(D d, const T* block) {
#if HWY_TARGET != HWY_SCALAR
    if constexpr (std::is_same_v<T, hwy::bfloat16_t>) {
        const hn::Repartition<uint16_t, D> d16;
        const hn::RebindToUnsigned<D> d32;
        const auto pairs = hn::BitCast(
                d32,
                hn::LoadU(d16, reinterpret_cast<const uint16_t*>(block)));
        return hn::BitCast(
                d,
                kHalf == 0 ? hn::ShiftLeft<16>(pairs)
                           : hn::And(pairs, hn::Set(d32, 0xffff0000u)));
    }
#endif
    return load(d, block + kHalf * static_cast<int>(hn::Lanes(d)));
}

/// Whether `load_half` takes components apart by their parity.
template <class T>
constexpr bool kByParity = HWY_TARGET != HWY_SCALAR &&
        std::is_same_v<T, hwy::bfloat16_t>;

/// Queries that are compared together: a vector of each of them in turns, in the order of
/// `load_half`, then what is left of their components. So one pointer leads to all.
/// @param from  size nq * width
/// @param to    likewise
template <class T>
HWY_INLINE void arrange_queries(int nq, int width, const float* from, float* to) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    for (int h = 0; h < nq; h++, from += width) {
        int c = 0;
        if constexpr (kByParity<T>) {
            for (; c + 2 * lanes <= width; c += 2 * lanes) {
                V even, odd;
                hn::LoadInterleaved2(d, from + c, even, odd);
                hn::StoreU(even, d, to + c * nq + h * lanes);
                hn::StoreU(odd, d, to + (c + lanes) * nq + h * lanes);
            }
        }
        for (; c + lanes <= width; c += lanes) {
            hn::StoreU(hn::LoadU(d, from + c), d, to + c * nq + h * lanes);
        }
        for (; c < width; c++) {
            to[c * nq + h] = from[c];
        }
    }
}

/// From the order of `load_half` into their own, times a factor.
template <class T>
HWY_INLINE void restore(int width, const float* from, float factor, float* to) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const V f = hn::Set(d, factor);
    int c = 0;
    if constexpr (kByParity<T>) {
        for (; c + 2 * lanes <= width; c += 2 * lanes) {
            hn::StoreInterleaved2(
                    hn::Mul(f, hn::LoadU(d, from + c)),
                    hn::Mul(f, hn::LoadU(d, from + c + lanes)),
                    d,
                    to + c);
        }
    }
    for (; c < width; c++) {
        to[c] = factor * from[c];
    }
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

#if HWY_TARGET != HWY_SCALAR
/// Within each four lanes, the sums of those of four vectors: a transposition that adds on its
/// way.
HWY_INLINE V add_quarters(const V (&x)[kRows]) {
    const D d;
    const hn::Repartition<uint64_t, D> pairs;
    const auto ab = hn::BitCast(
            pairs,
            hn::Add(hn::InterleaveLower(d, x[0], x[1]),
                    hn::InterleaveUpper(d, x[0], x[1])));
    const auto ce = hn::BitCast(
            pairs,
            hn::Add(hn::InterleaveLower(d, x[2], x[3]),
                    hn::InterleaveUpper(d, x[2], x[3])));
    return hn::Add(
            hn::BitCast(d, hn::InterleaveLower(pairs, ab, ce)),
            hn::BitCast(d, hn::InterleaveUpper(pairs, ab, ce)));
}
#endif

/// Stores the sums of the lanes as a block; zeros for queries that are not there.
template <int NQ>
HWY_INLINE void store_block(const V (&sum)[NQ][kRows], float* to) {
#if HWY_TARGET == HWY_SCALAR
    for (int i = 0; i < kBlock; i++) {
        to[i] = i < NQ * kRows ? hn::GetLane(sum[i / kRows][i % kRows]) : 0.0f;
    }
#else
    const D d;
    V rows[kQueries];
    for (int h = 0; h < kQueries; h++) {
        rows[h] = h < NQ ? add_quarters(sum[std::min(h, NQ - 1)]) : hn::Zero(d);
    }
    if constexpr (hn::MaxLanes(D()) == kBlock && kBlock == 16) {
        // Quarters of all queries at once.
        const auto add_halves = [&](V x, V y) HWY_ATTR {
            return hn::Add(
                    hn::ConcatLowerLower(d, y, x), hn::ConcatUpperUpper(d, y, x));
        };
        const V even = add_halves(rows[0], rows[2]), odd = add_halves(rows[1], rows[3]);
        const V quarters = hn::Add(
                hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even),
                hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even)));
        hn::StoreU(quarters, d, to);
    } else {
        for (int h = 0; h < kQueries; h++) {
            store_quarters(d, rows[h], to + h * kRows);
        }
    }
#endif
}

/// Asks the memory for four lines, the last one first: what asks for ascending ones looks like a
/// stream to some processors, which then fetch what lies behind the row.
/// @tparam kLocality  that of `__builtin_prefetch`: 3 for the first cache, 2
///                    for the second
template <int kLocality>
HWY_INLINE void ask_for_lines(const char* at) {
    __builtin_prefetch(at + 192, 0, kLocality);
    __builtin_prefetch(at + 128, 0, kLocality);
    __builtin_prefetch(at + 64, 0, kLocality);
    __builtin_prefetch(at, 0, kLocality);
}

/// The same for the lines of a row, all together: one by one between the arithmetic, a
/// gather takes twice as long (measured).
template <int kLocality>
HWY_INLINE void ask_for(const void* row, int bytes) {
    const auto* at = static_cast<const char*>(row);
    if (HWY_LIKELY(bytes == 256)) { // 128 components of 16 bits
        ask_for_lines<kLocality>(at);
        return;
    }
    int b = 0;
    // Unrolled for the reason that `inner_products_of_rows` is.
    for (; b + 256 <= bytes; b += 256) {
        ask_for_lines<kLocality>(at + b);
    }
    for (; b < bytes; b += 64) {
        __builtin_prefetch(at + b, 0, kLocality);
    }
}

/// Rows that are needed later and asked for while others are at work, one of each kind with
/// each of those: more at once wait for each other, and the arithmetic for them.
/// @tparam kScattered  rows do not follow each other in the memory
template <class T, bool kScattered>
struct RowsAhead {
    const T* const* far = nullptr;  ///< into the second cache
    const T* const* near = nullptr; ///< from there into the first, scattered ones
    int far_bytes = 0, near_bytes = 0; ///< of a row
    int n = 0; ///< of each kind

    HWY_INLINE void ask(int i) const {
        if (i < n) {
            ask_for<2>(far[i], far_bytes);
            if constexpr (kScattered) {
                ask_for<3>(near[i], near_bytes);
            }
        }
    }
    HWY_INLINE RowsAhead from(int i) const {
        return {far + i, near + i, far_bytes, near_bytes, n - i};
    }
};

/// q.k of kRows rows and NQ queries.
///
/// A load that is executed again for each line of a row looks like a stride to
/// the hardware, which fetches ahead. For rows in order that wins a tenth of the
/// time; of scattered rows it fetches what nobody reads, and takes a third
/// longer. So there each line of a row has a load of its own.
/// @param kScattered  rows do not follow each other in the memory
/// @param rows      kRows pointers, `stride` apart
/// @param q         size NQ * width, in the order of `arrange_queries`
/// @param ahead     kRows of each kind
/// @param products  output, a block
template <int NQ, bool kScattered, class T>
HWY_INLINE void inner_products_of_rows(
        const T* const* rows,
        int stride,
        int width,
        const float* q,
        const RowsAhead<T, kScattered>& ahead,
        float* products) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const T* row[kRows];
    for (int r = 0; r < kRows; r++) {
        row[r] = rows[r * stride];
    }
    V sum[NQ][kRows];
    for (int h = 0; h < NQ; h++) {
        for (int r = 0; r < kRows; r++) {
            sum[h][r] = hn::Zero(d);
        }
    }
    const auto add = [&](int column, const V* k) HWY_ATTR {
        for (int h = 0; h < NQ; h++) {
            const V x = hn::LoadU(d, q + column * NQ + h * lanes);
            for (int r = 0; r < kRows; r++) {
                sum[h][r] = hn::MulAdd(k[r], x, sum[h][r]);
            }
        }
    };
    int c = 0;
    V k[kRows];
    int asked = 0;
    const auto add_block = [&](int column) HWY_ATTR {
        for (int r = 0; r < kRows; r++) {
            k[r] = load_half<0>(d, row[r] + column);
        }
        add(column, k);
        for (int r = 0; r < kRows; r++) {
            k[r] = load_half<1>(d, row[r] + column);
        }
        add(column + lanes, k);
        if (asked < kRows) {
            ahead.ask(asked++);
        }
    };
    if constexpr (kScattered) {
        for (; c + 8 * lanes <= width; c += 8 * lanes) {
            add_block(c);
            add_block(c + 2 * lanes);
            add_block(c + 4 * lanes);
            add_block(c + 6 * lanes);
        }
    }
    for (; c + 2 * lanes <= width; c += 2 * lanes) {
        add_block(c);
    }
    while (asked < kRows) {
        ahead.ask(asked++);
    }
    for (; c + lanes <= width; c += lanes) {
        for (int r = 0; r < kRows; r++) {
            k[r] = load(d, row[r] + c);
        }
        add(c, k);
    }
    store_block<NQ>(sum, products);
    for (; c < width; c++) {
        for (int h = 0; h < NQ; h++) {
            for (int r = 0; r < kRows; r++) {
                products[h * kRows + r] += to_scalar(row[r] + c) * q[c * NQ + h];
            }
        }
    }
}

/// What an online softmax knows of a query.
struct SoftmaxState {
    float maximum = -INFINITY;
    double sum = 0; ///< of exp(logit - maximum)
    /// Becomes NaN when a logit is not finite: neither the maximum nor Highway's exponential
    /// lets a NaN through.
    float poison = 0;
};

/// Turns products of a tile into weights exp(scale * product - maximum).
/// @param n       rows; the last block may have more, whose weights become 0
/// @param x       blocks
/// @param state   size NQ
/// @param shrink  output, size NQ: what weights so far are worth under the new maximum
template <int NQ>
HWY_INLINE void weigh_tile(
        float scale,
        int n,
        float* x,
        SoftmaxState* state,
        float* shrink) {
    const D d;
    constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
    constexpr int kVectors = kBlock / kLanes;
    static_assert(kBlock % kLanes == 0);
    const int end = (n + kRows - 1) / kRows * kBlock;
    V best[kVectors], zeros[kVectors];
    for (int j = 0; j < kVectors; j++) {
        best[j] = hn::Set(d, -INFINITY);
        zeros[j] = hn::Zero(d);
    }
    const V factor = hn::Set(d, scale);
    for (int i = 0; i < end; i += kBlock) {
        for (int j = 0; j < kVectors; j++) {
            float* at = x + i + j * kLanes;
            const V logit = hn::Mul(factor, hn::LoadU(d, at));
            zeros[j] = hn::MulAdd(logit, hn::Zero(d), zeros[j]);
            best[j] = hn::Max(best[j], logit);
            hn::StoreU(logit, d, at);
        }
    }
    alignas(64) float of_rows[kBlock], shift[kBlock] = {};
    const auto each_row = [&](const V* v, const auto& add) HWY_ATTR {
        for (int j = 0; j < kVectors; j++) {
            hn::StoreU(v[j], d, of_rows + j * kLanes);
        }
        for (int i = 0; i < NQ * kRows; i++) {
            add(state[i / kRows], of_rows[i]);
        }
    };
    for (int h = 0; h < NQ; h++) {
        shrink[h] = state[h].maximum;
    }
    each_row(zeros, [](SoftmaxState& s, float z) { s.poison += z; });
    each_row(best, [](SoftmaxState& s, float b) { s.maximum = std::max(s.maximum, b); });
    for (int h = 0; h < NQ; h++) {
        const float top = state[h].maximum;
        // exp(-inf - -inf) would be NaN
        shrink[h] = shrink[h] == top ? 1.0f : std::exp(shrink[h] - top);
        state[h].sum *= shrink[h];
        std::fill_n(shift + h * kRows, kRows, top == -INFINITY ? 0.0f : top);
        for (int i = n; i % kRows; i++) {
            x[i / kRows * kBlock + h * kRows + i % kRows] = -INFINITY;
        }
    }
    V sum[kVectors];
    for (int j = 0; j < kVectors; j++) {
        sum[j] = hn::Zero(d);
    }
    for (int i = 0; i < end; i += kBlock) {
        for (int j = 0; j < kVectors; j++) {
            float* at = x + i + j * kLanes;
            const V w = hn::Exp(
                    d, hn::Sub(hn::LoadU(d, at), hn::LoadU(d, shift + j * kLanes)));
            hn::StoreU(w, d, at);
            sum[j] = hn::Add(sum[j], w);
        }
    }
    each_row(sum, [](SoftmaxState& s, float w) { s.sum += w; });
}

/// output <- output * shrink + sum of weight * row over NV vectors of n rows,
/// for NQ queries; two vectors make a block, one is what is left of a row. The sum of a tile is
/// added as a whole: row by row a long sequence's output would lose what is small beside it.
/// @param rows     n pointers, `stride` apart, and those that stand in for missing ones up
///                 to a multiple of kRows
/// @param weights  blocks
/// @param asks     bits of those of kRows with which a row ahead is asked for
/// @param output   in the order of `load_half`
template <int NQ, int NV, class T, bool kScattered>
HWY_INLINE void add_value_columns(
        const T* const* rows,
        int stride,
        int n,
        RowsAhead<T, kScattered> ahead,
        unsigned asks,
        int column,
        int width,
        const float* weights,
        const float* shrink,
        float* output) {
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    V sum[NQ][NV];
    for (int h = 0; h < NQ; h++) {
        for (int j = 0; j < NV; j++) {
            sum[h][j] = hn::Zero(d);
        }
    }
    for (int i = 0; i < n; i += kRows) {
        for (int r = 0; r < kRows; r++) {
            if (asks >> r & 1) {
                ahead.ask(r);
            }
            const T* row = rows[r * stride] + column;
            V v[NV];
            if constexpr (NV == 1) {
                v[0] = load(d, row);
            } else {
                for (int j = 0; j < NV; j += 2) {
                    v[j] = load_half<0>(d, row + j * lanes);
                    v[j + 1] = load_half<1>(d, row + j * lanes);
                }
            }
            for (int h = 0; h < NQ; h++) {
                const V w = hn::Set(d, weights[h * kRows + r]);
                for (int j = 0; j < NV; j++) {
                    sum[h][j] = hn::MulAdd(w, v[j], sum[h][j]);
                }
            }
        }
        rows += kRows * stride;
        weights += kBlock;
        ahead = ahead.from(kRows);
    }
    for (int h = 0; h < NQ; h++) {
        const V factor = hn::Set(d, shrink[h]);
        for (int j = 0; j < NV; j++) {
            float* o = output + h * width + column + j * lanes;
            hn::StoreU(hn::MulAdd(hn::LoadU(d, o), factor, sum[h][j]), d, o);
        }
    }
}

/// The same over whole rows.
/// @param ahead    n of each kind, up to a multiple of kRows
/// @param output   size NQ * width
template <int NQ, class T, bool kScattered>
HWY_INLINE void add_values(
        const T* const* rows,
        int stride,
        int n,
        const RowsAhead<T, kScattered>& ahead,
        int width,
        const float* weights,
        const float* shrink,
        float* output) {
    const int lanes = static_cast<int>(hn::Lanes(D()));
    const int vectors = width / lanes;
    const int passes = vectors / 4 + vectors % 4 / 2 + vectors % 2;
    int c = 0, pass = 0;
    const auto add = [&](auto count) HWY_ATTR {
        unsigned asks = 0; // with each row in one of the passes
        for (int r = 0; r < kRows; r++) {
            asks |= unsigned(r % passes == pass) << r;
        }
        pass++;
        add_value_columns<NQ, count>(
                rows,
                stride,
                n,
                ahead,
                asks,
                c,
                width,
                weights,
                shrink,
                output);
        c += count * lanes;
    };
    while (c + 4 * lanes <= width) {
        add(std::integral_constant<int, 4>());
    }
    if (c + 2 * lanes <= width) {
        add(std::integral_constant<int, 2>());
    }
    if (c + lanes <= width) {
        add(std::integral_constant<int, 1>());
    }
    for (; c < width; c++) {
        for (int h = 0; h < NQ; h++) {
            float sum = 0;
            for (int i = 0; i < n; i++) {
                sum += weights[i / kRows * kBlock + h * kRows + i % kRows] *
                        to_scalar(rows[i * stride] + c);
            }
            float& o = output[h * width + c];
            o = o * shrink[h] + sum;
        }
    }
}

/// Where the rows of a KV head lie: KvView::key or ::value, with what does not
/// depend on the slot worked out once.
template <class T>
struct HeadRows {
    const T* base;
    int64_t token_stride, page_stride;
    const int32_t* page_table;
    int page_size;

    static HeadRows keys(const KvView& kv, int head) {
        return {static_cast<const T*>(kv.k) + head * kv.k_head_stride,
                kv.k_token_stride, kv.k_page_stride, kv.page_table, kv.page_size};
    }
    static HeadRows values(const KvView& kv, int head) {
        return {static_cast<const T*>(kv.v) + head * kv.v_head_stride,
                kv.v_token_stride, kv.v_page_stride, kv.page_table, kv.page_size};
    }
    HWY_INLINE const T* at(int64_t slot) const {
        if (!page_table) {
            return base + slot * token_stride;
        }
        return base + page_table[slot / page_size] * page_stride +
                slot % page_size * token_stride;
    }
};

/// An online softmax (Milakov and Gimelshein, arXiv 1805.02867) over tiles,
/// the next of which is prefetched meanwhile.
///
/// Tiles follow each other by tokens, heads in turns. In the usual layout the
/// rows of all heads of a token are neighbours: in this order memory gives
/// nearly what it gives to a sequential reader, and half of it head by head;
/// of scattered rows more share a page, and its translation.
///
/// Rows are asked for a tile ahead, into the second cache, as more of them may be
/// under way to it than to the first. Scattered ones go from there into the first half a
/// tile ahead: loads that miss it make the hardware fetch what nobody reads.
/// @tparam kScattered  lists of slots are read, not a range of them
template <class T, bool kScattered>
struct OnlineSoftmax {
    const AttendKernelParams& p;
    const int d, d_v;
    const int queries; ///< of all heads
    const int tokens_per_tile;
    Aligned<float> q;      ///< in the order of `arrange_queries`
    Aligned<float> output; ///< in that of `load_half`
    std::vector<SoftmaxState> state; ///< of each query
    /// `n` rows of some heads, token by token. The last key stands in for missing ones, and
    /// zeros for values: a weight of 0 makes NaN of an infinite one.
    struct Tile {
        int n = 0; ///< 0: there is none
        int first_head = 0;
        std::vector<const T*> keys, values; ///< of a whole tile
    };
    const std::vector<T> no_row; ///< zeros
    Tile now, next;
    std::vector<int64_t> taken; ///< of each head's rows

    explicit OnlineSoftmax(const AttendKernelParams& params)
            : p(params),
              d(p.kv->d),
              d_v(p.kv->d_v),
              queries(p.heads * p.nq),
              tokens_per_tile(static_cast<int>(std::clamp<int64_t>(
                      kTileBytes /
                              (int64_t(heads()) * (d + d_v) * sizeof(T)) / 16 *
                              16,
                      16,
                      kTile))),
              q(hwy::AllocateAligned<float>(size_t(queries) * d)),
              output(hwy::AllocateAligned<float>(size_t(queries) * d_v)),
              state(queries),
              no_row(std::max(d, d_v)),
              taken(kScattered ? p.heads : 1, 0) {
        for (Tile* tile : {&now, &next}) {
            tile->keys.assign(tokens_per_tile * heads(), no_row.data());
            tile->values = tile->keys;
        }
        std::fill_n(output.get(), size_t(queries) * d_v, 0.0f);
        for (int i = 0; i < queries; i += p.nq) { // of a head
            for (int first = 0; first < p.nq; first += kQueries) {
                const int64_t at = int64_t(i + first) * d;
                arrange_queries<T>(
                        std::min(kQueries, p.nq - first), d, p.queries + at, q.get() + at);
            }
        }
    }

    /// Of a tile.
    HWY_INLINE int heads() const {
        return kScattered ? 1 : p.heads;
    }

    /// Rows of a head, in whole blocks.
    static HWY_INLINE int padded(int n) {
        return (n + kRows - 1) / kRows * kRows;
    }

    /// @param slot  a function of i = 0 .. n - 1
    template <class Slot>
    HWY_INLINE void fill(Tile& tile, int n, const Slot& slot) const {
        tile.n = n;
        for (int h = 0; h < heads(); h++) {
            const int head = kScattered ? p.lists[tile.first_head].kv_head
                                        : p.kv_head + h;
            const auto k = HeadRows<T>::keys(*p.kv, head);
            const auto v = HeadRows<T>::values(*p.kv, head);
            const T** to_k = tile.keys.data() + h;
            const T** to_v = tile.values.data() + h;
            for (int i = 0; i < n; i++) {
                const int64_t s = slot(i);
                to_k[i * heads()] = k.at(s);
                to_v[i * heads()] = v.at(s);
            }
            for (int i = n; i < tokens_per_tile; i++) {
                to_k[i * heads()] = n > 0 ? to_k[(n - 1) * heads()] : no_row.data();
                to_v[i * heads()] = no_row.data();
            }
        }
    }

    HWY_INLINE int at_most_a_tile(int64_t tokens) const {
        return static_cast<int>(std::min<int64_t>(tokens, tokens_per_tile));
    }

    /// The tile after those taken: the next tokens of all heads, or of the head
    /// whose next slot is the lowest.
    void take(Tile& tile) {
        if constexpr (!kScattered) {
            const int64_t first = p.begin + taken[0];
            const int n = at_most_a_tile(p.end - first);
            fill(tile, n, [&](int i) { return first + i; });
            taken[0] += n;
            return;
        }
        int h = -1;
        for (int i = 0; i < p.heads; i++) {
            const auto& list = p.lists[i];
            if (taken[i] < list.n &&
                (h < 0 || list.slots[taken[i]] < p.lists[h].slots[taken[h]])) {
                h = i;
            }
        }
        if (h < 0) {
            fill(tile, 0, [](int) { return 0; });
            return;
        }
        tile.first_head = h;
        const int32_t* slots = p.lists[h].slots + taken[h];
        const int n = at_most_a_tile(p.lists[h].n - taken[h]);
        fill(tile, n, [&](int i) { return slots[i]; });
        taken[h] += n;
    }

    /// What is asked for during products, and during sums of values: as many rows as are at
    /// work, or where a tile is longer than the one before it, those beyond.
    using Ahead = RowsAhead<T, kScattered>;
    HWY_INLINE Ahead keys_ahead(int rows) const {
        return {next.keys.data(), now.values.data(), key_bytes(), value_bytes(), rows};
    }
    HWY_INLINE Ahead values_ahead(int rows) const {
        return {next.values.data(), next.keys.data(), value_bytes(), key_bytes(), rows};
    }
    HWY_INLINE int key_bytes() const {
        return d * static_cast<int>(sizeof(T));
    }
    HWY_INLINE int value_bytes() const {
        return d_v * static_cast<int>(sizeof(T));
    }

    /// Queries first .. first + NQ - 1 over the rows of head h of the tile.
    /// @param asks  for rows ahead
    template <int NQ>
    void add_tile(int h, int first, bool asks) {
        static_assert(kTile % kRows == 0);
        alignas(64) float weights[kTile / kRows * kBlock];
        float shrink[NQ];
        const int asked = h * padded(now.n); // by the heads before
        const int end = asks ? asked + padded(now.n) : asked;
        const Ahead keys = keys_ahead(end).from(asked);
        for (int i = 0; i < now.n; i += kRows) {
            inner_products_of_rows<NQ, kScattered>(
                    now.keys.data() + i * heads() + h,
                    heads(),
                    d,
                    q.get() + int64_t(first) * d,
                    keys.from(i),
                    weights + i / kRows * kBlock);
        }
        weigh_tile<NQ>(p.scale, now.n, weights, state.data() + first, shrink);
        add_values<NQ>(
                now.values.data() + h,
                heads(),
                now.n,
                values_ahead(end).from(asked),
                d_v,
                weights,
                shrink,
                output.get() + int64_t(first) * d_v);
    }

    /// At most NQ of `count` queries.
    template <int NQ>
    void add_queries(int count, int h, int first, bool asks) {
        if constexpr (NQ > 1) {
            if (count < NQ) {
                add_queries<NQ - 1>(count, h, first, asks);
                return;
            }
        }
        add_tile<NQ>(h, first, asks);
    }

    void look_ahead() {
        take(next);
        if constexpr (!kScattered) {
            return;
        }
        // A prefetch whose address must be translated holds up all that follows it, so
        // translations had better overlap.
        for (int i = 0; i < next.n; i++) {
            __builtin_prefetch(next.keys[i], 0, 2);
        }
        for (int i = 0; i < next.n; i++) {
            __builtin_prefetch(next.values[i], 0, 2);
        }
    }

    void run() {
        look_ahead();
        while (next.n > 0) {
            // The first tile, or what a shorter one before it left.
            const int rows = next.n * heads();
            for (int i = padded(now.n) * heads(); i < rows; i++) {
                keys_ahead(rows).ask(i);
                values_ahead(rows).ask(i);
            }
            std::swap(now, next);
            look_ahead();
            for (int h = 0; h < heads(); h++) {
                // Queries in groups that share the loads of a row; the first
                // group asks for what is ahead.
                const int begin = (now.first_head + h) * p.nq;
                const int end = begin + p.nq;
                for (int first = begin; first < end; first += kQueries) {
                    add_queries<kQueries>(end - first, h, first, first == begin);
                }
            }
        }
        for (int64_t i = 0; i < queries; i++) {
            const SoftmaxState& s = state[i];
            const float norm = (s.sum > 0 ? static_cast<float>(1 / s.sum) : 0.0f) + s.poison;
            restore<T>(d_v, output.get() + i * d_v, norm, p.output + i * d_v);
            p.lse[i] = s.sum > 0 ? static_cast<float>(s.maximum + std::log(s.sum)) : -INFINITY;
            p.lse[i] += s.poison;
        }
    }
};

template <class T>
void attend_rows(const AttendKernelParams& p) {
    if (p.lists) {
        OnlineSoftmax<T, true>(p).run();
    } else {
        OnlineSoftmax<T, false>(p).run();
    }
}

void Attend(const AttendKernelParams& p) {
    switch (p.kv->dtype) {
        case DType::float32:
            attend_rows<float>(p);
            break;
        case DType::float16:
            attend_rows<hwy::float16_t>(p);
            break;
        case DType::bfloat16:
            attend_rows<hwy::bfloat16_t>(p);
            break;
    }
}

template <int NQ, class T>
void inner_products_of(
        int d,
        const float* q,
        int64_t n,
        const T* rows,
        float* out) {
    alignas(64) float products[kBlock];
    for (int64_t begin = 0; begin < n; begin += kRows) {
        const int64_t count = std::min<int64_t>(kRows, n - begin);
        const T* row[kRows]; // the last row stands in for missing ones
        for (int r = 0; r < kRows; r++) {
            row[r] = rows + (begin + std::min<int64_t>(r, count - 1)) * d;
        }
        // The hardware's own prefetch stops at the end of a page, which holds
        // but eight vectors of 128 components; so far ahead that enough lines
        // are under way.
        constexpr int64_t kAhead = 6144; // bytes
        const auto* all = reinterpret_cast<const char*>(rows);
        const auto row_bytes = static_cast<int64_t>(d * sizeof(T));
        const int64_t ahead = begin * row_bytes + kAhead;
        const int64_t end = std::min(ahead + kRows * row_bytes, n * row_bytes);
        for (int64_t b = ahead; b < end; b += 64) {
            __builtin_prefetch(all + b);
        }
        inner_products_of_rows<NQ, false>(row, 1, d, q, RowsAhead<T, false>(), products);
        for (int h = 0; h < NQ; h++) {
            std::copy_n(products + h * kRows, count, out + h * n + begin);
        }
    }
}

template <class T>
void inner_products_with(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const T* rows,
        float* out) {
    const Aligned<float> queries = hwy::AllocateAligned<float>(size_t(kQueries) * d);
    int i = 0;
    const auto compare = [&](auto count) HWY_ATTR {
        arrange_queries<T>(count, d, q + int64_t(i) * d, queries.get());
        inner_products_of<count>(d, queries.get(), n, rows, out + i * n);
        i += count;
    };
    while (i + kQueries <= nq) {
        compare(std::integral_constant<int, kQueries>());
    }
    while (i < nq) {
        compare(std::integral_constant<int, 1>());
    }
}

void InnerProducts(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const VectorRows& rows,
        float* out) {
    if (rows.type == DType::bfloat16) {
        const auto* at = static_cast<const hwy::bfloat16_t*>(rows.data);
        inner_products_with(nq, d, q, n, at, out);
    } else {
        inner_products_with(nq, d, q, n, static_cast<const float*>(rows.data), out);
    }
}

float MergeParts(
        int64_t n,
        int64_t stride,
        int d_v,
        const float* part,
        const float* part_lse,
        float* output,
        float lse) {
    if (lse == -INFINITY) {
        std::fill_n(output, d_v, 0.0f);
    }
    float maximum = lse;
    for (int64_t i = 0; i < n; i++) {
        maximum = std::max(maximum, part_lse[i * stride]);
    }
    const float shift = maximum > -INFINITY ? maximum : 0.0f;
    std::vector<float> weights(n + 1); // the last one for what is there
    float sum = 0;
    for (int64_t i = 0; i <= n; i++) {
        weights[i] = std::exp((i < n ? part_lse[i * stride] : lse) - shift);
        sum += weights[i];
    }
    if (sum == 0) {
        return lse; // all of them are empty
    }
    const D d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    const V norm = hn::Set(d, 1 / sum);
    int c = 0;
    for (; c + lanes <= d_v; c += lanes) {
        V all = hn::Mul(hn::Set(d, weights[n]), hn::LoadU(d, output + c));
        for (int64_t i = 0; i < n; i++) {
            all = hn::MulAdd(
                    hn::Set(d, weights[i]), hn::LoadU(d, part + i * stride * d_v + c), all);
        }
        hn::StoreU(hn::Mul(all, norm), d, output + c);
    }
    for (; c < d_v; c++) {
        float all = weights[n] * output[c];
        for (int64_t i = 0; i < n; i++) {
            all += weights[i] * part[i * stride * d_v + c];
        }
        output[c] = all / sum;
    }
    return shift + std::log(sum);
}

/// bfloat16, in place: a call for each block would cost as much as the block.
HWY_INLINE float bfloat16_at(const uint8_t* p) {
    uint16_t upper;
    std::memcpy(&upper, p, sizeof(upper));
    const uint32_t bits = uint32_t(upper) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

/// NQ queries, padded to whole blocks, and the sums of their blocks.
template <int NQ>
void code_products_of(
        int blocks,
        const float* q,
        const float* sums,
        int64_t n,
        const uint8_t* const* codes,
        float* out) {
    const D d;
    const hn::RebindToSigned<D> d32;
    const hn::Rebind<uint8_t, D> d8;
    const int lanes = static_cast<int>(hn::Lanes(d));
    constexpr int kHalf = kCodeBlock / 2;
    const int width = blocks * kCodeBlock;
    const auto low = hn::Set(d32, 15);
    constexpr int kAhead = 8; // rows: most lie on a page of their own
    for (int64_t i = 0; i < n; i++) {
        if (i + kAhead < n) {
            const int bytes = blocks * kCodeBlockBytes;
            for (int b = 0; b < bytes; b += 64) {
                __builtin_prefetch(codes[i + kAhead] + b);
            }
            // Codes begin anywhere in a cache line.
            __builtin_prefetch(codes[i + kAhead] + bytes - 1);
        }
        V total[NQ];
        float base_part[NQ] = {};
        for (int h = 0; h < NQ; h++) {
            total[h] = hn::Zero(d);
        }
        for (int b = 0; b < blocks; b++) {
            const uint8_t* block = codes[i] + b * kCodeBlockBytes;
            const float base = bfloat16_at(block);
            const V step = hn::Set(d, bfloat16_at(block + 2));
            V sum[NQ];
            for (int h = 0; h < NQ; h++) {
                sum[h] = hn::Zero(d);
                base_part[h] += base * sums[h * blocks + b];
            }
            for (int c = 0; c < kHalf; c += lanes) {
                const auto pairs =
                        hn::PromoteTo(d32, hn::LoadU(d8, block + 4 + c));
                const V first = hn::ConvertTo(d, hn::And(pairs, low));
                const V second = hn::ConvertTo(d, hn::ShiftRight<4>(pairs));
                for (int h = 0; h < NQ; h++) {
                    const float* x = q + h * width + b * kCodeBlock + c;
                    sum[h] = hn::MulAdd(first, hn::LoadU(d, x), sum[h]);
                    sum[h] = hn::MulAdd(second, hn::LoadU(d, x + kHalf), sum[h]);
                }
            }
            for (int h = 0; h < NQ; h++) {
                total[h] = hn::MulAdd(step, sum[h], total[h]);
            }
        }
        for (int h = 0; h < NQ; h++) {
            out[h * n + i] =
                    base_part[h] + hn::GetLane(hn::SumOfLanes(d, total[h]));
        }
    }
}

void CodeProducts(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const uint8_t* const* codes,
        float* out) {
    const int blocks = (d + kCodeBlock - 1) / kCodeBlock;
    const int width = blocks * kCodeBlock;
    const Aligned<float> padded =
            hwy::AllocateAligned<float>(size_t(nq) * width);
    std::fill_n(padded.get(), size_t(nq) * width, 0.0f);
    std::vector<float> sums(size_t(nq) * blocks, 0.0f);
    for (int h = 0; h < nq; h++) {
        std::copy_n(q + size_t(h) * d, d, padded.get() + size_t(h) * width);
        for (int c = 0; c < d; c++) {
            sums[h * blocks + c / kCodeBlock] += q[size_t(h) * d + c];
        }
    }
    int h = 0;
    for (; h + kQueries <= nq; h += kQueries) {
        code_products_of<kQueries>(
                blocks,
                padded.get() + size_t(h) * width,
                sums.data() + h * blocks,
                n,
                codes,
                out + h * n);
    }
    for (; h < nq; h++) {
        code_products_of<1>(
                blocks,
                padded.get() + size_t(h) * width,
                sums.data() + h * blocks,
                n,
                codes,
                out + h * n);
    }
}

void CountBits(int64_t n, const uint64_t* words, uint8_t* counts) {
    const hn::CappedTag<uint64_t, 8> d;
    const auto lanes = static_cast<int64_t>(hn::Lanes(d));
    alignas(64) uint64_t of_lane[8];
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        hn::Store(hn::PopulationCount(hn::LoadU(d, words + i)), d, of_lane);
        for (int64_t j = 0; j < lanes; j++) {
            counts[i + j] = static_cast<uint8_t>(of_lane[j]);
        }
    }
    for (; i < n; i++) {
        counts[i] = static_cast<uint8_t>(__builtin_popcountll(words[i]));
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
HWY_EXPORT(MergeParts);
HWY_EXPORT(CodeProducts);
HWY_EXPORT(CountBits);
HWY_EXPORT(ShareScores);

// Without queries there is nothing to do, and Highway allocates no memory of size 0.

void attend_kernel(const AttendKernelParams& params) {
    if (params.heads == 0 || params.nq == 0) {
        return;
    }
    HWY_DYNAMIC_DISPATCH(Attend)(params);
}

void inner_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const VectorRows& rows,
        float* out) {
    if (nq == 0) {
        return;
    }
    HWY_DYNAMIC_DISPATCH(InnerProducts)(nq, d, q, n, rows, out);
}

float merge_parts(
        int64_t n,
        int64_t stride,
        int d_v,
        const float* part,
        const float* part_lse,
        float* output,
        float lse) {
    return HWY_DYNAMIC_DISPATCH(MergeParts)(n, stride, d_v, part, part_lse, output, lse);
}

void code_products(
        int nq,
        int d,
        const float* q,
        int64_t n,
        const uint8_t* const* codes,
        float* out) {
    HWY_DYNAMIC_DISPATCH(CodeProducts)(nq, d, q, n, codes, out);
}

void count_bits(int64_t n, const uint64_t* words, uint8_t* counts) {
    HWY_DYNAMIC_DISPATCH(CountBits)(n, words, counts);
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
