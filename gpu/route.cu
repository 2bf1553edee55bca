#include "route.h"

#include <algorithm>

#include "device_vectors.cuh"
#include "far_keys.cuh"
#include "launch.h"
#include "take_cells.cuh"
#include "team.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8; ///< rows of weights that a warp multiplies at once

/// A team's row, as each of its blocks sees it.
struct TeamRow {
    // What never changes during a step.
    BatchRow row;
    int number = 0; ///< among the batch's rows
    DeviceView kv;
    ListState first_list;
    BatchList first_in_batch;
    // What does.
    int64_t length = 0; ///< of the sequence
    Reach reach;
    bool asks = false; ///< there is something to choose

    __device__ const ListState& list(int partition) const {
        return partition == 0 ? first_list : row.lists[partition];
    }
    /// Where the scores of a partition begin.
    __device__ int64_t scores(const RouteParams& p, int partition, int group) const {
        const BatchList& at = partition == 0 ? first_in_batch
                                             : p.lists[row.first_list + partition];
        return at.scores + int64_t(row.token) * group * list(partition).ncell;
    }
};

/// What a team's blocks work with. Vectors are in shared memory, `padded_group` for
/// each row, as they are multiplied four at a time.
struct Team {
    const TeamRow* rows;
    int n;
    int group, padded_group;
    /// Scores go to the block that takes the row's cells, into its `staged`, instead
    /// of into global memory.
    bool direct;
    float* staged;
    float *x, *post;           ///< queries as rows want them, and after RoPE
    float *hidden, *activated; ///< of networks

    /// The block that takes the cells of a row, of the first query head at least.
    __device__ unsigned block_of(int t, int choices) const {
        return t * choices % gridDim.x;
    }
};

/// Queries, a pair of components for each thread, so that all are on their way at
/// once.
__device__ void load_vectors(
        const RouteParams& p,
        const Team& team,
        const ListState& list) {
    const DeviceAssigner& a = list.query;
    const bool networks = a.input == RowInput::hidden;
    const int half = p.d / 2, each = team.group * half;
    const int stride = networks ? a.padded_d : a.padded_cols;
    const int queries = team.n * each;
    // Queries as the rows want them, and after RoPE.
    const int linear = a.input != RowInput::none ? queries : 0;
    const int plain = a.blend ? queries : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < linear + plain; i += kThreads) {
        const bool is_plain = i >= linear;
        const int j = is_plain ? i - linear : i;
        const int v = j / half, pair = j % half;
        const int t = v / team.group, g = v % team.group;
        const TeamRow& row = team.rows[t];
        const int64_t position = row.length - row.row.q_len + row.row.token;
        const int64_t head = int64_t(row.row.query) * p.heads_q +
                row.row.kv_head * team.group + g;
        float* to = is_plain ? team.post + (t * team.padded_group + g) * p.d
                             : team.x + (t * team.padded_group + g) * stride;
        load_vector(
                list.rotary,
                p.d,
                position + p.position_offset,
                !is_plain && a.input != RowInput::post_rope,
                static_cast<const char*>(p.queries) + head * p.d * 2,
                p.bf16,
                pair,
                half,
                to);
    }
    const int padding = stride - p.d;
#pragma unroll 1
    for (int i = threadIdx.x; linear && i < team.n * team.group * padding;
         i += kThreads) {
        const int v = i / padding;
        team.x[(v / team.group * team.padded_group + v % team.group) * stride + p.d +
               i % padding] = 0;
    }
}

