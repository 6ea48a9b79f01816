// Convolution by Winograd's F(4x4, 3x3) on the CPU: 3 x 3, stride 1, zero padding 1, channels last.
// T is float or Bfloat16; everything between input and output is float.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace seal_fast {

template <class T>
struct WinogradConvolution {
    const T* x;            // [images, height, width, channels]
    const float* weight;   // [36, channels, filters], transformed
    const float* bias;     // [filters] or null
    T* out;                // [images, height, width, filters]
    float* workspace;      // winograd_workspace(channels, filters, threads) floats
    int64_t images, height, width;
    int64_t channels, filters;   // multiples of 16, so that they fill whole vectors at every level

    template <class Visit>
    void fields(Visit& visit) {
        visit("x", x);
        visit("weight", weight);
        visit("bias", bias);
        visit("out", out);
        visit("workspace", workspace);
        visit("images", images);
        visit("height", height);
        visit("width", width);
        visit("channels", channels);
        visit("filters", filters);
    }
};

#define SEAL_FAST_DECLARE_WINOGRAD_CONVOLUTION(ISA)                                          \
    namespace ISA {                                                                     \
    int64_t winograd_workspace(int64_t channels, int64_t filters, int threads);         \
    template <class T>                                                                  \
    void winograd_convolution(const WinogradConvolution<T>& call, int threads);         \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_WINOGRAD_CONVOLUTION)
#undef SEAL_FAST_DECLARE_WINOGRAD_CONVOLUTION

}  // namespace seal_fast
