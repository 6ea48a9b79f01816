// sampler_step on the CPU.
#pragma once

#include "../arguments.h"
#include "isa.h"

namespace seal_fast {

#define SEAL_FAST_DECLARE_SAMPLER_STEP(ISA)                      \
    namespace ISA {                                         \
    void sampler_step(const SamplerStep& call, int threads); \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_SAMPLER_STEP)
#undef SEAL_FAST_DECLARE_SAMPLER_STEP

}  // namespace seal_fast
