/// Rows of weights times vectors in shared memory, on tensor cores. Device code.
#pragma once

#include <faiss_saap/host_device.h>

#include "bulk_copies.cuh"
#include "decode_threads.cuh"
#include "device_vectors.cuh"
#include "mma.cuh"

namespace faiss_saap::gpu {

constexpr int kTileRows = 16, kTileVectors = 8; ///< that a warp multiplies at once
constexpr int kPieceColumns = 32;               ///< of a tile

/// What vectors are padded to.
FAISS_SAAP_HOST_DEVICE inline int padded_columns(int n) {
    return (n + kPieceColumns - 1) / kPieceColumns * kPieceColumns;
}

__device__ __forceinline__ uint4 load_words(uint32_t at) {
    const float4 x = load_shared(at);
    return make_uint4(
            __float_as_uint(x.x),
            __float_as_uint(x.y),
            __float_as_uint(x.z),
            __float_as_uint(x.w));
}

/// What to multiply: rows [first, end) of each of `heads` matrices with up to
/// kTileVectors vectors: the matrices have one each, or the one matrix has n.
struct RowProducts {
    const void* rows = nullptr;  ///< row `first` of the first matrix, bfloat16 or float
    const float* bias = nullptr; ///< of that row; may be null
    int matrix = 0;      ///< rows from one matrix to the next
    int bias_matrix = 0; ///< biases likewise, or from one vector to the next
    int cols = 0;                    ///< a multiple of 8
    int first = 0, end = 0;
    // Small, as a block keeps many of these.
    uint8_t bf16 = 0, heads = 1, n = 1;
    uint8_t biases = 1;     ///< one for all vectors, or one for each
    uint8_t everywhere = 0; ///< all blocks have these rows
    uint8_t kept = 0;       ///< rows and biases lie in shared memory

    // How the warps share out the tiles: whole ones, or, where there are few, ranges of
    // their pieces.
    uint8_t log_warps = 0;          ///< that have one tile, as a power of two
    uint16_t tiles = 0, pieces = 0; ///< tiles of a matrix, pieces of a tile

    /// After all but these are known.
    __device__ __forceinline__ void share_out(int warps, bool splits) {
        tiles = (end - first + kTileRows - 1) / kTileRows;
        pieces = (cols + kPieceColumns - 1) / kPieceColumns;
        log_warps = 0;
#pragma unroll 1
        while (splits && items() << (log_warps + 1) <= warps &&
               2 << log_warps <= pieces) {
            log_warps++;
        }
    }
    __device__ __forceinline__ int items() const {
        return heads * tiles;
    }
    __device__ __forceinline__ int bytes_of_row() const {
        return cols * (bf16 ? 2 : 4);
    }
    /// Of all of them, and of their biases.
    __device__ __forceinline__ int bytes() const {
        return heads * (end - first) * bytes_of_row();
    }
    __device__ __forceinline__ int bytes_of_bias() const {
        return bias ? biases * (end - first) * int(sizeof(float)) : 0;
    }
};

/// Brings the rows nearer. Weights never change: this may be done before the kernels
/// before have ended. By a warp.
__device__ __forceinline__ void prefetch_products(const RowProducts& p) {
    const int rows = p.end - p.first;
#pragma unroll 1
    for (int h = 0; h < p.heads; h++) {
        prefetch_bytes(
                static_cast<const char*>(p.rows) +
                        int64_t(h) * p.matrix * p.bytes_of_row(),
                rows * p.bytes_of_row(),
                threadIdx.x % 32,
                32);
    }
#pragma unroll 1
    for (int h = 0; p.bias && h < p.biases; h++) {
        prefetch_bytes(
                reinterpret_cast<const char*>(p.bias + int64_t(h) * p.bias_matrix),
                rows * int(sizeof(float)),
                threadIdx.x % 32,
                32);
    }
}

/// Sends for the rows, to lie one matrix after the other. By one thread.
__device__ __forceinline__ void copy_rows(
        const RowProducts& p,
        char* to,
        const BulkCopies& copies) {
    const int of_matrix = (p.end - p.first) * p.bytes_of_row();
    const auto* from = static_cast<const char*>(p.rows);
#pragma unroll 1
    for (int h = 0; of_matrix && h < p.heads; h++) {
        copies.send_for(to + h * of_matrix, from, of_matrix);
        from += int64_t(p.matrix) * p.bytes_of_row();
    }
}

/// Sends for the biases, likewise. By a warp.
__device__ __forceinline__ void copy_biases(const RowProducts& p, char* to) {
    const int rows = p.end - p.first;
#pragma unroll 1
    for (int h = 0; p.bias && h < p.biases; h++) {
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < rows; i += 32) {
            copy_4_bytes(
                    to + (h * rows + i) * int(sizeof(float)),
                    p.bias + int64_t(h) * p.bias_matrix + i);
        }
    }
}

