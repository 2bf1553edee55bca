#include <faiss_saap/gpu/kmeans.h>

#include <climits>

#include <faiss_saap/gpu/assign_bfloat16.h>
#include <faiss_saap/gpu/assign_cells.h>
#include <faiss_saap/gpu/cell_means.h>
#include <faiss_saap/gpu/random_permutation.h>

#include "DeviceBuffer.h"
#include "check.h"
#include "typed_vectors.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 128;
/// Draws for a vector that shares its cell with another.
constexpr int kDraws = 16;
/// How far towards the drawn vector a split-off centroid goes: little, so that
/// the border between the two halves the cell.
constexpr float kStep = 1.0f / 64;

struct Memory {
    float* bias;     ///< nhead * ncell
    int32_t* counts; ///< nhead * ncell
    void* means;     ///< of cell_means
    void* rows;      ///< of assign_bfloat16, or null
};

/// For either kind of vectors.
template <class Params>
Params assignment(const BatchedKMeansParams& p, const float* bias) {
    Params a;
    a.nhead = p.nhead, a.n = p.n, a.d = p.d, a.ncell = p.ncell;
    a.x = static_cast<decltype(a.x)>(p.x);
    a.x_head_stride = p.x_head_stride;
    a.x_row_stride = p.x_row_stride;
    a.centroids = p.centroids;
    a.centroids_head_stride = int64_t(p.ncell) * p.d;
    a.bias = p.spherical ? nullptr : bias;
    a.bias_head_stride = p.ncell;
    a.cells = p.cells, a.cells_head_stride = p.cells_head_stride;
    return a;
}

CellMeansParams update(const BatchedKMeansParams& p, int32_t* counts) {
    CellMeansParams u;
    u.nhead = p.nhead, u.n = p.n, u.d = p.d, u.ncell = p.ncell;
    u.type = p.type;
    u.x = p.x, u.x_head_stride = p.x_head_stride;
    u.x_row_stride = p.x_row_stride;
    u.cells = p.cells, u.cells_head_stride = p.cells_head_stride;
    u.means = p.centroids;
    u.counts = counts;
    return u;
}

Memory layout(const BatchedKMeansParams& p, Layout& w) {
    const size_t cells = size_t(p.nhead) * p.ncell;
    Memory m;
    m.bias = w.take<float>(cells);
    m.counts = w.take<int32_t>(cells);
    m.means = w.take<char>(cell_means_workspace(update(p, nullptr)));
    m.rows = p.type == DType::bfloat16
            ? w.take<char>(assign_bfloat16_workspace(
                      assignment<AssignBfloat16Params>(p, nullptr)))
            : nullptr;
    return m;
}

__device__ uint64_t head_key(const BatchedKMeansParams& p, int64_t head) {
    return mix(mix(p.seed) + head);
}

/// The cell of this warp among those of all heads; head and cell by reference.
__device__ bool my_cell(const BatchedKMeansParams& p, int64_t& head, int& cell) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    head = at / p.ncell;
    cell = static_cast<int>(at % p.ncell);
    return head < p.nhead;
}

/// Scales a warp's vector to unit length; zero stays zero. Each lane touches
/// the components that it wrote.
__device__ void normalise(float* v, int d) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int j = lane; j < d; j += 32) {
        sum = fmaf(v[j], v[j], sum);
    }
    for (int apart = 16; apart > 0; apart /= 2) {
        sum += __shfl_xor_sync(~0u, sum, apart);
    }
    const float factor = sum > 0 ? 1.0f / sqrtf(sum) : 1.0f;
    for (int j = lane; j < d; j += 32) {
        v[j] *= factor;
    }
}

/// The first centroids are vectors, each drawn once. One warp per cell.
__global__ void draw_kernel(BatchedKMeansParams p) {
    int64_t head;
    int cell;
    if (!my_cell(p, head, cell)) {
        return;
    }
    const auto i = static_cast<int64_t>(
            random_permutation(cell, p.n, head_key(p, head)));
    const int64_t x = head * p.x_head_stride + i * p.x_row_stride;
    float* centroid = p.centroids + (head * p.ncell + cell) * p.d;
    for (int j = threadIdx.x % 32; j < p.d; j += 32) {
        centroid[j] = component(p.type, p.x, x + j);
    }
    if (p.spherical) {
        normalise(centroid, p.d);
    }
}

