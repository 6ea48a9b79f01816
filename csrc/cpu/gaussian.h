// Gaussian statistics on the CPU.
#pragma once

#include "../arguments.h"
#include "isa.h"

namespace seal_fast {

#define SEAL_FAST_DECLARE_GAUSSIAN(ISA)                                         \
    namespace ISA {                                                        \
    template <class T>                                                     \
    void gaussian_kl_stats(const GaussianKlStats<T>& call, int threads);   \
    template <class T>                                                     \
    void gaussian_log_ratio(const GaussianLogRatio<T>& call, int threads); \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_GAUSSIAN)
#undef SEAL_FAST_DECLARE_GAUSSIAN

}  // namespace seal_fast
