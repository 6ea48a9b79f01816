// Convolution by Winograd's F(4x4, 3x3) on the CPU: 3 x 3, stride 1, zero padding 1, channels last, floats.
#pragma once

#include <cstdint>

#include "isa.h"

namespace seal_fast {

struct WinogradConvolution {
    const float* x;        // [images, height, width, channels]
    const float* weight;   // [36, channels, filters], transformed
    const float* bias;     // [filters] or null
    float* out;            // [images, height, width, filters]
    float* workspace;      // winograd_workspace(channels, filters, threads) floats
    int64_t images, height, width;
    int64_t channels, filters;   // multiples of 16, so that they fill whole vectors at every level
};

#define SEAL_DECLARE_WINOGRAD_CONVOLUTION(ISA)                                          \
    namespace ISA {                                                                     \
    int64_t winograd_workspace(int64_t channels, int64_t filters, int threads);         \
    void winograd_convolution(const WinogradConvolution& call, int threads);            \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_WINOGRAD_CONVOLUTION)
#undef SEAL_DECLARE_WINOGRAD_CONVOLUTION

}  // namespace seal_fast
