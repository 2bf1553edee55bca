#include "attend.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device_vectors.cuh"
#include "far_keys.cuh"
#include "launch.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 128;

/// Where the keys of each probed cell begin among the row's far keys. A block
/// for each row; its first warp goes through the cells.
__global__ void __launch_bounds__(kThreads) make_plans(AttendParams p) {
    wait_for_previous();
    let_next_begin();
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const BatchRow& row = p.rows[blockIdx.x];
    const int64_t r = int64_t(blockIdx.x) * choices + blockIdx.y;
    const BatchItem& item = p.items[row.item];
    const int64_t length = row.sequence->length;
    const Reach reach =
            reach_of(length, item.q_len, row.token, p.sink, p.window);
    extern __shared__ int32_t counts[];
    uint32_t* probed = p.work.probed + r * p.work.probed_words;
    for (int64_t i = threadIdx.x; i < p.work.probed_words; i += kThreads) {
        probed[i] = 0;
    }
    __shared__ int kept, keys;
    if (threadIdx.x == 0) {
        kept = keys = 0;
    }
    int64_t n = p.count[r];
    if (n < 0 || n > p.stride) {
        if (threadIdx.x == 0) {
            raise(p.flag, Fault::attend_cell, static_cast<int>(r));
        }
        n = 0;
    }
    if (length > item.kv.length) {
        n = 0;
    }
    int all_cells = 0;
    for (int i = 0; i < row.nlist; i++) {
        const ListState& list = row.lists[i];
        all_cells += list.ncell;
        __syncthreads();
        far_counts(list, length, reach, p.sink, p.window, counts);
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
                p.work.cells[r * p.work.stride + kept + rank] = {
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
        RowPlan plan = plan_dense(
                reach, length, item.kv.length, p.attend_dense, row.item, p.flag);
        plan.cells = kept;
        plan.keys = keys;
        p.work.plans[r] = plan;
    }
}

} // namespace

cudaError_t plan_rows(const AttendParams& p, cudaStream_t stream) {
    if (p.nrow == 0) {
        return cudaSuccess;
    }
    return launch(
            make_plans,
            dim3(p.nrow, p.share_group ? 1 : p.heads_q / p.heads_kv),
            kThreads,
            p.most_cells * sizeof(int32_t),
            stream,
            p);
}

cudaError_t attend(const AttendParams& p, cudaStream_t stream) {
    if (p.nrow == 0) {
        return cudaSuccess;
    }
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
    return p.bf16 ? run(__nv_bfloat16()) : run(__half());
}

} // namespace faiss_saap::gpu
