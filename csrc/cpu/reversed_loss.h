// reversed_loss on the CPU.
#pragma once

#include "../arguments.h"
#include "isa.h"

namespace seal_fast {

#define SEAL_DECLARE_REVERSED_LOSS(ISA)                       \
    namespace ISA {                                           \
    void reversed_loss(const ReversedLoss& call, int threads); \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_REVERSED_LOSS)
#undef SEAL_DECLARE_REVERSED_LOSS

}  // namespace seal_fast
