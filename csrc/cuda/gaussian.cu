// The formulas are in csrc/cpu/gaussian.cpp; here is how they are laid out on the GPU.
//
// log_ratio: a warp owns kTileRows rows x kTileTriggers triggers and walks the dimensions, one per lane and step, so x and the
// coefficients are read coalesced and every load feeds 8 multiply-adds. The warps of a block share the triggers: the first one's
// read of the coefficients leaves them in L1 for the others. With few rows the warps split the dimensions instead.
// A lane adds at most kMaxSteps terms in float; everything after that is double.
#include "gaussian.h"

namespace seal_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kStatsThreads = 1024;
constexpr int kMaxSteps = 128;

template <class T>
struct Tile {
    static constexpr int kRows = sizeof(T) == 4 ? 8 : 4;
    static constexpr int kTriggers = sizeof(T) == 4 ? 8 : 4;
};

// How a block's warps are arranged. Chosen from the shape alone.
struct Layout {
    int row_warps;    // warps side by side over rows
    int dim_warps;    // warps splitting the dimensions of one slice; row_warps * dim_warps = kWarps
    int64_t slices;   // slices of the dimensions, one per grid layer
    int64_t slice;    // dimensions per slice
};

Layout layout_for(int64_t rows, int64_t dims) {
    Layout layout{};
    layout.row_warps = rows > 2 * kWarps * Tile<float>::kRows ? kWarps : 1;
    layout.dim_warps = kWarps / layout.row_warps;
    layout.slice = int64_t(kMaxSteps) * kWarp * layout.dim_warps;
    layout.slices = (dims + layout.slice - 1) / layout.slice;
    return layout;
}

__device__ double warp_sum(double value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

template <class T>
__global__ void __launch_bounds__(kWarp* kWarps)
    log_ratio_kernel(const T* __restrict__ x,              // [rows, dims]
                     const T* __restrict__ scale,          // [triggers, dims], 1 / g
                     const T* __restrict__ shift,          // [triggers, dims], -mu / g
                     const double* __restrict__ offset,    // [triggers], -sum log g
                     double* __restrict__ out,             // [slices, rows, triggers]
                     int64_t rows, int64_t triggers, int64_t dims, Layout layout) {
    constexpr int R = Tile<T>::kRows, C = Tile<T>::kTriggers;
    __shared__ double partial[kWarps][R * C];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int row_warp = warp / layout.dim_warps, dim_warp = warp % layout.dim_warps;
    const int64_t trigger_tiles = (triggers + C - 1) / C;
    const int64_t k0 = blockIdx.x % trigger_tiles * C, row_block = blockIdx.x / trigger_tiles * layout.row_warps;
    const int64_t n0 = (row_block + row_warp) * R;
    const int64_t begin = int64_t(blockIdx.y) * layout.slice;
    const int64_t end = min(begin + layout.slice, dims);

    // rows and triggers past the end repeat the last one and are not stored
    const T* px[R];
    for (int r = 0; r < R; ++r) px[r] = x + min(n0 + r, rows - 1) * dims;
    int64_t at[C];
    for (int c = 0; c < C; ++c) at[c] = min(k0 + c, triggers - 1) * dims;

    T z2[R][C] = {}, x2[R] = {};
    for (int64_t i = begin + dim_warp * kWarp + lane; i < end; i += kWarp * layout.dim_warps) {
        T xs[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            xs[r] = px[r][i];
            x2[r] += xs[r] * xs[r];
        }
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const T s = scale[at[c] + i], b = shift[at[c] + i];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const T z = xs[r] * s + b;
                z2[r][c] += z * z;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const double sum = warp_sum((double(x2[r]) - double(z2[r][c])) / 2);
            if (lane == 0) partial[warp][r * C + c] = sum;
        }
    __syncthreads();

    for (int slot = threadIdx.x; slot < layout.row_warps * R * C; slot += blockDim.x) {
        const int w = slot / (R * C), r = slot % (R * C) / C, c = slot % C;
        const int64_t n = (row_block + w) * R + r, k = k0 + c;
        if (n >= rows || k >= triggers) continue;
        double sum = blockIdx.y == 0 ? offset[k] : 0.0;
        for (int d = 0; d < layout.dim_warps; ++d) sum += partial[w * layout.dim_warps + d][r * C + c];
        out[(int64_t(blockIdx.y) * rows + n) * triggers + k] = sum;
    }
}

// Adds `value` over the block into every thread of the first warp.
__device__ double block_sum(double value, double* scratch) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % kWarp < blockDim.x / kWarp ? scratch[threadIdx.x % kWarp] : 0.0);
}

