// Gaussian statistics on the GPU: launchers. Arrays are dense and row-major on the stream's device; T is float or double.
// Each returns cudaGetLastError() after its launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace seal_fast {

// How many slices gaussian_log_ratio cuts the dimensions into; a function of the shape only, so that results do not depend on
// the GPU. `out` holds one [rows, triggers] sum per slice.
int64_t gaussian_log_ratio_slices(int64_t rows, int64_t triggers, int64_t dims);

// stats [triggers, 3], as on the CPU.
template <class T>
cudaError_t gaussian_kl_stats(const T* mu, const T* gamma, double gamma_floor, double* stats, int64_t triggers, int64_t dims,
                              cudaStream_t stream);

// out [slices, rows, triggers]; the log ratio is its sum over slices.
template <class T>
cudaError_t gaussian_log_ratio(const T* x, const T* scale, const T* shift, const double* offset, double* out, int64_t rows,
                               int64_t triggers, int64_t dims, cudaStream_t stream);

}  // namespace seal_fast
