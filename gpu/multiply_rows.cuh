/// Rows of weights times vectors in shared memory. Device code.
#pragma once

#include "device_vectors.cuh"

namespace faiss_saap::gpu {

/// What to multiply: rows [first, end) of each of `heads` matrices. Where there are
/// several, each has a vector of its own; the one matrix has n. Vectors are `cols`
/// floats apart.
struct RowProducts {
    const void* rows = nullptr; ///< heads * nrow * cols, bfloat16 or float
    const float* bias = nullptr; ///< heads * nrow; may be null
    int bf16 = 0;
    int nrow = 0, cols = 0;
    int heads = 1;
    int first = 0, end = 0;
    int n = 1;
};

/// Brings the rows nearer. Weights never change: this may be done before the kernels
/// before have ended. By a block.
__device__ __forceinline__ void prefetch_products(const RowProducts& p) {
    const int of_row = p.cols * (p.bf16 ? 2 : 4), all = (p.end - p.first) * of_row;
#pragma unroll 1
    for (int h = 0; h < p.heads; h++) {
        prefetch_bytes(
                static_cast<const char*>(p.rows) +
                        (int64_t(h) * p.nrow + p.first) * of_row,
                all);
    }
}

/// Adds the products of a lane's pieces with up to four vectors.
/// @param at  where the vectors are in shared memory
template <RowType Type>
__device__ __forceinline__ void add_products(
        float (&sum)[2][4],
        const uint4 (&bits)[2][4],
        const uint32_t (&at)[4],
        int piece,
        int pieces) {
    constexpr int kBytes = Type == RowType::float32 ? 16 : 32; // of a vector's piece
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int offset = kBytes * min(piece + 8 * i, pieces - 1);
#pragma unroll
        for (int v = 0; v < 4; v++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                sum[r][v] += product_of_piece<Type>(bits[r][i], at[v] + offset);
            }
        }
    }
}

/// What a lane has at hand of two rows that eight lanes share: every eighth of 32 pieces
/// of 16 bytes.
struct RowPieces {
    uint4 bits[2][4];
};

/// What a warp multiplies at once: eight rows of one matrix.
struct RowItem {
    int head, row; ///< this lane's row of its matrix; it has the fourth after it, too

    __device__ __forceinline__ RowItem(const RowProducts& p, int item) {
        const int octets = (p.end - p.first + 7) / 8;
        const int lane = threadIdx.x % 32;
        head = p.heads > 1 ? item / octets : 0;
        row = p.first + 8 * (item - head * octets) + lane / 8;
    }
    __device__ static int count(const RowProducts& p) {
        return p.heads * ((p.end - p.first + 7) / 8);
    }
};

/// Sends for 32 pieces of an item's rows, of which this lane's begin at `first_piece`.
__device__ __forceinline__ void load_pieces(
        const RowProducts& p,
        int item,
        int first_piece,
        RowPieces& to) {
    const int pieces = p.bf16 ? p.cols / 8 : p.cols / 4;
    const bool there = item < RowItem::count(p);
    const RowItem at(p, there ? item : 0);
    const auto* row = static_cast<const uint4*>(p.rows) +
            (int64_t(at.head) * p.nrow + at.row) * pieces;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int piece = first_piece + 8 * i;
            to.bits[r][i] = there && at.row + 4 * r < p.end && piece < pieces
                    ? __ldg(row + 4 * r * pieces + piece)
                    : make_uint4(0, 0, 0, 0);
        }
    }
}

/// Sends for what multiply_rows needs first.
__device__ __forceinline__ void load_first_pieces(const RowProducts& p, RowPieces& to) {
    load_pieces(p, threadIdx.x / 32, threadIdx.x % 8, to);
}

/// Row r times x_v + bias[r] + add_v[r], for all rows and vectors, by all warps of a
/// block.
/// @param at_hand  by load_first_pieces
/// @param x        shared memory
/// @param add      shared memory, vectors add_stride floats apart; may be null. What
///                 emit writes there is not read again
/// @param emit     called with v, r and the result by two lanes each, of which `second`
///                 tells one
template <class Emit>
__device__ __forceinline__ void multiply_rows(
        const RowProducts& p,
        RowPieces& at_hand,
        const float* x,
        const float* add,
        int add_stride,
        const Emit& emit) {
    const int part = threadIdx.x % 8;
    const int pieces = p.bf16 ? p.cols / 8 : p.cols / 4;
    const uint32_t vectors = shared_address(x);
    const int items = RowItem::count(p), warp = threadIdx.x / 32;
#pragma unroll 1
    for (int item = warp; item < items; item += blockDim.x / 32) {
        const RowItem rows(p, item);
        float bias[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bias[r] = p.bias && rows.row + 4 * r < p.end
                    ? p.bias[rows.head * p.nrow + rows.row + 4 * r]
                    : 0.0f;
        }
#pragma unroll 1
        for (int v0 = 0; v0 < p.n; v0 += 4) {
            uint32_t at[4];
#pragma unroll
            for (int v = 0; v < 4; v++) {
                at[v] = vectors + 4 * (rows.head + min(v0 + v, p.n - 1)) * p.cols;
            }
            float sum[2][4] = {};
#pragma unroll 1
            for (int piece = part; piece < pieces; piece += 32) {
                const bool first = v0 == 0 && piece == part;
                if (!(first ? item == warp : pieces <= 32)) {
                    load_pieces(p, item, piece, at_hand);
                }
                if (p.bf16) {
                    add_products<RowType::bfloat16>(sum, at_hand.bits, at, piece, pieces);
                } else {
                    add_products<RowType::float32>(sum, at_hand.bits, at, piece, pieces);
                }
            }
            // Lane l is left with vector l % 4.
            const bool upper = part & 2, odd = part & 1;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float(&all)[4] = sum[r];
                float a = upper ? all[2] : all[0], b = upper ? all[3] : all[1];
                a += __shfl_xor_sync(0xffffffffu, upper ? all[0] : all[2], 2);
                b += __shfl_xor_sync(0xffffffffu, upper ? all[1] : all[3], 2);
                a = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
                a += __shfl_xor_sync(0xffffffffu, a, 4);
                const int row = rows.row + 4 * r, v = v0 + part % 4;
                const bool there = row < p.end && v < p.n;
                if (add && there) {
                    a += add[(rows.head + v) * add_stride + row];
                }
                __syncwarp();
                if (there) {
                    emit(rows.head + v, row, a + bias[r], /*second=*/part / 4);
                }
            }
        }
    }
}

} // namespace faiss_saap::gpu
