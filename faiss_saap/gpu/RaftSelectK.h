/// RAFT's selection of the best of each row. In the library
/// faiss_saap::raft_select_k, which is built where RAFT's headers are found.
#pragma once

#include <cstddef>
#include <memory>

#include <faiss_saap/gpu/select_k.h>

namespace faiss_saap::gpu {

/// raft::matrix::select_k with the arguments of select_k: the reference that
/// our kernel is compared with, and an alternative on large batches. Which of
/// equal scores it takes is not determined, and infinities are scores like
/// others.
///
/// Has a pool of memory of its own, so that a call may be captured in a graph
/// after one of the same size that was not. One thread at a time.
class RaftSelectK {
   public:
    /// @param pool  bytes of device memory; what RAFT needs grows with rows * k
    /// @throws faiss::FaissException when memory is short
    explicit RaftSelectK(size_t pool = size_t(64) << 20);
    ~RaftSelectK();

    /// @throws faiss::FaissException as select_k, also when k > len or rows do
    ///         not follow each other, and when RAFT fails
    void operator()(const SelectKParams& params, cudaStream_t stream);

   private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace faiss_saap::gpu
