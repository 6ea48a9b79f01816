// The formula is in csrc/cpu/perturbed_pair.cpp. One thread per counter: four neighbouring numbers of both noises.
#include "perturbed_pair.h"

#include "normals.cuh"
#include "rows.h"

namespace seal_fast {
namespace {

__global__ void __launch_bounds__(kTileThreads) perturbed_pair_kernel(PerturbedPair call, int64_t blocks_per_row) {
    const Place p = place(blocks_per_row);
    if (p.dim >= blocks_per_row) return;
    const double* c = call.coefficients + 3 * (p.row / (call.rows / call.ladders));
    const float from_x0 = float(c[0]), from_noise = float(c[1]), from_mu = float(c[2]);
    const int64_t row = p.row * call.dims, trigger = p.row / (call.rows / call.triggers) * call.dims;
    const Normals eps1 = normals(call.seed, 0, p.row, p.dim), eps2 = normals(call.seed, 1, p.row, p.dim);
    for (int i = 0; i < 4; ++i) {
        const int64_t dim = 4 * p.dim + i;
        if (dim >= call.dims) return;
        const float shifted = from_x0 * call.x0[row + dim] + from_mu * call.mu[trigger + dim];
        const float scale = from_noise * call.gamma[trigger + dim];
        call.inputs[row + dim] = shifted + scale * eps1.n[i];
        call.inputs[row + dim + call.rows * call.dims] = shifted + scale * eps2.n[i];
        call.difference[row + dim] = eps1.n[i] - eps2.n[i];
    }
}

}  // namespace

cudaError_t perturbed_pair(const PerturbedPair& call, cudaStream_t stream) {
    const int64_t blocks_per_row = (call.dims + 3) / 4;
    const unsigned blocks = tiles(call.rows, blocks_per_row);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    perturbed_pair_kernel<<<blocks, kTileThreads, 0, stream>>>(call, blocks_per_row);
    return cudaGetLastError();
}

}  // namespace seal_fast
