/// The shape of matrices for split_products.cuh.
#pragma once

#include <faiss_saap/host_device.h>

namespace faiss_saap::gpu {

/// Columns of a split matrix: products take 16 at a time, zeros at the end. A row
/// is its high parts, then its low parts.
FAISS_SAAP_HOST_DEVICE inline int split_cols(int d) {
    return (d + 15) / 16 * 16;
}

/// Elements from row to row in shared memory, with 16 bytes that keep the rows of
/// a matrix out of each other's banks. In global memory there is no gap.
/// @param low  with low parts
FAISS_SAAP_HOST_DEVICE inline int split_stride(int cols, bool low = true) {
    return (low ? 2 : 1) * cols + 8;
}

} // namespace faiss_saap::gpu
