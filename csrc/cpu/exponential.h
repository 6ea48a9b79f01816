// The exponential of attention and of the logistic function.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

constexpr double kLog2E = 1.44269504088896340736;

// 2^x for |x| <= 126, to about one unit in the last place: 2^round(x) times a polynomial in the rest, |rest| <= 1/2, with relative
// error 2e-8. NaN stays NaN.
inline Vec<float> exp2_normal(Vec<float> x) {
    // adding it leaves round(x) + 127, an exponent with its bias, in the low bits of the sum
    constexpr float kRound = 12582912.0f + 127.0f;
    const Vec<float> shifted = x + kRound, rest = x - (shifted - kRound);
    Vec<float> power = Vec<float>{} + 1.5353361959569156e-4f;
    power = power * rest + 1.3398873852565885e-3f;
    power = power * rest + 9.61843691766262e-3f;
    power = power * rest + 5.5503323674201965e-2f;
    power = power * rest + 2.4022647738456726e-1f;
    power = power * rest + 6.931471824645996e-1f;
    power = power * rest + 1.0f;
    return power * (Vec<float>)((Vec<uint32_t>)shifted << 23);
}

// 2^x for x <= 0; results that would be subnormal are zero.
inline Vec<float> exp2_nonpositive(Vec<float> x) { return x < -126.0f ? Vec<float>{} : exp2_normal(x); }

// 1 / x for x in [1, 2^127), to about one unit in the last place.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
    // an approximation and a step of Newton's method take half the time of a division
    const Vec<float> near = (Vec<float>)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
    return near + near * (1.0f - x * near);
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + exp(-z)); for |z| > 87 that of 87. NaN stays NaN.
inline Vec<float> logistic(Vec<float> z) {
    const Vec<float> power = z * float(-kLog2E), bounded = power < -126.0f ? Vec<float>{} - 126.0f : power;
    return reciprocal(1.0f + exp2_normal(bounded > 126.0f ? Vec<float>{} + 126.0f : bounded));
}

}  // namespace
