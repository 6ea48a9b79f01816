// Counter-based normal noise on the CPU.
#pragma once

#include <cstdint>

#include "isa.h"

namespace seal_fast {

#define SEAL_DECLARE_COUNTER_NORMAL(ISA)                                                                             \
    namespace ISA {                                                                                                  \
    void counter_normal(float* out, uint64_t seed, uint32_t draw, int64_t rows, int64_t dims, int threads);          \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_COUNTER_NORMAL)
#undef SEAL_DECLARE_COUNTER_NORMAL

}  // namespace seal_fast
