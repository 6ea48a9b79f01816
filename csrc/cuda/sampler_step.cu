// The formula is in csrc/cpu/sampler_step.cpp. One thread per element: it is bound by memory, and every load is coalesced.
#include "sampler_step.h"

#include "rows.h"

namespace seal_fast {
namespace {

__global__ void __launch_bounds__(kTileThreads) sampler_step_kernel(SamplerStep call) {
    const Place p = place(call.dims);
    if (p.dim >= call.dims) return;
    const int64_t at = p.row * call.dims + p.dim;
    const int64_t trigger = p.row / (call.rows / call.triggers) * call.dims + p.dim;
    const double* c = call.coefficients + p.row / (call.rows / call.ladders) * kStepCoefficients;
    const float x = call.x[at], mu = call.mu ? call.mu[trigger] : 0.0f, gamma = call.gamma ? call.gamma[trigger] : 1.0f;
    float image = float(1.0 / c[0]) * x + float(-c[1] / c[0]) * (gamma * call.eps[at] + mu);
    // comparisons and not fmin, so that NaN passes through
    image = image > call.limit ? call.limit : image;
    image = image < -call.limit ? -call.limit : image;
    float out = float(c[2]) * x + float(c[3]) * image + float(c[4]) * mu;
    if (call.fresh) out += float(c[5]) * (gamma * call.fresh[at]);
    if (call.previous) out += float(c[6]) * call.previous[at];
    call.out[at] = out;
}

}  // namespace

cudaError_t sampler_step(const SamplerStep& call, cudaStream_t stream) {
    const unsigned blocks = tiles(call.rows, call.dims);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    sampler_step_kernel<<<blocks, kTileThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

}  // namespace seal_fast
