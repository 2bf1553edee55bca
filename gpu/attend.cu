// The stages around gather_attend: the work of each row before it, the merge of
// its pieces after it.
#include "attend.h"

#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device_vectors.cuh"
#include "far_keys.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 128;

/// Where the keys of each probed cell begin among the row's far keys. A block
/// for each row; its first warp goes through the cells.
__global__ void __launch_bounds__(kThreads) prepare_rows(AttendParams p) {
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const BatchRow& row = p.rows[blockIdx.x];
    const int64_t r = int64_t(blockIdx.x) * choices + blockIdx.y;
    const BatchItem& item = p.items[row.item];
    const Reach reach = reach_of(item, row.token, p.sink, p.window);
    extern __shared__ int32_t counts[];
    uint32_t* probed = p.probed + r * p.probed_words;
    for (int64_t i = threadIdx.x; i < p.probed_words; i += kThreads) {
        probed[i] = 0;
    }
    __shared__ int kept, keys;
    if (threadIdx.x == 0) {
        kept = keys = 0;
        p.row_twice[r] = 0;
    }
    int64_t n = p.count[r];
    if (n < 0 || n > p.stride) {
        if (threadIdx.x == 0) {
            raise(p.flag, Fault::attend_cell, static_cast<int>(r));
        }
        n = 0;
    }
    if (item.sequence->length > item.kv.length) {
        if (threadIdx.x == 0) {
            raise(p.flag, Fault::attend_view, row.item);
        }
        n = 0;
    }
    int all_cells = 0;
    for (int i = 0; i < row.nlist; i++) {
        const BatchList& at = p.lists[row.first_list + i];
        const ListState& list = item.sequence->lists[at.list];
        all_cells += list.ncell;
        __syncthreads();
        far_counts(list, item, reach, p.sink, p.window, counts);
        if (threadIdx.x >= 32) {
            continue;
        }
        for (int64_t first = 0; first < n; first += 32) {
            const int64_t k = first + threadIdx.x;
            const int cell = k < n ? p.cells[r * p.stride + k] : -1;
            const int c = cell - list.first_cell;
            const bool here = k < n && c >= 0 && c < list.ncell;
            bool mine = false;
            if (here) { // named before?
                const uint32_t bit = 1u << (cell % 32);
                mine = !(atomicOr(&probed[cell / 32], bit) & bit);
            }
            const int count = mine ? counts[c] : 0;
            int sum = count;
            for (int step = 1; step < 32; step *= 2) {
                const int before = __shfl_up_sync(0xffffffffu, sum, step);
                sum += threadIdx.x >= step ? before : 0;
            }
            const unsigned takes = __ballot_sync(0xffffffffu, mine);
            const int rank = __popc(takes & ((1u << threadIdx.x) - 1));
            if (mine) {
                p.row_cells[r * p.row_stride + kept + rank] = {
                        i, c, keys + sum - count, keys + sum};
            }
            __syncwarp();
            if (threadIdx.x == 31) {
                kept += __popc(takes);
                keys += sum;
            }
            __syncwarp();
        }
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < n; k += kThreads) {
        const int cell = p.cells[r * p.stride + k];
        if (cell < 0 || cell >= all_cells) {
            raise(p.flag, Fault::attend_cell, static_cast<int>(r));
        }
    }
    if (threadIdx.x == 0) {
        p.row_cell_count[r] = kept;
        p.row_keys[r] = keys;
    }
}

