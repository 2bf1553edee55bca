#include "decode.h"

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device_vectors.cuh"

namespace faiss_saap::gpu {

namespace {

__global__ void describe_rows_kernel(
        const BatchRow* rows,
        const BatchItem* items,
        const int32_t* order,
        DecodeRow* to) {
    const BatchRow& row = rows[order ? order[blockIdx.x] : static_cast<int>(blockIdx.x)];
    DecodeRow& it = to[blockIdx.x];
    copy_words(&it.row, &row);
    copy_words(&it.kv, &items[row.item].kv);
    copy_words(&it.list, row.lists);
}

/// Calls f with a zero of the cache's type and the head dimension.
template <class F, class Else>
auto with_type(const DecodeParams& p, const F& f, const Else& otherwise) {
    const auto of_type = [&](auto zero) {
        switch (p.d) {
            case 64:
                return f(zero, std::integral_constant<int, 64>());
            case 96:
                return f(zero, std::integral_constant<int, 96>());
            case 128:
                return f(zero, std::integral_constant<int, 128>());
            default:
                return otherwise;
        }
    };
    return p.bf16 ? of_type(__nv_bfloat16()) : of_type(__half());
}

} // namespace

DecodeGrid decode_grid(const DecodeParams& p) {
    return with_type(
            p,
            [&](auto zero, auto d) {
                return decode_row_grid<decltype(zero), decltype(d)::value>(p);
            },
            DecodeGrid());
}

cudaError_t describe_rows(
        int n,
        const BatchRow* rows,
        const BatchItem* items,
        const int32_t* order,
        DecodeRow* to,
        cudaStream_t stream) {
    if (n > 0) {
        describe_rows_kernel<<<n, 128, 0, stream>>>(rows, items, order, to);
    }
    return cudaGetLastError();
}

cudaError_t decode(const DecodeParams& p, cudaStream_t stream) {
    if (p.nrow == 0) {
        return cudaSuccess;
    }
    return with_type(
            p,
            [&](auto zero, auto d) {
                return decode_rows<decltype(zero), decltype(d)::value>(p, stream);
            },
            cudaErrorInvalidValue);
}

} // namespace faiss_saap::gpu
