/// What a query attends to, and how many keys of a cell that includes.
#pragma once

#include "device_vectors.cuh"
#include "row_work.h"
#include "sequence_state.h"

namespace faiss_saap::gpu {

/// A query at slot window_end - 1 reads [0, sink_end) and [window_begin,
/// window_end) densely, the slots between them through cells.
struct Reach {
    int64_t sink_end = 0, window_begin = 0, window_end = 0;

    __device__ int64_t far_keys() const {
        return window_begin - sink_end;
    }
};

/// @param token  of the last q_len ones of a sequence
__device__ inline Reach reach_of(
        int64_t length,
        int q_len,
        int token,
        int64_t sink,
        int64_t window) {
    Reach r;
    // A sequence shorter than its queries has none for the first ones.
    r.window_end = max(int64_t(0), length - q_len + token + 1);
    r.sink_end = min(sink, r.window_end);
    r.window_begin = max(r.sink_end, r.window_end - window);
    return r;
}

/// As in ProbePolicy: a product may be a last bit less than the number it stands for.
__device__ inline int64_t whole_keys(double keys) {
    return static_cast<int64_t>(keys + 1e-9 + 1e-14 * keys);
}

/// ProbePolicy::key_limit.
__device__ inline int64_t all_keys(int64_t max_keys, double max_selectivity, int far) {
    return min(max_keys, whole_keys(max_selectivity * far));
}

/// Far keys that may be read: a partition's share of them.
/// @param takes_all  there are so few that nothing is asked
__device__ inline int key_limit(
        int64_t max_keys,
        double max_selectivity,
        double share,
        int far,
        bool takes_all) {
    const int64_t most = all_keys(max_keys, max_selectivity, far);
    return takes_all || most >= far ? far : static_cast<int>(whole_keys(share * most));
}

/// Keys that the partitions still to come may add to those taken: the best cell of the one
/// before may have been more than its share.
__device__ inline int keys_left(int64_t max_keys, double max_selectivity, int far, int taken) {
    const int64_t most = all_keys(max_keys, max_selectivity, far);
    return most >= far ? INT32_MAX : max(static_cast<int>(most) - taken, 0);
}

/// The plan of a row before its cells: nothing, and a fault, where the caller's
/// view lacks slots of the sequence.
/// @param view_length  of the caller's cache
/// @param flag         null: the fault is raised elsewhere
__device__ inline RowPlan plan_dense(
        const Reach& reach,
        int64_t length,
        int64_t view_length,
        bool attend_dense,
        int item,
        FaultFlag* flag) {
    RowPlan plan;
    plan.sinks = static_cast<int>(reach.sink_end);
    plan.window_begin = static_cast<int>(reach.window_begin);
    plan.far = static_cast<int>(reach.far_keys());
    if (length > view_length) {
        if (flag) {
            raise(flag, Fault::attend_view, item);
        }
    } else if (attend_dense) {
        plan.dense = static_cast<int>(
                reach.sink_end + reach.window_end - reach.window_begin);
    }
    return plan;
}

/// Far keys of each cell for a query, into shared memory; by a whole block. The
/// newest listed slots may be in a window still, of a query before the last.
static __device__ __noinline__ void far_counts(
        const ListState& list,
        int64_t length,
        const Reach& reach,
        int64_t sink,
        int64_t window,
        int32_t* counts) {
#pragma unroll 2
    for (int c = threadIdx.x; c < list.ncell; c += blockDim.x) {
        counts[c] = __ldcg(list.count + c);
    }
    __syncthreads();
    const int64_t listed_end = max(sink, length - window);
#pragma unroll 1
    for (int64_t slot = max(sink, reach.window_begin) + threadIdx.x;
         slot < listed_end;
         slot += blockDim.x) {
        atomicSub(&counts[list.cells[slot - sink]], 1);
    }
    __syncthreads();
}

} // namespace faiss_saap::gpu
