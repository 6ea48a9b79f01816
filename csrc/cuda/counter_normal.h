// Counter-based normal noise on the GPU; returns cudaGetLastError() after its launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace seal_fast {

cudaError_t counter_normal(float* out, uint64_t seed, uint32_t draw, int64_t rows, int64_t dims, cudaStream_t stream);

}  // namespace seal_fast
