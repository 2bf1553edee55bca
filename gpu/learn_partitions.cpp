#include "learn_partitions.h"

#include <algorithm>

#include <faiss/IndexFlat.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/gpu/cell_means.h>
#include <faiss_saap/gpu/kmeans.h>

namespace faiss_saap::gpu {

std::vector<Partition> learn_partitions(
        const float* x,
        int nhead,
        int64_t n,
        int d,
        int ncell,
        RoutingNeeds space,
        const KMeansParams& params,
        faiss::MetricType metric,
        const StreamMemory& memory) {
    BatchedKMeansParams k;
    k.nhead = nhead, k.n = n, k.d = d, k.ncell = ncell;
    k.niter = params.niter;
    k.spherical = params.spherical;
    k.seed = static_cast<unsigned>(params.seed);
    k.x = x, k.x_head_stride = n * d, k.x_row_stride = d;
    CellMeansParams m;
    m.nhead = nhead, m.n = n, m.d = d, m.ncell = ncell;
    m.x = x, m.x_head_stride = n * d, m.x_row_stride = d;
    const size_t workspace_bytes =
            std::max(kmeans_workspace(k), cell_means_workspace(m));
    const size_t of_head = size_t(ncell) * d, size = nhead * of_head;
    const StreamBuffer<float> centroids(memory, size), means(memory, size);
    const StreamBuffer<int32_t> cells(memory, nhead * n),
            counts(memory, size_t(nhead) * ncell);
    const StreamBuffer<char> workspace(memory, workspace_bytes);
    k.centroids = centroids.get();
    k.cells = cells.get(), k.cells_head_stride = n;
    m.cells = cells.get(), m.cells_head_stride = n;
    m.means = means.get();
    m.counts = counts.get();
    kmeans(k, workspace.get(), memory.stream);
    // An empty cell is represented by its centroid.
    copy_async(means.get(), centroids.get(), size, memory.stream);
    cell_means(m, workspace.get(), memory.stream);
    std::vector<float> host_centroids(size), host_means(size);
    copy_async(host_centroids.data(), centroids.get(), size, memory.stream);
    copy_async(host_means.data(), means.get(), size, memory.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory.stream));

    const auto assigner = [&](const float* rows, faiss::MetricType by) {
        auto flat = std::make_shared<faiss::IndexFlat>(d, by);
        flat->add(ncell, rows);
        return std::make_shared<QuantizerAssigner>(flat, space);
    };
    std::vector<Partition> heads(nhead);
    for (int h = 0; h < nhead; h++) {
        heads[h].key = assigner(
                host_centroids.data() + h * of_head,
                params.spherical ? faiss::METRIC_INNER_PRODUCT : faiss::METRIC_L2);
        heads[h].query = assigner(host_means.data() + h * of_head, metric);
    }
    return heads;
}

} // namespace faiss_saap::gpu
