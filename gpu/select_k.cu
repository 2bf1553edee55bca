#include <faiss_saap/gpu/select_k.h>

#include <cmath>


#include "BlockTopK.h"
#include "check.h"
#include "check_select_k.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = BlockTopK::kMaxReserve;

/// One block per row.
__global__ void __launch_bounds__(kThreads) select_k_kernel(SelectKParams p) {
    extern __shared__ uint64_t shared[];
    const int64_t row = blockIdx.x;
    const float* scores = p.scores + row * p.scores_row_stride;
    const float worst = p.largest ? -INFINITY : INFINITY;
    BlockTopK best(shared, p.k);
    for (int64_t first = 0; first < p.len; first += kThreads) {
        best.reserve(kThreads);
        const int64_t i = first + threadIdx.x;
        if (i < p.len) {
            const float score = scores[i];
            if (score != worst && !isnan(score)) {
                best.push(SelectionKey::make(
                        score, static_cast<uint32_t>(i), p.largest));
            }
        }
    }
    const uint64_t* keys = best.finish();
    for (int j = threadIdx.x; j < p.k; j += kThreads) {
        const bool none = keys[j] == SelectionKey::kNone;
        p.ids[row * p.k + j] = none ? -1 : int32_t(SelectionKey::id(keys[j]));
        if (p.values) {
            p.values[row * p.k + j] =
                    none ? worst : SelectionKey::score(keys[j], p.largest);
        }
    }
}

} // namespace

void select_k(const SelectKParams& p, cudaStream_t stream) {
    check_select_k(p);
    if (p.rows == 0) {
        return;
    }
    select_k_kernel<<<static_cast<unsigned>(p.rows),
                      kThreads,
                      BlockTopK::shared_bytes(p.k),
                      stream>>>(p);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
