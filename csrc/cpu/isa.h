// Instruction set levels: which of them were built, and which this machine can run.
//
// Every kernel source is compiled once per level into the namespace of that level (SEAL_FAST_ISA), and SEAL_FAST_SELECT picks one at
// run time. The build never asks for the builder's own instruction set, so one binary runs everywhere.
#pragma once

namespace seal_fast {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The highest level this processor (and its operating system) supports.
Isa best_isa();

}  // namespace seal_fast

#if defined(__x86_64__)
#define SEAL_FAST_FOR_EACH_ISA(M) M(baseline) M(avx2) M(avx512) M(avx512bf16)
#define SEAL_FAST_SELECT(isa, function)                     \
    ((isa) == kAvx512Bf16 ? avx512bf16::function       \
     : (isa) == kAvx512   ? avx512::function           \
     : (isa) == kAvx2     ? avx2::function             \
                          : baseline::function)
#else
#define SEAL_FAST_FOR_EACH_ISA(M) M(baseline)
#define SEAL_FAST_SELECT(isa, function) (baseline::function)
#endif
