// The four normal numbers of one counter, on the GPU.
#pragma once

#include "../noise.h"

namespace seal_fast {

struct Normals {
    float n[4];
};

__device__ inline Normals normals(uint64_t seed, uint32_t draw, int64_t row, int64_t block) {
    const Words words = philox(uint32_t(block), uint32_t(row), draw, 0, seed);
    const Pair first = box_muller(words.w[0], words.w[1]), second = box_muller(words.w[2], words.w[3]);
    return {{first.cosine, first.sine, second.cosine, second.sine}};
}

}  // namespace seal_fast
