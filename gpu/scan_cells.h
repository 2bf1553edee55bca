/// The nearest vectors of the probed cells.
#pragma once

#include <cstdint>

#include "PagedLists.h"

namespace faiss_saap::gpu {

/// Arguments of `scan_cells`. All pointers are device memory.
struct ScanCellsParams {
    ListsView lists;
    int64_t queries = 0;
    int nprobe = 0;
    int splits = 0; ///< blocks that share the cells of one query
    int k = 0;      ///< 1 to kMaxSelectK
    bool l2 = true; ///< squared distances; else inner products
    const float* x = nullptr;       ///< size queries * d
    const int32_t* cells = nullptr; ///< size queries * nprobe, -1: none; null:
                                    ///< cells 0 .. nprobe - 1
    uint64_t* keys = nullptr; ///< scratch, size queries * splits * k
    unsigned long long* stats = nullptr; ///< added to: cells that are not empty,
                                         ///< vectors read; or null
    float* distances = nullptr; ///< output, size queries * k
    int64_t* labels = nullptr;  ///< output, size queries * k
};

/// @throws faiss::FaissException when a kernel cannot be launched
void scan_cells(const ScanCellsParams& params, cudaStream_t stream);

/// The largest dimension: a query lies in shared memory beside the keys.
constexpr int kMaxScanD = 2048;

} // namespace faiss_saap::gpu
