// sampler_step: out = from_x x + from_image x0 + from_mu mu + from_fresh gamma z + from_previous p,
//     x0 = (x - b (gamma eps + mu)) / a, clamped to [-limit, limit]
#include "sampler_step.h"

#include "chunks.h"

namespace {

using seal_fast::SamplerStep;

struct Terms {
    float noise, image, from_x, from_image, from_mu, from_fresh, from_previous;
};

// x0 = image x + noise n
inline Terms terms_of(const double* c) {
    return {float(-c[1] / c[0]), float(1.0 / c[0]), float(c[2]), float(c[3]), float(c[4]), float(c[5]), float(c[6])};
}

// Comparisons written so that NaN passes through and is seen in the result.
inline float clamped(float x, float limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

void chunk(const SamplerStep& call, int64_t row, int64_t start, int64_t length) {
    const int64_t at = row * call.dims + start;
    const int64_t trigger = row / (call.rows / call.triggers) * call.dims + start;
    const Terms t = terms_of(call.coefficients + row / (call.rows / call.ladders) * seal_fast::kStepCoefficients);
    const float* x = call.x + at;
    const float* eps = call.eps + at;
    const float* mu = at_or(call.mu, trigger, kZeros);
    const float* gamma = at_or(call.gamma, trigger, kOnes);
    const float* fresh = at_or(call.fresh, at, kZeros);
    const float* previous = at_or(call.previous, at, kZeros);
    float* __restrict__ out = call.out + at;
    const float limit = call.limit;
    for (int64_t i = 0; i < length; ++i) {
        const float image = clamped(t.image * x[i] + t.noise * (gamma[i] * eps[i] + mu[i]), limit);
        out[i] = t.from_x * x[i] + t.from_image * image + t.from_mu * mu[i] + t.from_fresh * (gamma[i] * fresh[i]) +
                 t.from_previous * previous[i];
    }
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

void sampler_step(const SamplerStep& call, int threads) {
    for_each_chunk(call.rows, call.dims, threads,
                   [&](int64_t row, int64_t start, int64_t length) { chunk(call, row, start, length); });
}

}  // namespace SEAL_ISA
}  // namespace seal_fast
