// The formula is in csrc/cpu/reversed_loss.cpp. One block per item; sums are double and in a fixed order.
#include "reversed_loss.h"

namespace seal_fast {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) reversed_loss_kernel(ReversedLoss call) {
    __shared__ double sums[kThreads];
    const int64_t item = int64_t(blockIdx.x) * call.dims;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < call.dims; i += kThreads) {
        const float r = call.difference[item + i] - (call.first[item + i] - call.second[item + i]);
        call.residual[item + i] = r;
        sum += double(r) * double(r);
    }
    sums[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) call.losses[blockIdx.x] = sums[0] / 2;
}

}  // namespace

cudaError_t reversed_loss(const ReversedLoss& call, cudaStream_t stream) {
    if (call.items > INT32_MAX) return cudaErrorInvalidConfiguration;
    reversed_loss_kernel<<<static_cast<unsigned>(call.items), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

}  // namespace seal_fast