/// Both parts of a SplitFloat in one word.
__device__ __forceinline__ uint32_t split_float(float x) {
    const float high = __uint_as_float(pack<__nv_bfloat16>(x, 0.0f) << 16);
    return pack<__nv_bfloat16>(high, x - high);
}
__device__ __forceinline__ float joined_float(uint32_t x) {
    return __uint_as_float(x << 16) + __uint_as_float(x & 0xffff0000u);
}

/// A lane's pieces of 32 columns of a tile: eight columns of its row and of the eighth row
/// after it. Columns may come in any order, as long as rows and vectors have the same: so
/// a lane's are the ones that lie beside each other.
template <bool Bf16>
struct TilePiece {
    static constexpr int kWords = Bf16 ? 1 : 2;
    uint4 row[2][kWords];

    __device__ __forceinline__ void load(const char* at, const char* below) {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            row[0][i] = reinterpret_cast<const uint4*>(at)[i];
            row[1][i] = reinterpret_cast<const uint4*>(below)[i];
        }
    }

    /// c[0] += this * the vectors, c[1] likewise by what is small.
    /// @param x, next  the lane's columns of its vector, by split_float
    __device__ __forceinline__ void multiply(
            float (&c)[2][4],
            const uint4& x,
            const uint4& next) const {
        const uint32_t words[8] = {
                x.x, x.y, x.z, x.w, next.x, next.y, next.z, next.w};
        uint32_t high[4], low[4]; // of the vector
#pragma unroll
        for (int i = 0; i < 4; i++) {
            high[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x5410);
            low[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7632);
        }
        uint32_t a[2][4], rest[2][4]; // of the rows, and what bfloat16 leaves of floats
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if constexpr (Bf16) {
                const uint4& w = row[r][0];
                a[r][0] = w.x;
                a[r][1] = w.y;
                a[r][2] = w.z;
                a[r][3] = w.w;
            } else {
                const auto* w = reinterpret_cast<const float*>(row[r]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[r][i] = pack<__nv_bfloat16>(w[2 * i], w[2 * i + 1]);
                    rest[r][i] = pack<__nv_bfloat16>(
                            w[2 * i] - __uint_as_float(a[r][i] << 16),
                            w[2 * i + 1] - __uint_as_float(a[r][i] & 0xffff0000u));
                }
            }
        }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const uint32_t tile[4] = {
                    a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1]};
            multiply_add<__nv_bfloat16>(c[0], tile, high[2 * s], high[2 * s + 1]);
            multiply_add<__nv_bfloat16>(c[1], tile, low[2 * s], low[2 * s + 1]);
            if constexpr (!Bf16) {
                const uint32_t of_rest[4] = {
                        rest[0][2 * s],
                        rest[1][2 * s],
                        rest[0][2 * s + 1],
                        rest[1][2 * s + 1]};
                multiply_add<__nv_bfloat16>(
                        c[1], of_rest, high[2 * s], high[2 * s + 1]);
            }
        }
    }
};

