// perturbed_pair: inputs[i] = a x0 + c mu + b gamma eps_i and difference = eps_1 - eps_2, noise as in csrc/noise.h.
#include "perturbed_pair.h"

#include "normals.h"

namespace seal_fast {
namespace SEAL_ISA {

void perturbed_pair(const PerturbedPair& call, int threads) {
    for_each_chunk(call.rows, call.dims, threads, [&](int64_t row, int64_t start, int64_t length) {
        const int64_t at = row * call.dims + start;
        const int64_t trigger = row / (call.rows / call.triggers) * call.dims + start;
        const double* c = call.coefficients + 3 * (row / (call.rows / call.ladders));
        const float from_x0 = float(c[0]), from_noise = float(c[1]), from_mu = float(c[2]);
        float eps1[kChunk], eps2[kChunk];
        normals(call.seed, 0, uint32_t(row), start, length, eps1);
        normals(call.seed, 1, uint32_t(row), start, length, eps2);
        const float* x0 = call.x0 + at;
        const float* mu = call.mu + trigger;
        const float* gamma = call.gamma + trigger;
        float* __restrict__ first = call.inputs + at;
        float* __restrict__ second = first + call.rows * call.dims;
        float* __restrict__ difference = call.difference + at;
        for (int64_t i = 0; i < length; ++i) {
            const float shifted = from_x0 * x0[i] + from_mu * mu[i], scale = from_noise * gamma[i];
            first[i] = shifted + scale * eps1[i];
            second[i] = shifted + scale * eps2[i];
            difference[i] = eps1[i] - eps2[i];
        }
    });
}

}  // namespace SEAL_ISA
}  // namespace seal_fast
