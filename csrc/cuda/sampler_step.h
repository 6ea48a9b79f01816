// sampler_step on the GPU; returns cudaGetLastError() after its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace seal_fast {

cudaError_t sampler_step(const SamplerStep& call, cudaStream_t stream);

}  // namespace seal_fast