/// y = W x + bias for one layer of the networks, shared out over the team's warps;
/// `to` gets it in every block, and `add`, which is added, is there.
__device__ __noinline__ void run_layer(
        const Team& team,
        const DeviceAssigner& a,
        int layer,
        const float* x,
        const float* add,
        bool relu,
        float* to) {
    const bool per_head = (layer ? a.networks : a.inputs) > 1;
    const int cols = layer == 0 ? a.padded_d : a.padded_width;
    const size_t bytes = size_t(cols) * a.element();
    const int heads = per_head ? team.group : team.padded_group / 4;
    const int blocks = (a.width + kRows - 1) / kRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto* weights = static_cast<const char*>(a.layer[layer]);
    const float* biases = a.layer_bias[layer];
#pragma unroll 1
    for (int item = warp * gridDim.x + blockIdx.x; item < team.n * heads * blocks;
         item += kWarps * gridDim.x) {
        const int unit = item % blocks * kRows + lane / 4;
        const int h = item / blocks % heads, t = item / blocks / heads;
        const int r = (per_head ? h : 0) * a.width + unit;
        const bool there = unit < a.width;
        // Heads that share the first matrix have biases of their own.
        const int head = per_head ? h : min(4 * h + lane % 4, team.group - 1);
        const float bias =
                there ? biases[(per_head || layer == 0 ? head : 0) * a.width + unit] : 0.0f;
        const int first = t * team.padded_group + (per_head ? h : 4 * h);
        const float s = per_head
                ? warp_products_of_weights<1>(
                          there ? weights + r * bytes : nullptr,
                          a.bf16,
                          cols,
                          x + first * cols,
                          cols)
                : warp_products_of_weights<4>(
                          there ? weights + r * bytes : nullptr,
                          a.bf16,
                          cols,
                          x + first * cols,
                          cols);
        const int at = (first + (per_head ? 0 : lane % 4)) * a.padded_width + unit;
        const bool is = per_head ? lane % 4 == 0 : 4 * h + lane % 4 < team.group;
        if (there && is) {
            const float sum = s + bias + (add ? add[at] : 0.0f);
            store_in_team(to + at, relu && sum < 0 ? 0.0f : sum); // NaN stays
        }
    }
}

/// log of the mean of exp(scale * q.k) over a cell, its newest key taken as it
/// is and the others at their mean (BlendAssigner.h).
__device__ float newest_feature(float scale, float n, float mean, float newest) {
    if (n <= 1) {
        return newest;
    }
    const float x = scale * newest;
    const float y = scale * (n * mean - newest) / (n - 1) + logf(n - 1);
    return (fmaxf(x, y) + log1pf(expf(-fabsf(x - y))) - logf(n)) / scale;
}

/// A linear score with what a blend adds to it, for one cell; N vectors q and
/// lanes as in warp_products, g being the lane's query head.
template <int N>
__device__ __noinline__ float blended(
        const RouteParams& p,
        const TeamRow& row,
        const ListState& list,
        const DeviceAssigner& a,
        int cell,
        int g,
        const float* q,
        float score) {
    const bool there = cell < list.ncell;
    const int count = there ? list.count[cell] : 0;
    const int32_t slot = a.reads_newest && count ? list.newest[cell] : 0;
    const float mean = warp_products<RowType::float32, N>(
            there ? list.means + int64_t(cell) * p.d : nullptr, p.d, q, p.d);
    float newest = 0;
    if (a.reads_newest) {
        const char* key = count
                ? key_row(row.kv, list.kv_head, slot)
                : nullptr;
        newest = p.bf16 ? warp_products<RowType::bfloat16, N>(key, p.d, q, p.d)
                        : warp_products<RowType::float16, N>(key, p.d, q, p.d);
    }
    if (g >= p.heads_q / p.heads_kv || !count) {
        return -INFINITY;
    }
    const float* w = a.blend + 5 * g;
    score = w[0] * score + w[1] * mean;
    if (a.reads_newest) {
        const auto n = static_cast<float>(count);
        const int64_t query = row.length - row.row.q_len + row.row.token;
        const float age =
                -log1pf(static_cast<float>(max(int64_t(0), query - slot)));
        score += w[2] * newest_feature(a.scale, n, mean, newest) + w[3] * age +
                w[4] * logf(n);
    }
    return score;
}

