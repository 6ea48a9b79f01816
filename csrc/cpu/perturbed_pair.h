// perturbed_pair on the CPU.
#pragma once

#include "../arguments.h"
#include "isa.h"

namespace seal_fast {

#define SEAL_DECLARE_PERTURBED_PAIR(ISA)                        \
    namespace ISA {                                             \
    void perturbed_pair(const PerturbedPair& call, int threads); \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_PERTURBED_PAIR)
#undef SEAL_DECLARE_PERTURBED_PAIR

}  // namespace seal_fast