/// Where warps that share a tile leave their products, in shared memory: of each warp.
struct ProductRoom {
    float* products = nullptr;
    int log_columns = 0; ///< room for as many vectors, as a power of two

    __device__ __forceinline__ float& at(int warp, int row, int v) const {
        return products[((warp * kTileRows + row) << log_columns) + v];
    }
};

/// Calls `emit` with v, the row among the block's, and the product with the bias, for each tile
/// that the warp has whole; else leaves the products of its pieces in `room`.
/// @tparam Warps  which share the tiles: so many in a row, the first a multiple of that
template <bool Bf16, int Warps, class Emit>
__device__ __forceinline__ void multiply_tiles(
        const RowProducts& p,
        const uint32_t* x,
        int x_stride,
        const ProductRoom& room,
        const Emit& emit) {
    constexpr int kPieces = Bf16 ? 4 : 1; // on their way
    constexpr int kElement = Bf16 ? 2 : 4;
    const int warp = threadIdx.x / 32 % Warps;
    const int quad = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    const int vectors = p.heads > 1 ? p.heads : p.n, rows = p.end - p.first;
    const uint32_t of_lane =
            shared_address(x + min(quad, vectors - 1) * x_stride + 8 * part);
    const int each = (p.pieces + (1 << p.log_warps) - 1) >> p.log_warps;
    const int begin = (warp & ((1 << p.log_warps) - 1)) * each;
    const int end = min(p.pieces, begin + each);
    const int step = Warps >> p.log_warps;
    const auto head_of = [&](int item) {
        return p.heads > 1 ? item / p.tiles : 0;
    };
    // Rows that are not there are read as the last one, columns as the last ones: what
    // comes of rows is dropped, and vectors are 0 there.
    const char *at, *below;
    float bias[2][2] = {}; // of the lane's products of that tile, if it is a warp's alone
    const auto go_to = [&](int item) {
        const int head = head_of(item);
        const int row = (item - head * p.tiles) * kTileRows + quad;
        if (p.bias && p.log_warps == 0) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int v = min(p.biases - 1, 2 * part + j);
                    bias[half][j] = p.bias[v * p.bias_matrix + min(row + 8 * half, rows - 1)];
                }
            }
        }
        const int of_row = p.cols * kElement;
        const char* first = static_cast<const char*>(p.rows) +
                int64_t(head) * p.matrix * of_row;
        at = first + min(row, rows - 1) * of_row;
        below = first + min(row + 8, rows - 1) * of_row;
    };
    TilePiece<Bf16> tile[kPieces];
    const auto send = [&](int piece, TilePiece<Bf16>& to) {
        const int column =
                min(piece * kPieceColumns + 8 * part, p.cols - 8) * kElement;
        to.load(at + column, below + column);
    };
    int item = warp >> p.log_warps, piece = begin; // that are multiplied now
    int next_item = item, next_piece = begin;           // and that are on their way
    if (item >= p.items()) {
        return;
    }
    go_to(item);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
        if (begin + i < end) {
            send(begin + i, tile[i]);
        }
    }
    float c[2][4] = {{bias[0][0], bias[0][1], bias[1][0], bias[1][1]}};
#pragma unroll 1
    while (item < p.items()) {
        next_piece += kPieces;
        if (next_piece >= end) {
            next_piece = begin;
            next_item += step;
            if (next_item < p.items()) {
                go_to(next_item);
            }
        }
        const bool more = next_item < p.items();
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (piece + i < end) {
                const uint32_t from = of_lane + 4 * (piece + i) * kPieceColumns;
                tile[i].multiply(c, load_words(from), load_words(from + 16));
            }
            if (more && next_piece + i < end) {
                send(next_piece + i, tile[i]);
            }
        }
        if (next_item != item) {
            // Of this lane: vectors 2 * part and the next, of two rows.
            const int head = head_of(item);
            const int first = (item - head * p.tiles) * kTileRows + quad;
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int v = 2 * part + j, row = first + 8 * half;
                    const float value = c[0][2 * half + j] + c[1][2 * half + j];
                    c[0][2 * half + j] = bias[half][j]; // of the next
                    c[1][2 * half + j] = 0;
                    if (p.log_warps) {
                        if (v < 1 << room.log_columns) {
                            room.at(warp, quad + 8 * half, v) = value;
                        }
                    } else if ((p.heads > 1 ? v == head : v < p.n) && row < rows) {
                        emit(v, row, value);
                    }
                }
            }
        }
        item = next_item;
        piece = next_piece;
    }
}

