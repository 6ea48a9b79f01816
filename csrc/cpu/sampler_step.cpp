// sampler_step: out = from_x x + from_image x0 + from_mu mu + from_fresh gamma z + from_previous p,
//     x0 = (x - b (gamma eps + mu)) / a, clamped to [-limit, limit]
#include "sampler_step.h"

#include "chunks.h"

namespace {

using seal_fast::SamplerStep;
using seal_fast::SamplerTerms;

// Comparisons written so that NaN passes through and is seen in the result.
inline float clamped(float x, float limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

void chunk(const SamplerStep& call, const SamplerTerms& t, int64_t item, int64_t start, int64_t length) {
    const int64_t at = item * call.dims + start;
    const float* x = call.x + at;
    const float* eps = call.eps + at;
    const float* mu = at_or(call.mu, start, kZeros);
    const float* gamma = at_or(call.gamma, start, kOnes);
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
namespace SEAL_FAST_ISA {

void sampler_step(const SamplerStep& call, int threads) {
    const SamplerTerms terms = terms_of(call);
    for_each_chunk(call.items, call.dims, threads,
                   [&](int64_t item, int64_t start, int64_t length) { chunk(call, terms, item, start, length); });
}

}  // namespace SEAL_FAST_ISA
}  // namespace seal_fast