/// Scores of one partition's cells for all rows and heads, shared out over the team's
/// warps; the rows one after the other, so that weights stay near.
/// @param x  of the cells' rows: queries, or what networks make of them
__device__ __noinline__ void score_cells(
        const RouteParams& p,
        const Team& team,
        int partition,
        const DeviceAssigner& a,
        const float* x) {
    const int cols = a.padded_cols, ncell = a.ncell;
    const size_t bytes = size_t(cols) * a.element();
    const bool per_head = a.networks > 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = (ncell + kRows - 1) / kRows;
#pragma unroll 1
    for (int block = warp * gridDim.x + blockIdx.x; block < blocks;
         block += kWarps * gridDim.x) {
        const int cell = block * kRows + lane / 4;
        const bool there = cell < ncell;
#pragma unroll 1
        for (int g0 = 0; g0 < team.group; g0 += per_head ? 1 : 4) {
            const int64_t r = int64_t(per_head ? g0 : 0) * ncell + cell;
            const char* weights = there && a.input != RowInput::none
                    ? static_cast<const char*>(a.rows) + r * bytes
                    : nullptr;
            const float bias = weights && a.bias ? a.bias[r] : 0.0f;
            const int g = per_head ? g0 : g0 + lane % 4;
#pragma unroll 1
            for (int t = 0; t < team.n; t++) {
                const TeamRow& row = team.rows[t];
                if (!row.asks) {
                    continue;
                }
                const int first = t * team.padded_group + g0;
                float score = bias;
                if (a.input != RowInput::none) {
                    score += per_head ? warp_products_of_weights<1>(
                                                weights,
                                                a.bf16,
                                                cols,
                                                x + first * cols,
                                                cols)
                                      : warp_products_of_weights<4>(
                                                weights,
                                                a.bf16,
                                                cols,
                                                x + first * cols,
                                                cols);
                }
                if (a.blend) {
                    const ListState& list = row.list(partition);
                    const float* q = team.post + first * p.d;
                    score = per_head
                            ? blended<1>(p, row, list, a, cell, g, q, score)
                            : blended<4>(p, row, list, a, cell, g, q, score);
                }
                if (there && g < team.group && (!per_head || lane % 4 == 0)) {
                    if (!(score < INFINITY)) {
                        raise(p.flag, Fault::route_query, row.row.query);
                    }
                    const int at = g * ncell + cell;
                    if (team.direct) {
                        store_in_block(team.staged + at, team.block_of(t, 1), score);
                    } else {
                        p.scores[row.scores(p, partition, team.group) + at] = score;
                    }
                }
            }
        }
    }
}

/// Brings memory nearer, shared out over the team.
__device__ __noinline__ void prefetch_by_team(const void* from, int64_t bytes) {
    const int64_t step = int64_t(128) * kThreads * gridDim.x;
#pragma unroll 1
    for (int64_t i = 128 * (int64_t(threadIdx.x) * gridDim.x + blockIdx.x); i < bytes;
         i += step) {
        prefetch(static_cast<const char*>(from) + i);
    }
}

/// Brings what an assigner multiplies with nearer. Weights never change: this may be
/// done before the kernels before have ended.
__device__ __noinline__ void prefetch_weights(const DeviceAssigner& a) {
    const int64_t element = a.element();
    if (a.rows) {
        prefetch_by_team(a.rows, element * a.networks * a.ncell * a.padded_cols);
    }
#pragma unroll 1
    for (int l = 0; a.input == RowInput::hidden && l < 1 + 2 * a.depth; l++) {
        const int networks = l ? a.networks : a.inputs;
        prefetch_by_team(
                a.layer[l],
                element * networks * a.width * (l ? a.padded_width : a.padded_d));
    }
}