/// Row r times x_v + bias, for all rows and vectors, by some warps of a block; those that
/// share tiles are all that choose.
/// @param x     shared memory, vectors of words by split_float, x_stride words apart, with
///              zeros up to a multiple of kPieceColumns
/// @param room  for as many vectors
/// @param emit  called with v, r and the result
template <int Warps = kWarps, class Emit>
__device__ __forceinline__ void multiply_rows(
        const RowProducts p, // in registers, as what is written may lie anywhere
        const uint32_t* x,
        int x_stride,
        const ProductRoom& room,
        const Emit& emit) {
    const auto emit_row = [&](int v, int row, float value) {
        emit(v, p.first + row, value);
    };
    if (p.bf16) {
        multiply_tiles<true, Warps>(p, x, x_stride, room, emit_row);
    } else {
        multiply_tiles<false, Warps>(p, x, x_stride, room, emit_row);
    }
    if (Warps < kWarps || p.log_warps == 0) {
        return;
    }
    sync_choosers();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.items() * kTileRows << room.log_columns;
         i += kThreads) {
        const int v = i & ((1 << room.log_columns) - 1);
        const int in_tile = (i >> room.log_columns) % kTileRows;
        const int item = (i >> room.log_columns) / kTileRows;
        const int head = p.heads > 1 ? item / p.tiles : 0;
        const int row = (item - head * p.tiles) * kTileRows + in_tile;
        if ((p.heads > 1 ? v != head : v >= p.n) || row >= p.end - p.first) {
            continue;
        }
        const int of_bias = p.biases > 1 ? v : 0;
        float sum = p.bias ? p.bias[of_bias * p.bias_matrix + row] : 0.0f;
#pragma unroll 4
        for (int w = 0; w < 1 << p.log_warps; w++) {
            sum += room.at((item << p.log_warps) + w, in_tile, v);
        }
        emit_row(v, row, sum);
    }
}

/// Whether multiply_short_rows() can multiply what multiply_rows() can.
template <int D>
__device__ __forceinline__ bool is_short(const RowProducts& p) {
    return p.kept && p.bf16 && p.cols == D && p.heads == 1;
}

/// multiply_rows() for bfloat16 rows of D columns in shared memory, whole tiles for each
/// warp: fewer instructions, which is what a product of so little costs.
template <int D, class Emit>
__device__ __forceinline__ void multiply_short_rows(
        const RowProducts p,
        const uint32_t* x,
        int x_stride,
        const Emit& emit) {
    constexpr int kPieces = D / kPieceColumns, kStep = 2 * kPieceColumns; // bytes
    const int part = threadIdx.x % 4, quad = threadIdx.x % 32 / 4;
    const uint32_t of_lane = shared_address(x + min(quad, p.n - 1) * x_stride + 8 * part);
    const uint32_t rows = shared_address(p.rows) + 16 * part;
    const int n = p.end - p.first, step = kTileRows * kWarps;
#pragma unroll 1
    for (int first = kTileRows * (threadIdx.x / 32); first < n; first += step) {
        const int row[2] = {min(first + quad, n - 1), min(first + quad + 8, n - 1)};
        TilePiece<true> pieces[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                pieces[i].row[half][0] = load_words(rows + 2 * D * row[half] + kStep * i);
            }
        }
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            const uint32_t from = of_lane + 4 * kPieceColumns * i;
            pieces[i].multiply(c, load_words(from), load_words(from + 16));
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int v = min(2 * part + j, p.n - 1);
                const int of_bias = (p.biases > 1 ? v : 0) * p.bias_matrix + row[half];
                const float value = c[0][2 * half + j] + c[1][2 * half + j] +
                        (p.bias ? p.bias[of_bias] : 0.0f);
                if (2 * part + j < p.n && first + quad + 8 * half < n) {
                    emit(v, p.first + row[half], value);
                }
            }
        }
    }
}

