// perturbed_pair on the GPU; returns cudaGetLastError() after its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace seal_fast {

cudaError_t perturbed_pair(const PerturbedPair& call, cudaStream_t stream);

}  // namespace seal_fast