/// Takes the cells of one row: of a token and a KV head, or of one query head of
/// it. By a block.
__device__ void select_row(
        const RouteParams& p,
        const Team& team,
        const TeamRow& row,
        int choice,
        unsigned long long* keys) {
    const int group = team.group;
    const int64_t r =
            int64_t(row.number) * (p.share_group ? 1 : group) + choice;
    int32_t* out = p.cells + r * p.stride;
    __shared__ Selection s;
    const auto far = static_cast<int>(row.reach.far_keys());
    const bool plans = p.work.plans;
    const bool shares_keys = plans && row.row.nlist > 1;
    uint32_t* probed = p.work.probed + r * p.work.probed_words;
#pragma unroll 1
    for (int i = threadIdx.x; shares_keys && i < p.work.probed_words; i += kThreads) {
        probed[i] = 0;
    }
    int taken = 0, taken_keys = 0;
#pragma unroll 1
    for (int i = 0; i < row.row.nlist; i++) {
        const ListState& list = row.list(i);
        const int n = list.ncell;
        int padded = 32;
        while (padded < n) {
            padded *= 2;
        }
        auto* counts = reinterpret_cast<int32_t*>(keys + padded);
        // Scores of all heads, or of the one that chooses; at hand if they fit.
        const int heads = p.share_group ? group : 1;
        const bool all = far <= p.dense_below;
        const float* scores = team.staged;
        __syncthreads(); // the partition before is done with all this
        if (!team.direct && !all) {
            scores = p.scores + row.scores(p, i, group) +
                    (p.share_group ? 0 : choice) * n;
            const bool fits = heads * n <= p.staged;
#pragma unroll 8
            for (int c = threadIdx.x; fits && c < heads * n; c += kThreads) {
                team.staged[c] = __ldcg(scores + c);
            }
            scores = fits ? team.staged : scores;
        }
        far_counts(list, row.length, row.reach, p.sink, p.window, counts);
        const double share = p.nsplit ? p.split[i] : 1.0 / row.row.nlist;
        if (far > 0 && (all ? i == 0 : share != 0)) {
            // log of the mass per key, of which the group's heads are summed.
            const bool sums = p.share_group && !all;
            if (sums) {
                find_norms(s, scores, counts, n, group, p.scale);
            }
#pragma unroll 1
            for (int c = threadIdx.x; c < padded; c += kThreads) {
                float score = -INFINITY;
                if (c < n && counts[c]) {
                    if (!sums) {
                        score = all ? 0 : scores[c];
                    } else {
                        float sum = 0;
#pragma unroll 4
                        for (int g = 0; g < group; g++) { // online
                            const float x = p.scale * scores[g * n + c] - s.norm[g];
                            const float most = fmaxf(score, x); // passes over NaN
                            sum *= score > -INFINITY ? __expf(score - most) : 0.0f;
                            sum += x > -INFINITY ? __expf(x - most) : 0.0f;
                            score = most;
                        }
                        score = score > -INFINITY ? score + __logf(sum) : score;
                    }
                }
                keys[c] = cell_key(score, c);
            }
            __syncthreads();
            int limit = key_limit(p.max_keys, p.max_selectivity, share, far, all);
            if (!all) {
                limit = min(
                        limit, keys_left(p.max_keys, p.max_selectivity, far, taken_keys));
            }
            RowCell* cells = p.work.cells + r * p.work.stride;
            clear_selection(s);
            const Bins bins = find_bins(s, keys, padded);
            int least = INT32_MAX;
#pragma unroll 2
            for (int c = threadIdx.x; c < n; c += kThreads) {
                bin_cell(s, bins, keys[c], counts[c], least);
            }
            take_cells(
                    s,
                    bins,
                    keys,
                    padded,
                    counts,
                    all ? n : p.nprobe,
                    limit,
                    /*at_least_one=*/taken == 0,
                    least,
                    [&](int rank, int c, int count, int before) {
                        const int cell = list.first_cell + c;
                        const int begin = taken_keys + before;
                        out[taken + rank] = cell;
                        if (plans) {
                            cells[taken + rank] = {i, c, begin, begin + count};
                            // The next kernel asks for it first.
                            prefetch(list.extents + int64_t(c) * kExtents);
                        }
                        if (shares_keys) {
                            atomicOr(&probed[cell / 32], 1u << (cell % 32));
                        }
                    });
            __syncthreads();
            taken += s.taken;
            taken_keys += s.keys;
        }
    }
    if (threadIdx.x == 0) {
        p.count[r] = taken;
        if (plans) {
            RowPlan plan = plan_dense(
                    row.reach,
                    row.length,
                    row.row.view_length,
                    p.attend_dense,
                    row.row.item,
                    p.flag);
            const bool readable = row.length <= row.row.view_length;
            plan.cells = readable ? taken : 0;
            plan.keys = readable ? taken_keys : 0;
            p.work.plans[r] = plan;
        }
    }
    __syncthreads(); // before the next row
}

