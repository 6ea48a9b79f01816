// counter_normal: out[row, dim] as csrc/noise.h defines it.
#include "counter_normal.h"

#include "normals.h"

namespace seal_fast {
namespace SEAL_ISA {

void counter_normal(float* out, uint64_t seed, uint32_t draw, int64_t rows, int64_t dims, int threads) {
    for_each_chunk(rows, dims, threads, [=](int64_t row, int64_t start, int64_t length) {
        float numbers[kChunk];
        normals(seed, draw, uint32_t(row), start, length, numbers);
        __builtin_memcpy(out + row * dims + start, numbers, sizeof(float) * uint64_t(length));
    });
}

}  // namespace SEAL_ISA
}  // namespace seal_fast