__device__ double divergence(double mu, double gamma, double gamma_floor) {
    const double g = gamma < gamma_floor ? gamma_floor : gamma;
    return (g * g + mu * mu - 1.0) * 0.5 - log(g);
}

// One block per trigger; deviations are taken from the first dimension's kl, as on the CPU.
template <class T>
__global__ void __launch_bounds__(kStatsThreads)
    kl_stats_kernel(const T* __restrict__ mu,       // [triggers, dims]
                    const T* __restrict__ gamma,    // [triggers, dims]
                    double gamma_floor,
                    double* __restrict__ stats,     // [triggers, 3]
                    int64_t dims) {
    __shared__ double scratch[kWarp];
    mu += int64_t(blockIdx.x) * dims;
    gamma += int64_t(blockIdx.x) * dims;
    const double origin = divergence(mu[0], gamma[0], gamma_floor);
    double sum = 0, sum2 = 0, norm2 = 0;
    for (int64_t i = threadIdx.x; i < dims; i += blockDim.x) {
        const double m = mu[i], away = divergence(m, gamma[i], gamma_floor) - origin;
        sum += away;
        sum2 += away * away;
        norm2 += m * m;
    }
    sum = block_sum(sum, scratch);
    sum2 = block_sum(sum2, scratch);
    norm2 = block_sum(norm2, scratch);
    if (threadIdx.x != 0) return;
    const double mean = sum / double(dims), variance = sum2 / double(dims) - mean * mean;
    double* row = stats + 3 * int64_t(blockIdx.x);
    row[0] = origin + mean;
    row[1] = variance < 0 ? 0 : variance;
    row[2] = norm2;
}

}  // namespace

int64_t gaussian_log_ratio_slices(int64_t rows, int64_t, int64_t dims) { return layout_for(rows, dims).slices; }

template <class T>
cudaError_t gaussian_kl_stats(const T* mu, const T* gamma, double gamma_floor, double* stats, int64_t triggers, int64_t dims,
                              cudaStream_t stream) {
    if (triggers > INT32_MAX) return cudaErrorInvalidConfiguration;
    kl_stats_kernel<T><<<static_cast<unsigned>(triggers), kStatsThreads, 0, stream>>>(mu, gamma, gamma_floor, stats, dims);
    return cudaGetLastError();
}

template <class T>
cudaError_t gaussian_log_ratio(const T* x, const T* scale, const T* shift, const double* offset, double* out, int64_t rows,
                               int64_t triggers, int64_t dims, cudaStream_t stream) {
    const Layout layout = layout_for(rows, dims);
    const int64_t block_rows = int64_t(layout.row_warps) * Tile<T>::kRows;
    const int64_t trigger_tiles = (triggers + Tile<T>::kTriggers - 1) / Tile<T>::kTriggers;
    const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
    // what a grid holds; the tiles of one block of rows are neighbours, so that it is read from memory once
    if (trigger_tiles * row_blocks > INT32_MAX || layout.slices > 65535) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(trigger_tiles * row_blocks), static_cast<unsigned>(layout.slices));
    log_ratio_kernel<T><<<grid, kWarp * kWarps, 0, stream>>>(x, scale, shift, offset, out, rows, triggers, dims, layout);
    return cudaGetLastError();
}

#define SEAL_INSTANTIATE(T)                                                                                           \
    template cudaError_t gaussian_kl_stats<T>(const T*, const T*, double, double*, int64_t, int64_t, cudaStream_t);   \
    template cudaError_t gaussian_log_ratio<T>(const T*, const T*, const T*, const double*, double*, int64_t, int64_t, \
                                               int64_t, cudaStream_t);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(double)

}  // namespace seal_fast