/// A team scores the cells of its rows together; then each block takes the cells
/// of some of them.
__global__ void __launch_bounds__(kThreads, 2)
        route_kernel(const __grid_constant__ RouteParams p) {
    __shared__ __align__(16) char row_bytes[kMaxTeamRows * sizeof(TeamRow)];
    auto* rows = reinterpret_cast<TeamRow*>(row_bytes);
    extern __shared__ __align__(16) float shared[];
    const RowTeam members = p.teams[blockIdx.y];
#pragma unroll 1
    for (int t = 0; t < members.n; t++) {
        const int number = p.team_rows[members.first + t];
        if (threadIdx.x == 0) {
            rows[t].number = number;
        }
        copy_words(&rows[t].row, p.rows + number);
    }
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < members.n; t++) {
        copy_words(&rows[t].kv, &p.items[rows[t].row.item].kv);
        copy_words(&rows[t].first_list, rows[t].row.lists);
        copy_words(&rows[t].first_in_batch, p.lists + rows[t].row.first_list);
    }
    __syncthreads();
    const int nlist = rows[0].row.nlist;
    const int choices = p.share_group ? 1 : p.heads_q / p.heads_kv;
    Team team;
    team.rows = rows;
    team.n = members.n;
    team.group = p.heads_q / p.heads_kv;
    team.padded_group = (team.group + 3) / 4 * 4;
    team.direct = p.staged && choices == 1 && nlist == 1 &&
            team.n <= static_cast<int>(gridDim.x);
    const int vectors = team.n * team.padded_group;
    team.staged = shared;
    team.x = shared + p.staged;
    team.post = team.x + vectors * p.most_cols;
    team.hidden = team.post + vectors * p.most_post;
    team.activated = team.hidden + vectors * p.most_width;
#pragma unroll 1
    for (int i = 0; i < nlist; i++) {
        const ListState& list = rows[0].list(i);
        prefetch_weights(list.query);
#pragma unroll 1
        for (int t = 0; t < team.n; t++) {
            prefetch_by_team(rows[t].list(i).count, 4 * list.ncell);
        }
    }
    // Columns that pad a hidden layer; then all blocks of the team have begun.
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * vectors * p.most_width; i += kThreads) {
        team.hidden[i] = 0;
    }
    team_sync();
    wait_for_previous();
    let_next_begin();
    if (threadIdx.x < team.n) {
        TeamRow& row = rows[threadIdx.x];
        row.length = __ldcg(&row.row.sequence->length);
        row.reach = reach_of(
                row.length, row.row.q_len, row.row.token, p.sink, p.window);
        row.asks = row.reach.far_keys() > p.dense_below;
    }
    __syncthreads();
    bool asks = false;
#pragma unroll 1
    for (int t = 0; t < team.n; t++) {
        asks = asks || rows[t].asks;
    }
