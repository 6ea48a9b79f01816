// The formulas are in csrc/cpu/gaussian.cpp; here is how they are laid out on the GPU.
//
// log_ratio: a warp owns kInputs inputs x kTriggers triggers and loops over the dimensions, one per lane and step, so x and the
// coefficients are read coalesced and every load feeds 8 multiply-adds. The warps of a block share the triggers: the first one's
// read of the coefficients leaves them in L1 for the others. With few inputs the warps split the dimensions instead.
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
    static constexpr int kInputs = sizeof(T) == 4 ? 8 : 4;
    static constexpr int kTriggers = sizeof(T) == 4 ? 8 : 4;
};

// How a block's warps are arranged. Chosen from the shape alone.
struct Layout {
    int input_warps;    // warps side by side over inputs
    int dim_warps;    // warps splitting the dimensions of one slice; input_warps * dim_warps = kWarps
    int64_t slices;   // slices of the dimensions, one per grid layer
    int64_t slice;    // dimensions per slice
};

Layout layout_for(int64_t inputs, int64_t dims) {
    Layout layout{};
    layout.input_warps = inputs > 2 * kWarps * Tile<float>::kInputs ? kWarps : 1;
    layout.dim_warps = kWarps / layout.input_warps;
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
    log_ratio_kernel(const T* __restrict__ x,              // [inputs, dims]
                     const T* __restrict__ scale,          // [triggers, dims], 1 / g
                     const T* __restrict__ shift,          // [triggers, dims], -mu / g
                     const double* __restrict__ offset,    // [triggers], -sum log g
                     double* __restrict__ out,             // [slices, inputs, triggers]
                     int64_t inputs, int64_t triggers, int64_t dims, Layout layout) {
    constexpr int R = Tile<T>::kInputs, C = Tile<T>::kTriggers;
    __shared__ double partial[kWarps][R * C];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int input_warp = warp / layout.dim_warps, dim_warp = warp % layout.dim_warps;
    const int64_t trigger_tiles = (triggers + C - 1) / C;
    const int64_t k0 = blockIdx.x % trigger_tiles * C, input_block = blockIdx.x / trigger_tiles * layout.input_warps;
    const int64_t n0 = (input_block + input_warp) * R;
    const int64_t begin = int64_t(blockIdx.y) * layout.slice;
    const int64_t end = min(begin + layout.slice, dims);

    // inputs and triggers past the end repeat the last one and are not stored
    const T* px[R];
    for (int r = 0; r < R; ++r) px[r] = x + min(n0 + r, inputs - 1) * dims;
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

    for (int slot = threadIdx.x; slot < layout.input_warps * R * C; slot += blockDim.x) {
        const int w = slot / (R * C), r = slot % (R * C) / C, c = slot % C;
        const int64_t n = (input_block + w) * R + r, k = k0 + c;
        if (n >= inputs || k >= triggers) continue;
        double sum = blockIdx.y == 0 ? offset[k] : 0.0;
        for (int d = 0; d < layout.dim_warps; ++d) sum += partial[w * layout.dim_warps + d][r * C + c];
        out[(int64_t(blockIdx.y) * inputs + n) * triggers + k] = sum;
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
    stats += 3 * int64_t(blockIdx.x);
    stats[0] = origin + mean;
    stats[1] = variance < 0 ? 0 : variance;
    stats[2] = norm2;
}

}  // namespace

int64_t gaussian_log_ratio_slices(int64_t inputs, int64_t dims) { return layout_for(inputs, dims).slices; }

template <class T>
cudaError_t gaussian_kl_stats(const GaussianKlStats<T>& call, cudaStream_t stream) {
    if (call.triggers > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto blocks = static_cast<unsigned>(call.triggers);
    kl_stats_kernel<T><<<blocks, kStatsThreads, 0, stream>>>(call.mu, call.gamma, call.gamma_floor, call.stats, call.dims);
    return cudaGetLastError();
}

template <class T>
cudaError_t gaussian_log_ratio(const GaussianLogRatio<T>& call, cudaStream_t stream) {
    const Layout layout = layout_for(call.inputs, call.dims);
    const int64_t block_inputs = int64_t(layout.input_warps) * Tile<T>::kInputs;
    const int64_t trigger_tiles = (call.triggers + Tile<T>::kTriggers - 1) / Tile<T>::kTriggers;
    const int64_t input_blocks = (call.inputs + block_inputs - 1) / block_inputs;
    // what a grid holds; the tiles of one block of inputs are neighbours, so that it is read from memory once
    if (trigger_tiles * input_blocks > INT32_MAX || layout.slices > 65535) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(trigger_tiles * input_blocks), static_cast<unsigned>(layout.slices));
    log_ratio_kernel<T><<<grid, kWarp * kWarps, 0, stream>>>(call.x, call.scale, call.shift, call.offset, call.out, call.inputs,
                                                            call.triggers, call.dims, layout);
    return cudaGetLastError();
}

#define SEAL_INSTANTIATE(T)                                                                \
    template cudaError_t gaussian_kl_stats<T>(const GaussianKlStats<T>&, cudaStream_t);    \
    template cudaError_t gaussian_log_ratio<T>(const GaussianLogRatio<T>&, cudaStream_t);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(double)

}  // namespace seal_fast
