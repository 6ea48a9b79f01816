// Counter-based normal noise, shared by CPU and GPU: a number is a function of (seed, draw, row, dimension) and of nothing else.
//
//     words = Philox4x32-10(counter = (dimension / 4, row, draw, 0), key = (seed low, seed high))      Salmon et al., SC 2011
//     normals 0, 1 = Box-Muller(words 0, 1), normals 2, 3 = Box-Muller(words 2, 3)
//     Box-Muller(r, s) = sqrt(-2 log u) (cos, sin)(2 pi v),   u = (r + 1/2) / 2^32, v = (s + 1/2) / 2^32
//
// Logarithm and sine are written out, so every backend and instruction set rounds alike but for fused multiply-adds, and plain
// enough for the compiler to vectorise. Relative errors are a few 2^-24 everywhere, also where log u and sin vanish.
#pragma once

#include "bits.h"

namespace {

struct Words {
    uint32_t w[4];
};

struct Key {
    uint32_t low, high;
};

SEAL_INLINE Key first_key(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

SEAL_INLINE Key next_key(Key key) { return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u}; }

constexpr int kPhiloxRounds = 10;

SEAL_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, Key key) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key.low;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key.high;
    c3 = uint32_t(p0);
}

SEAL_INLINE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
    Key key = first_key(seed);
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round, key = next_key(key)) philox_round(c0, c1, c2, c3, key);
    return {{c0, c1, c2, c3}};
}

// `yes` where the mask has all bits set, `no` where it has none. In bits, since compilers vectorise that more readily than branches.
SEAL_INLINE float chosen(uint32_t mask, float yes, float no) {
    return as_float((as_bits(yes) & mask) | (as_bits(no) & ~mask));
}

// -log((r + 1/2) / 2^32). With the fraction as 2^e m, m in [sqrt(1/2), sqrt(2)): -log = -e log 2 - 2 atanh(f / (2 + f)),
// f = m - 1. Near 1 the fraction would have lost the digits of f, so there f comes from the complement of r.
SEAL_INLINE float minus_log(uint32_t r) {
    constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
    const float u = (float(r) + 0.5f) * 0x1p-32f, complement = (float(~r) + 0.5f) * 0x1p-32f;
    const uint32_t bits = as_bits(u), biased = (bits - kSqrtHalf + (64u << 23)) >> 23;
    const float e = float(int32_t(biased)) - 64.0f;
    // both top bits of r: the fraction is at least 3/4, and e is 0
    const uint32_t near_one = uint32_t(int32_t(r & (r << 1)) >> 31);
    const float f = chosen(near_one, -complement, as_float(bits - ((biased - 64u) << 23)) - 1.0f);
    const float s = f / (2.0f + f), s2 = s * s;
    const float series = s2 * (0.333333333f + s2 * (0.2f + s2 * (0.142857143f + s2 * 0.111111111f)));
    return -(e * 0.693147181f + 2.0f * (s + s * series));
}

struct Pair {
    float cosine, sine;
};

// Of 2 pi (s + 1/2) / 2^32. The nearest quarter turn is split off in integers, so nothing is lost to the size of the angle.
SEAL_INLINE Pair turn(uint32_t s) {
    const uint32_t quarter = (s + 0x20000000u) >> 30;
    const float x = (float(int32_t(s - (quarter << 30))) + 0.5f) * 1.46291808e-9f, x2 = x * x;
    const float sine = x + x * x2 * (-0.166666667f + x2 * (8.33333333e-3f + x2 * (-1.98412698e-4f + x2 * 2.75573192e-6f)));
    const float cosine = 1.0f + x2 * (-0.5f + x2 * (4.16666667e-2f + x2 * (-1.38888889e-3f + x2 * 2.48015873e-5f)));
    const uint32_t odd = 0u - (quarter & 1u);
    // signs by flipping the top bit: cos is negative in quarters 1 and 2, sin in 2 and 3
    const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
    return {as_float(as_bits(chosen(odd, sine, cosine)) ^ cosine_sign), as_float(as_bits(chosen(odd, cosine, sine)) ^ sine_sign)};
}

SEAL_INLINE Pair box_muller(uint32_t r, uint32_t s) {
    const float radius = __builtin_sqrtf(2.0f * minus_log(r));
    const Pair p = turn(s);
    return {radius * p.cosine, radius * p.sine};
}

}  // namespace
