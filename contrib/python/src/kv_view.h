/// A KvView together with the arrays that it reads.
#pragma once

#include <faiss_saap/KvView.h>

#include "arrays.h"

namespace faiss_saap::python {

/// What Python calls KvView. Holds the arrays, so that they live as long.
struct ArrayView {
    KvView kv;
    AnyArray k, v, page_table;
    int64_t capacity = 0; ///< tokens that the arrays (or the table) hold
    int device = kMainMemory; ///< of all arrays

    /// The view for the library's code on the CPU.
    /// @throws faiss::FaissException when the arrays are not in main memory
    const KvView& in_main_memory() const {
        FAISS_THROW_IF_NOT_FMT(
                device == kMainMemory,
                "kv lies on CUDA device %d, expected arrays in main memory "
                "(GpuAttentionAdapter takes the others)",
                device);
        return kv;
    }
    /// The view for kernels.
    /// @throws faiss::FaissException when the arrays lie elsewhere
    const KvView& on_device(int expected) const {
        FAISS_THROW_IF_NOT_FMT(
                device != kMainMemory,
                "kv lies in main memory, expected arrays on CUDA device %d",
                expected);
        FAISS_THROW_IF_NOT_FMT(
                device == expected,
                "kv lies on CUDA device %d, expected arrays on %d",
                device,
                expected);
        return kv;
    }
};

} // namespace faiss_saap::python
