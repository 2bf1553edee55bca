#include <faiss_saap/gpu/RaftSelectK.h>

#include <exception>

#include <raft/core/device_mdspan.hpp>
#include <raft/core/device_resources.hpp>
#include <raft/core/resource/device_memory_resource.hpp>
#include <raft/matrix/select_k.cuh>

#include "check.h"
#include "check_select_k.h"

namespace faiss_saap::gpu {

namespace {

/// Setting up and tearing down a pool may leave an error that nobody looked at,
/// which the next launch would be blamed for.
void forget_error() {
    if (!loses_context(cudaPeekAtLastError())) {
        cudaGetLastError();
    }
}

} // namespace

struct RaftSelectK::Impl {
    raft::device_resources resources;
    /// RAFT wants values even where the caller does not.
    float* values = nullptr;
    size_t capacity = 0;

    ~Impl() {
        cudaFree(values);
    }
};

RaftSelectK::RaftSelectK(size_t pool) {
    try {
        impl_ = std::make_unique<Impl>();
        raft::resource::set_workspace_to_pool_resource(
                impl_->resources, pool);
        forget_error();
    } catch (const std::exception& e) {
        FAISS_THROW_FMT("RAFT: %s", e.what());
    }
}

RaftSelectK::~RaftSelectK() {
    impl_.reset();
    forget_error();
}

void RaftSelectK::operator()(const SelectKParams& p, cudaStream_t stream) {
    check_select_k(p);
    FAISS_THROW_IF_NOT_FMT(
            p.k <= p.len,
            "k = %d is more than len = %lld, which RAFT does not select",
            p.k,
            static_cast<long long>(p.len));
    FAISS_THROW_IF_NOT_FMT(
            p.scores_row_stride == p.len || p.rows <= 1,
            "scores_row_stride = %lld differs from len = %lld, which RAFT does "
            "not read",
            static_cast<long long>(p.scores_row_stride),
            static_cast<long long>(p.len));
    if (p.rows == 0) {
        return;
    }
    if (p.len == 1) { // for which RAFT 25.10 asks the driver for an invalid launch
        select_k(p, stream);
        return;
    }
    float* values = p.values;
    const size_t size = size_t(p.rows) * p.k;
    if (!values && impl_->capacity < size) {
        float* larger = nullptr;
        FAISS_SAAP_CUDA_CHECK(cudaMalloc(
                reinterpret_cast<void**>(&larger), size * sizeof(float)));
        cudaFree(impl_->values);
        impl_->values = larger;
        impl_->capacity = size;
    }
    values = values ? values : impl_->values;
    try {
        raft::resource::set_cuda_stream(impl_->resources, stream);
        raft::matrix::select_k<float, int32_t>(
                impl_->resources,
                raft::make_device_matrix_view<const float, int64_t>(
                        p.scores, p.rows, p.len),
                std::nullopt,
                raft::make_device_matrix_view<float, int64_t>(
                        values, p.rows, int64_t(p.k)),
                raft::make_device_matrix_view<int32_t, int64_t>(
                        p.ids, p.rows, int64_t(p.k)),
                !p.largest,
                true);
    } catch (const std::exception& e) {
        FAISS_THROW_FMT("RAFT: %s", e.what());
    }
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

} // namespace faiss_saap::gpu
