// Group normalisation and SiLU on the CPU, channels last. T is float or Bfloat16; sums are float.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace seal_fast {

template <class T>
struct GroupNormSilu {
    const T* x;            // [images, pixels, channels]
    const float* shift;    // [images, channels], added to x; or null
    const float* weight;   // [channels]
    const float* bias;     // [channels]
    float* stats;          // [images, groups, 2]: mean and 1 / deviation, filled by the forward pass
    float* workspace;      // [images, 4, channels]
    int64_t images, pixels, channels, groups;
};

#define SEAL_DECLARE_GROUP_NORM_SILU(ISA)                                                                    \
    namespace ISA {                                                                                          \
    template <class T>                                                                                       \
    void group_norm_silu(const GroupNormSilu<T>& call, double eps, T* out, int threads);                     \
    template <class T>                                                                                       \
    void group_norm_silu_backward(const GroupNormSilu<T>& call, const T* grad, T* x_grad, int threads);      \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_GROUP_NORM_SILU)
#undef SEAL_DECLARE_GROUP_NORM_SILU

}  // namespace seal_fast