/// One warp per cell.
__global__ void normalise_kernel(BatchedKMeansParams p) {
    int64_t head;
    int cell;
    if (my_cell(p, head, cell)) {
        normalise(p.centroids + (head * p.ncell + cell) * p.d, p.d);
    }
}

/// Empty cells are split off others. Reads centroids of filled cells, writes
/// those of empty ones. One warp per cell.
__global__ void split_kernel(
        BatchedKMeansParams p,
        const int32_t* counts,
        int iteration) {
    int64_t head;
    int cell;
    if (!my_cell(p, head, cell) || counts[head * p.ncell + cell] > 0) {
        return;
    }
    const uint64_t key =
            mix(mix(head_key(p, head) + iteration + 1) + cell) * kDraws;
    for (int draw = 0; draw < kDraws; draw++) {
        const auto i = static_cast<int64_t>(mix(key + draw) % uint64_t(p.n));
        const int from = p.cells[head * p.cells_head_stride + i];
        if (from < 0 || counts[head * p.ncell + from] < 2) {
            continue;
        }
        const int64_t x = head * p.x_head_stride + i * p.x_row_stride;
        const float* old = p.centroids + (head * p.ncell + from) * p.d;
        float* centroid = p.centroids + (head * p.ncell + cell) * p.d;
        for (int j = threadIdx.x % 32; j < p.d; j += 32) {
            const float to = component(p.type, p.x, x + j);
            centroid[j] = fmaf(kStep, to - old[j], old[j]);
        }
        if (p.spherical) {
            normalise(centroid, p.d);
        }
        return;
    }
    // Every cell drawn holds one vector: this one stays where it is.
}

void check_sizes(const BatchedKMeansParams& p) {
    cell_means_workspace(update(p, nullptr)); // nhead, n, d, ncell
    FAISS_THROW_IF_NOT_FMT(
            p.n >= p.ncell,
            "n = %lld vectors are fewer than the ncell = %d cells they should "
            "make",
            static_cast<long long>(p.n),
            p.ncell);
    FAISS_THROW_IF_NOT_FMT(
            p.niter >= 1, "niter = %d must be at least 1", p.niter);
}

} // namespace

size_t kmeans_workspace(const BatchedKMeansParams& p) {
    check_sizes(p);
    Layout w;
    layout(p, w);
    return w.size();
}

void kmeans(
        const BatchedKMeansParams& p,
        void* workspace,
        cudaStream_t stream) {
    check_sizes(p);
    FAISS_THROW_IF_NOT_MSG(p.x, "x is null");
    FAISS_THROW_IF_NOT_MSG(p.centroids, "centroids is null");
    FAISS_THROW_IF_NOT_MSG(p.cells, "cells is null");
    FAISS_THROW_IF_NOT_MSG(workspace, "workspace is null");
    Layout w(static_cast<char*>(workspace));
    const Memory m = layout(p, w);
    const int64_t cells = int64_t(p.nhead) * p.ncell;
    const auto warps =
            static_cast<unsigned>((cells * 32 + kThreads - 1) / kThreads);
    const auto assign = [&](bool last) {
        if (!p.spherical) {
            half_norms({cells, p.d, p.centroids, m.bias}, stream);
        }
        if (p.type == DType::bfloat16) {
            auto a = assignment<AssignBfloat16Params>(p, m.bias);
            a.rounds_centroids = !last;
            assign_bfloat16(a, m.rows, stream);
        } else {
            assign_cells(assignment<AssignCellsParams>(p, m.bias), stream);
        }
    };
    draw_kernel<<<warps, kThreads, 0, stream>>>(p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    for (int i = 0; i < p.niter; i++) {
        assign(false);
        CellMeansParams u = update(p, m.counts);
        u.same_vectors = i > 0;
        cell_means(u, m.means, stream);
        if (p.spherical) {
            normalise_kernel<<<warps, kThreads, 0, stream>>>(p);
            FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
        }
        split_kernel<<<warps, kThreads, 0, stream>>>(p, m.counts, i);
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    }
    assign(true);
}

} // namespace faiss_saap::gpu
