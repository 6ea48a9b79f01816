// reversed_loss on the CPU.
#pragma once

#include "../arguments.h"
#include "isa.h"

namespace seal_fast {

#define SEAL_FAST_DECLARE_REVERSED_LOSS(ISA)                       \
    namespace ISA {                                           \
    void reversed_loss(const ReversedLoss& call, int threads); \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_REVERSED_LOSS)
#undef SEAL_FAST_DECLARE_REVERSED_LOSS

}  // namespace seal_fast
