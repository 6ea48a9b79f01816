// Sixteen-bit floating point to float and back, rounding to nearest even, in integer arithmetic that every level vectorises.
#pragma once

#include "bits.h"

namespace seal_fast {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

}  // namespace seal_fast

namespace {

inline float to_float(float x) { return x; }

inline float to_float(seal_fast::Bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }

// Multiplying by 2^112 moves the exponent's bias and normalises subnormal numbers at once.
inline float to_float(seal_fast::Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    return as_float(sign | (magnitude >= (0x7C00u << 13) ? magnitude | 0x7F800000u : finite));
}

inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, seal_fast::Bfloat16& out) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Below 2^-14, adding 1/2 leaves the subnormal number, rounded by the processor, in the low bits of the sum.
inline void from_float(float x, seal_fast::Float16& out) {
    const uint32_t bits = as_bits(x), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;
    rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
    out.bits = uint16_t(rounded | ((bits >> 16) & 0x8000u));
}

}  // namespace