#pragma unroll 1
    for (int i = 0; i < nlist && asks; i++) {
        const ListState& list = rows[0].list(i);
        const DeviceAssigner& query = list.query;
        // The partition before is done with the vectors; also in the blocks that this one
        // will write to.
        if (i > 0) {
            team_sync();
        }
        load_vectors(p, team, list);
        __syncthreads();
        const float* x = team.x;
#pragma unroll 1
        for (int layer = 0;
             query.input == RowInput::hidden && layer < 1 + 2 * query.depth;
             layer++) {
            // in; then up and down of each block, which adds to what was.
            const bool up = layer % 2, rectifies = up || query.depth == 0;
            float* to = up ? team.activated : team.hidden;
            const float* add = layer && !up ? team.hidden : nullptr;
            run_layer(team, query, layer, x, add, rectifies, to);
            x = to;
            team_sync();
        }
        score_cells(p, team, i, query, x);
    }
    team_sync(); // and the vectors are no longer needed
#pragma unroll 1
    for (int task = blockIdx.x; task < team.n * choices; task += gridDim.x) {
        select_row(
                p,
                team,
                rows[task / choices],
                task % choices,
                reinterpret_cast<unsigned long long*>(shared + p.staged));
    }
}

/// Bytes that a row's vectors take: queries, hidden layers.
size_t bytes_of_row(const RouteParams& p) {
    const int group = p.heads_q / p.heads_kv;
    const int of_head = p.most_cols + p.most_post + 2 * p.most_width;
    return sizeof(float) * ((group + 3) / 4 * 4 * of_head);
}

/// Bytes of keys and counts of a selection.
size_t bytes_of_cells(const RouteParams& p) {
    size_t padded = 32;
    while (padded < size_t(p.most_cells)) {
        padded *= 2;
    }
    return padded * 8 + size_t(p.most_cells) * 4;
}

/// Scoring and selection take turns.
size_t shared_bytes(const RouteParams& p) {
    return p.staged * sizeof(float) +
            std::max(p.most_team_rows * bytes_of_row(p), bytes_of_cells(p));
}

} // namespace

size_t route_room() {
    int device = 0, room = 0;
    cudaFuncAttributes attributes = {};
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(
                &room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
                cudaSuccess ||
        cudaFuncGetAttributes(&attributes, route_kernel) != cudaSuccess) {
        return 0;
    }
    return room - attributes.sharedSizeBytes;
}

size_t route_needs(const RouteParams& p) {
    return std::max(bytes_of_row(p), bytes_of_cells(p));
}

int most_team_rows(const RouteParams& p) {
    constexpr size_t kBytes = 48 << 10;
    return std::clamp(static_cast<int>(kBytes / bytes_of_row(p)), 1, kMaxTeamRows);
}

int most_team_blocks() {
    constexpr size_t kBytes = 64 << 10; // more than a step needs as a rule
    bool clusters_are_compiled = false;
    if (allow(route_kernel, route_room(), kMaxTeam) != cudaSuccess ||
        compiled_for_90(
                reinterpret_cast<const void*>(route_kernel), clusters_are_compiled) !=
                cudaSuccess ||
        !clusters_are_compiled) {
        cudaGetLastError(); // what a device without clusters says
        return 1;
    }
    int blocks = kMaxTeam;
    while (blocks > 1 && clusters_at_once(route_kernel, blocks, kThreads, kBytes) == 0) {
        blocks /= 2;
    }
    return blocks;
}

cudaError_t route(RouteParams p, cudaStream_t stream) {
    if (p.nteam == 0) {
        return cudaSuccess;
    }
    const int group = p.heads_q / p.heads_kv;
    constexpr int kMostStaged = 16384; // floats
    const int scores = ((p.share_group ? group : 1) * p.most_cells + 3) / 4 * 4;
    p.staged = scores;
    if (scores > kMostStaged || shared_bytes(p) > p.room) {
        p.staged = 0;
    }
    const size_t shared = shared_bytes(p);
    const cudaError_t error = allow(route_kernel, p.room, p.team_blocks);
    if (error != cudaSuccess) {
        return error;
    }
    return launch(
            route_kernel,
            dim3(p.team_blocks, p.nteam),
            kThreads,
            shared,
            stream,
            p,
            p.team_blocks);
}

} // namespace faiss_saap::gpu
