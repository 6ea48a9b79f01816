// Elementwise kernels work through items in chunks that stay in the first-level cache. An absent array is a chunk of one
// constant, so the inner loop has no branches.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t kChunk = 512;

// Below this many elements waking the other threads costs more than they save.
constexpr int64_t kWorthThreads = 32768;

struct Constant {
    float values[kChunk];
    constexpr explicit Constant(float value) : values() {
        for (int64_t i = 0; i < kChunk; ++i) values[i] = value;
    }
};

constexpr Constant kZeros(0.0f), kOnes(1.0f);

// Calls work(item, start, length) for every chunk of every item.
template <class Work>
void for_each_chunk(int64_t items, int64_t dims, int threads, Work work) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (items * dims > kWorthThreads)
    for (int64_t item = 0; item < items; ++item)
        for (int64_t start = 0; start < dims; start += kChunk) work(item, start, dims - start < kChunk ? dims - start : kChunk);
}

// Element `at` of an array, or the constant that stands for an absent one.
inline const float* at_or(const float* array, int64_t at, const Constant& absent) {
    return array == nullptr ? absent.values : array + at;
}

}  // namespace
