#include "decode.cuh"

namespace faiss_saap::gpu {

template cudaError_t decode_rows<__half, 128>(const DecodeParams&, cudaStream_t);
template cudaError_t decode_rows<__nv_bfloat16, 128>(const DecodeParams&, cudaStream_t);
template DecodeGrid decode_row_grid<__half, 128>(const DecodeParams&);
template DecodeGrid decode_row_grid<__nv_bfloat16, 128>(const DecodeParams&);

} // namespace faiss_saap::gpu
