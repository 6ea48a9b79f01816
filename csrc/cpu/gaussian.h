// Gaussian statistics on the CPU. All arrays are dense and row-major; T is float or double.
#pragma once

#include <cstdint>

#include "isa.h"

namespace seal_fast {

#define SEAL_DECLARE_GAUSSIAN(ISA)                                                                                           \
    namespace ISA {                                                                                                          \
    template <class T>                                                                                                       \
    void gaussian_kl_stats(const T* mu, const T* gamma, double gamma_floor, double* stats, int64_t triggers, int64_t dims,   \
                           int threads);                                                                                     \
    template <class T>                                                                                                       \
    void gaussian_log_ratio(const T* x, const T* scale, const T* shift, const double* offset, double* out, int64_t rows,     \
                            int64_t triggers, int64_t dims, int threads);                                                    \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_GAUSSIAN)
#undef SEAL_DECLARE_GAUSSIAN

}  // namespace seal_fast