/// Merges the pieces of a token and query head, and the caller's result. A
/// block each.
__global__ void __launch_bounds__(kThreads) merge_pieces(AttendParams p) {
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int nq = group / choices;
    const BatchRow& row = p.rows[blockIdx.x];
    const int g = blockIdx.y;
    const int64_t r = int64_t(blockIdx.x) * choices + (p.share_group ? 0 : g);
    const int q = p.share_group ? g : 0;
    const BatchItem& item = p.items[row.item];
    const int64_t out_row = int64_t(item.first_token + row.token) * p.heads_q +
            row.kv_head * group + g;
    const auto piece = [&](int s) { return (r * p.splits + s) * nq + q; };

    __shared__ float weights[kThreads], largest_of[kThreads / 32],
            sum_of[kThreads / 32], dense_of[kThreads / 32];
    const float given = p.out.merge ? p.out.lse[out_row] : -INFINITY;
    // A thread for each piece: there are at most kThreads.
    const bool mine = threadIdx.x < p.splits;
    const float of_piece = mine ? p.part_lse[piece(threadIdx.x)] : -INFINITY;
    const float of_dense = mine ? p.part_dense[piece(threadIdx.x)] : -INFINITY;
    float largest = fmaxf(of_piece, given);
    for (int step = 16; step; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    if (threadIdx.x % 32 == 0) {
        largest_of[threadIdx.x / 32] = largest;
    }
    __syncthreads(); // and all have read the caller's LSE
    for (int w = 0; w < kThreads / 32; w++) {
        largest = fmaxf(largest, largest_of[w]);
    }
    const float shift = largest == -INFINITY ? 0.0f : largest;
    weights[threadIdx.x] = expf(of_piece - shift);
    float sum = weights[threadIdx.x], dense = expf(of_dense - shift);
    for (int step = 16; step; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
        dense += __shfl_xor_sync(0xffffffffu, dense, step);
    }
    if (threadIdx.x % 32 == 0) {
        sum_of[threadIdx.x / 32] = sum;
        dense_of[threadIdx.x / 32] = dense;
    }
    __syncthreads();
    sum = expf(given - shift);
    dense = 0;
    for (int w = 0; w < kThreads / 32; w++) {
        sum += sum_of[w];
        dense += dense_of[w];
    }
    const float lse = sum > 0 ? shift + logf(sum) : -INFINITY;
    for (int j = threadIdx.x; j < p.d; j += kThreads) {
        float& to = p.out.output[out_row * p.d + j];
        float o = given > -INFINITY ? expf(given - shift) * to : 0.0f;
#pragma unroll 8
        for (int s = 0; s < p.splits; s++) {
            o += weights[s] * p.part[piece(s) * p.d + j];
        }
        to = sum > 0 ? o / sum : 0.0f;
    }
    if (threadIdx.x == 0) {
        if (p.out.lse) {
            p.out.lse[out_row] = lse;
        }
        if (p.out.stats) {
            const Reach reach = reach_of(item, row.token, p.sink, p.window);
            AttendStats& stats = p.out.stats[out_row];
            stats.cells = p.row_cell_count[r];
            stats.keys_read = p.row_keys[r] - p.row_twice[r];
            stats.far_keys = reach.far_keys();
            stats.dense_mass = sum > 0 ? dense / sum : 0.0f;
        }
    }
}

} // namespace

int attend_splits(int processors, int64_t rows) {
    // Blocks that a processor holds at once, a few.
    const int64_t blocks = int64_t(3) * processors;
    return static_cast<int>(
            std::clamp<int64_t>((blocks + rows - 1) / rows, 1, kThreads));
}

cudaError_t attend(const AttendParams& p, cudaStream_t stream) {
    const int group = p.heads_q / p.heads_kv;
    if (p.nrow == 0) {
        return cudaSuccess;
    }
    prepare_rows<<<
            dim3(p.nrow, p.share_group ? 1 : group),
            kThreads,
            p.most_cells * sizeof(int32_t),
            stream>>>(p);
    cudaError_t error = cudaErrorInvalidValue;
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        switch (p.d) {
            case 64:
                return gather_attend<T, 64>(p, stream);
            case 96:
                return gather_attend<T, 96>(p, stream);
            case 128:
                return gather_attend<T, 128>(p, stream);
            case 256:
                return gather_attend<T, 256>(p, stream);
        }
        return cudaErrorInvalidValue;
    };
    error = p.bf16 ? run(__nv_bfloat16()) : run(__half());
    if (error != cudaSuccess) {
        return error;
    }
    merge_pieces<<<dim3(p.nrow, group), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
