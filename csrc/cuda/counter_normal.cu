// One thread per counter, which gives four neighbouring numbers.
#include "counter_normal.h"

#include "normals.cuh"
#include "rows.h"

namespace seal_fast {
namespace {

__global__ void __launch_bounds__(kTileThreads)
    counter_normal_kernel(float* __restrict__ out, uint64_t seed, uint32_t draw, int64_t dims, int64_t blocks_per_row) {
    const Place p = place(blocks_per_row);
    if (p.dim >= blocks_per_row) return;
    const Normals four = normals(seed, draw, p.row, p.dim);
    for (int i = 0; i < 4; ++i)
        if (4 * p.dim + i < dims) out[p.row * dims + 4 * p.dim + i] = four.n[i];
}

}  // namespace

cudaError_t counter_normal(float* out, uint64_t seed, uint32_t draw, int64_t rows, int64_t dims, cudaStream_t stream) {
    const int64_t blocks_per_row = (dims + 3) / 4;
    const unsigned blocks = tiles(rows, blocks_per_row);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    counter_normal_kernel<<<blocks, kTileThreads, 0, stream>>>(out, seed, draw, dims, blocks_per_row);
    return cudaGetLastError();
}

}  // namespace seal_fast
