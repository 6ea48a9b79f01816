// From Python's addresses and sizes to the arguments of kernels; included by the bindings of both devices.
#pragma once

#include <array>
#include <cstdint>

#include "arguments.h"

namespace seal_fast {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// x, eps, mu, gamma, fresh, previous, coefficients, out
using StepAddresses = std::array<uintptr_t, 8>;
// rows, dims, triggers, ladders
using StepSizes = std::array<int64_t, 4>;

inline SamplerStep sampler_step_arguments(const StepAddresses& a, const StepSizes& s, double limit) {
    return {at<float>(a[0]), at<float>(a[1]),  at<float>(a[2]), at<float>(a[3]), at<float>(a[4]), at<float>(a[5]),
            at<double>(a[6]), at<float>(a[7]), s[0],            s[1],            s[2],            s[3],
            static_cast<float>(limit)};
}

// first, second, difference, losses, residual
using LossAddresses = std::array<uintptr_t, 5>;

inline ReversedLoss reversed_loss_arguments(const LossAddresses& a, int64_t rows, int64_t dims) {
    return {at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<double>(a[3]), at<float>(a[4]), rows, dims};
}

}  // namespace seal_fast
