#include "adamw_step.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;

__global__ void adamw_kernel(DeviceAdamW p) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= p.nhead * p.count || !p.active[i / p.count]) {
        return;
    }
    const AdamWParams& a = p.adamw;
    const float g = p.gradient[i];
    const float first = a.beta1 * p.first[i] + (1 - a.beta1) * g;
    const float second = a.beta2 * p.second[i] + (1 - a.beta2) * g * g;
    p.first[i] = first;
    p.second[i] = second;
    p.parameters[i] = (1 - a.rate * a.decay) * p.parameters[i] -
            a.rate * a.correction1 * first /
                    (sqrtf(second * a.correction2) + a.epsilon);
}

} // namespace

cudaError_t adamw_step(const DeviceAdamW& p, cudaStream_t stream) {
    const int64_t blocks = (p.nhead * p.count + kThreads - 1) / kThreads;
    adamw_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
