// Group normalisation and SiLU on the CPU, channels last. T is float or Bfloat16; sums are float.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace seal_fast {

// What both passes read.
template <class T>
struct GroupNormSilu {
    const T* x;            // [images, pixels, channels]
    const float* shift;    // [images, channels], added to x; or null
    const float* weight;   // [channels]
    const float* bias;     // [channels]
    float* stats;          // [images, groups, 2]: mean and 1 / deviation, filled by the forward pass
    float* workspace;      // [images, 4, channels]
    int64_t images, pixels, channels, groups;

    template <class Visit>
    void fields(Visit& visit) {
        visit("x", x);
        visit("shift", shift);
        visit("weight", weight);
        visit("bias", bias);
        visit("stats", stats);
        visit("workspace", workspace);
        visit("images", images);
        visit("pixels", pixels);
        visit("channels", channels);
        visit("groups", groups);
    }
};

template <class T>
struct GroupNormSiluForward : GroupNormSilu<T> {
    T* out;       // like x
    double eps;   // added to the variance

    template <class Visit>
    void fields(Visit& visit) {
        GroupNormSilu<T>::fields(visit);
        visit("out", out);
        visit("eps", eps);
    }
};

template <class T>
struct GroupNormSiluBackward : GroupNormSilu<T> {
    const T* grad;   // of out
    T* x_grad;

    template <class Visit>
    void fields(Visit& visit) {
        GroupNormSilu<T>::fields(visit);
        visit("grad", grad);
        visit("x_grad", x_grad);
    }
};

#define SEAL_FAST_DECLARE_GROUP_NORM_SILU(ISA)                                             \
    namespace ISA {                                                                   \
    template <class T>                                                                \
    void group_norm_silu(const GroupNormSiluForward<T>& call, int threads);           \
    template <class T>                                                                \
    void group_norm_silu_backward(const GroupNormSiluBackward<T>& call, int threads); \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_GROUP_NORM_SILU)
#undef SEAL_FAST_DECLARE_GROUP_NORM_SILU

}  // namespace seal_fast
