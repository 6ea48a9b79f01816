// The formula is in csrc/cpu/sampler_step.cpp. One thread per element: it is bound by memory, and every load is coalesced.
// Items follow one another on the grid, each cut into blocks of kThreads elements.
#include "sampler_step.h"

namespace seal_fast {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) sampler_step_kernel(SamplerStep call, SamplerTerms terms, int64_t blocks_per_item) {
    const int64_t dim = blockIdx.x % blocks_per_item * kThreads + threadIdx.x;
    if (dim >= call.dims) return;
    const int64_t at = blockIdx.x / blocks_per_item * call.dims + dim;
    const float x = call.x[at], mu = call.mu ? call.mu[dim] : 0.0f, gamma = call.gamma ? call.gamma[dim] : 1.0f;
    float image = terms.image * x + terms.noise * (gamma * call.eps[at] + mu);
    // comparisons and not fmin, so that NaN passes through
    image = image > call.limit ? call.limit : image;
    image = image < -call.limit ? -call.limit : image;
    float out = terms.from_x * x + terms.from_image * image + terms.from_mu * mu;
    if (call.fresh) out += terms.from_fresh * (gamma * call.fresh[at]);
    if (call.previous) out += terms.from_previous * call.previous[at];
    call.out[at] = out;
}

}  // namespace

cudaError_t sampler_step(const SamplerStep& call, cudaStream_t stream) {
    const int64_t blocks_per_item = (call.dims + kThreads - 1) / kThreads, blocks = call.items * blocks_per_item;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    sampler_step_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call, terms_of(call), blocks_per_item);
    return cudaGetLastError();
}

}  // namespace seal_fast
