// Normal numbers for a stretch of one row, several counters side by side so that the compiler vectorises over them.
#pragma once

#include "../noise.h"
#include "chunks.h"

namespace {

constexpr int kBlocks = 32;

// Dimensions start ... start + length of a row, start a multiple of 4 and length at most kChunk; out has room for kChunk.
inline void normals(uint64_t seed, uint32_t draw, uint32_t row, int64_t start, int64_t length, float* out) {
    static_assert(kChunk % (4 * kBlocks) == 0, "a chunk is whole groups of counters");
    for (int64_t group = 0; group < length; group += 4 * kBlocks) {
        uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
        for (int i = 0; i < kBlocks; ++i) {
            c0[i] = uint32_t((start + group) / 4 + i);
            c1[i] = row;
            c2[i] = draw;
            c3[i] = 0;
        }
        Key key = first_key(seed);
        for (int round = 0; round < kPhiloxRounds; ++round, key = next_key(key))
            for (int i = 0; i < kBlocks; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], key);
        float n0[kBlocks], n1[kBlocks], n2[kBlocks], n3[kBlocks];
        for (int i = 0; i < kBlocks; ++i) {
            const Pair pair = box_muller(c0[i], c1[i]);
            n0[i] = pair.cosine;
            n1[i] = pair.sine;
        }
        for (int i = 0; i < kBlocks; ++i) {
            const Pair pair = box_muller(c2[i], c3[i]);
            n2[i] = pair.cosine;
            n3[i] = pair.sine;
        }
        float* to = out + group;
        for (int i = 0; i < kBlocks; ++i) {
            to[4 * i] = n0[i];
            to[4 * i + 1] = n1[i];
            to[4 * i + 2] = n2[i];
            to[4 * i + 3] = n3[i];
        }
    }
}

}  // namespace
