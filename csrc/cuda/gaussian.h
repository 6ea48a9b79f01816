// Gaussian statistics on the GPU, for arrays on the stream's device. Each launcher returns cudaGetLastError() after its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace seal_fast {

// How many slices gaussian_log_ratio cuts the dimensions into; a function of the shape only, so that results do not depend on
// the GPU. `out` holds one [inputs, triggers] sum per slice.
int64_t gaussian_log_ratio_slices(int64_t inputs, int64_t dims);

template <class T>
cudaError_t gaussian_kl_stats(const GaussianKlStats<T>& call, cudaStream_t stream);

template <class T>
cudaError_t gaussian_log_ratio(const GaussianLogRatio<T>& call, cudaStream_t stream);

}  // namespace seal_fast
