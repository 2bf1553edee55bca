#include "scan_cells.h"

#include <cfloat>
#include <cmath>

#include <cuda_fp16.h>

#include <faiss_saap/gpu/select_k.h>

#include "BlockTopK.h"
#include "check.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
/// Vectors of a page that one warp compares.
constexpr int kRows = kPage / kWarps;
static_assert(kPage % kWarps == 0 && kPage <= BlockTopK::kMaxReserve);
static_assert(
        (4096 + 2) * sizeof(uint64_t) + kMaxScanD * sizeof(float) <= 48 << 10,
        "keys of the largest k and a query fit into shared memory");

__device__ float4 load4(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}
__device__ float4 load4(const __half* from) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const float2 low = __half22float2(reinterpret_cast<const __half2&>(bits.x));
    const float2 high = __half22float2(reinterpret_cast<const __half2&>(bits.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

template <bool L2>
__device__ float accumulate(float4 q, float4 v, float sum) {
    if constexpr (L2) {
        q = make_float4(q.x - v.x, q.y - v.y, q.z - v.z, q.w - v.w);
        v = q;
    }
    sum = fmaf(q.x, v.x, sum);
    sum = fmaf(q.y, v.y, sum);
    sum = fmaf(q.z, v.z, sum);
    return fmaf(q.w, v.w, sum);
}

/// A block scans every splits-th cell of one query, a warp kRows vectors of a
/// page at a time.
template <class T, bool L2>
__global__ void __launch_bounds__(kThreads) scan_kernel(ScanCellsParams p) {
    extern __shared__ uint64_t shared[];
    const int64_t query = blockIdx.x / p.splits;
    const int split = static_cast<int>(blockIdx.x % p.splits);
    const int row = p.lists.row;
    float* x = reinterpret_cast<float*>(
            shared + BlockTopK::shared_bytes(p.k) / sizeof(uint64_t));
    for (int j = threadIdx.x; j < row; j += kThreads) {
        x[j] = j < p.lists.d ? p.x[query * p.lists.d + j] : 0.0f;
    }
    BlockTopK best(shared, p.k); // waits for all threads
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned long long probed = 0, read = 0;
    for (int probe = split; probe < p.nprobe; probe += p.splits) {
        const int c = p.cells ? p.cells[query * p.nprobe + probe] : probe;
        const int count = c < 0 ? 0 : p.lists.count[c];
        int page = count > 0 ? p.lists.head[c] : -1;
        probed += count > 0;
        read += count;
        for (int done = 0; done < count; done += kPage) {
            const int next = p.lists.next(page); // early: it takes long
            const int size = min(kPage, count - done);
            const uint32_t first = uint32_t(page) * kPage;
            const T* vectors = p.lists.vector<T>(first);
            best.reserve(kPage);
            float sum[kRows];
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                sum[r] = 0.0f;
            }
            for (int j = lane * 4; j < row; j += 128) {
                const float4 q = *reinterpret_cast<const float4*>(x + j);
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    const int i = warp + r * kWarps;
                    if (i < size) {
                        sum[r] = accumulate<L2>(
                                q, load4(vectors + size_t(i) * row + j), sum[r]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                for (int apart = 16; apart > 0; apart /= 2) {
                    sum[r] += __shfl_xor_sync(~0u, sum[r], apart);
                }
                const int i = warp + r * kWarps;
                if (lane == 0 && i < size && !isnan(sum[r])) {
                    best.push(SelectionKey::make(sum[r], first + i, !L2));
                }
            }
            page = next;
        }
    }
    const uint64_t* keys = best.finish();
    for (int j = threadIdx.x; j < p.k; j += kThreads) {
        p.keys[int64_t(blockIdx.x) * p.k + j] = keys[j];
    }
    if (p.stats && threadIdx.x == 0) {
        atomicAdd(p.stats, probed);
        atomicAdd(p.stats + 1, read);
    }
}

/// A block per query joins what its splits found.
__global__ void __launch_bounds__(kThreads) join_kernel(ScanCellsParams p) {
    extern __shared__ uint64_t shared[];
    const int64_t query = blockIdx.x;
    const int size = p.splits * p.k;
    const uint64_t* from = p.keys + query * size;
    BlockTopK best(shared, p.k);
    for (int first = 0; first < size; first += kThreads) {
        best.reserve(kThreads);
        if (first + threadIdx.x < size) {
            best.push(from[first + threadIdx.x]);
        }
    }
    const uint64_t* keys = best.finish();
    for (int j = threadIdx.x; j < p.k; j += kThreads) {
        const bool none = keys[j] == SelectionKey::kNone;
        // Where there is none, what Faiss's heaps begin with.
        p.distances[query * p.k + j] = none
                ? (p.l2 ? FLT_MAX : -FLT_MAX)
                : SelectionKey::score(keys[j], !p.l2);
        p.labels[query * p.k + j] =
                none ? -1 : p.lists.id(SelectionKey::id(keys[j]));
    }
}

} // namespace

void scan_cells(const ScanCellsParams& p, cudaStream_t stream) {
    if (p.queries == 0) {
        return;
    }
    const size_t keys = BlockTopK::shared_bytes(p.k);
    const size_t shared = keys + p.lists.row * sizeof(float);
    const auto kernel = p.lists.float16
            ? (p.l2 ? scan_kernel<__half, true> : scan_kernel<__half, false>)
            : (p.l2 ? scan_kernel<float, true> : scan_kernel<float, false>);
    kernel<<<static_cast<unsigned>(p.queries * p.splits), kThreads, shared, stream>>>(
            p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    join_kernel<<<static_cast<unsigned>(p.queries), kThreads, keys, stream>>>(p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
