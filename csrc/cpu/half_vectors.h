// Vectors of floats from and to memory that holds floats or bfloat16, rounding to nearest even.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "half.h"
#include "simd.h"

namespace {

typedef uint16_t Words __attribute__((vector_size(2 * kFloats)));

inline Floats to_floats(const float* p) { return load(p); }

inline Floats to_floats(const seal_fast::Bfloat16* p) {
    Words words;
    __builtin_memcpy(&words, p, sizeof words);
    return (Floats)(__builtin_convertvector(words, Vec<uint32_t>) << 16);
}

inline void from_floats(Floats v, float* p) { store(p, v); }

inline void from_floats(Floats v, seal_fast::Bfloat16* p) {
#if defined(__AVX512BF16__)
    const __m256bh words = _mm512_cvtneps_pbh((__m512)v);
#else
    const Vec<uint32_t> bits = (Vec<uint32_t>)v, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Words words = __builtin_convertvector((bits & 0x7FFFFFFFu) > 0x7F800000u ? Vec<uint32_t>{} + 0x7FC0u : rounded, Words);
#endif
    __builtin_memcpy(p, &words, sizeof words);
}

}  // namespace