/// Tiles of a warp on their way through shared memory, of bfloat16 rows of D columns, and their
/// biases. Where rows begin in the same banks, those of odd ones are turned by half.
template <int D>
struct TileRing {
    alignas(16) __nv_bfloat16 tiles[2][kTileRows * D];
    float biases[2][kTileRows];

    /// Pieces of so many columns take each other's places in a row.
    __device__ __forceinline__ static int turn_of_row(int row) {
        return D % (2 * kPieceColumns) == 0 ? row & 1 : 0;
    }
};

/// multiply_rows() for bfloat16 rows of D columns, with one bias each, that are far away: a warp
/// has two tiles on their way, for which it would not have the registers.
/// @tparam Warps  which share the tiles, whole ones
/// @param ring    the warp's
template <int D, int Warps, class Emit>
__device__ __forceinline__ void multiply_streamed_rows(
        const RowProducts& p,
        const uint32_t* x,
        int x_stride,
        TileRing<D>& ring,
        const Emit& emit) {
    constexpr int kPieces = D / kPieceColumns;
    const int lane = threadIdx.x % 32, part = lane % 4, quad = lane / 4;
    const int n = p.end - p.first, step = kTileRows * Warps;
    const auto send = [&](int first, int to) {
        constexpr int kChunks = D / 8, kOfPiece = kPieceColumns / 8; // 16 bytes each
#pragma unroll 4
        for (int i = lane; i < kTileRows * kChunks && first < n; i += 32) {
            const int row = i / kChunks, chunk = i % kChunks;
            const int turned = chunk ^ kOfPiece * TileRing<D>::turn_of_row(row);
            copy_16_bytes(
                    ring.tiles[to] + row * D + 8 * turned,
                    static_cast<const __nv_bfloat16*>(p.rows) +
                            min(first + row, n - 1) * D + 8 * chunk,
                    true);
        }
        if (p.bias && lane < kTileRows && first + lane < n) {
            copy_4_bytes(ring.biases[to] + lane, p.bias + first + lane);
        }
        commit_copies();
    };
    const int begin = kTileRows * (threadIdx.x / 32 % Warps);
    send(begin, 0);
    send(begin + step, 1);
    const uint32_t of_lane = shared_address(x + min(quad, p.n - 1) * x_stride + 8 * part);
    const int turn = TileRing<D>::turn_of_row(quad);
    int at = 0;
#pragma unroll 1
    for (int first = begin; first < n; first += step) {
        wait_for_copies<1>();
        __syncwarp();
        const uint32_t rows = shared_address(ring.tiles[at] + quad * D + 8 * part);
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            const uint32_t row = rows + 2 * kPieceColumns * (i ^ turn);
            TilePiece<true> piece;
            piece.row[0][0] = load_words(row);
            piece.row[1][0] = load_words(row + 2 * 8 * D);
            const uint32_t from = of_lane + 4 * kPieceColumns * i;
            piece.multiply(c, load_words(from), load_words(from + 16));
        }
        const float bias[2] = {
                p.bias ? ring.biases[at][quad] : 0, p.bias ? ring.biases[at][quad + 8] : 0};
        __syncwarp();
        send(first + 2 * step, at);
        at ^= 1;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int v = 2 * part + i % 2, row = first + quad + i / 2 * 8;
            if (v < p.n && row < n) {
                emit(v, p.first + row, c[0][i] + c[1][i] + bias[i / 2]);
            }
        }
    }
    wait_for_copies<0>();
}

} // namespace faiss_saap::gpu
