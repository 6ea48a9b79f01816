// How elementwise kernels lie on the grid: every row is cut into tiles of one block, row after row.
#pragma once

#include <cstdint>

namespace seal_fast {

constexpr int kTileThreads = 256;

inline int64_t tiles_per_row(int64_t dims) { return (dims + kTileThreads - 1) / kTileThreads; }

// Blocks of a launch, or 0 if they are more than a grid holds.
inline unsigned tiles(int64_t rows, int64_t dims) {
    const int64_t count = rows * tiles_per_row(dims);
    return count <= INT32_MAX ? static_cast<unsigned>(count) : 0;
}

struct Place {
    int64_t row, dim;
};

#ifdef __CUDACC__
// Where this thread works; dim may lie past the end of the row.
__device__ inline Place place(int64_t dims) {
    const int64_t per_row = (dims + kTileThreads - 1) / kTileThreads;
    return {blockIdx.x / per_row, blockIdx.x % per_row * kTileThreads + threadIdx.x};
}
#endif

}  // namespace seal_fast
