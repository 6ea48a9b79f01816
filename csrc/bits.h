// Floating point numbers as their bits and back, on CPU and GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SEAL_INLINE __host__ __device__ inline
#else
#define SEAL_INLINE inline
#endif

namespace {

SEAL_INLINE float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

SEAL_INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

}  // namespace
