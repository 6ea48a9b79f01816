// Small matrix products whose operands lie in cache, and the transposition that prepares them.
//
// Operands are made of cells. A cell is what one step of a sum takes in: a float, or a pair of bfloat16 that are neighbours
// along the sum. Sums are float.
//
// The result is cut into blocks that stay in the vector registers while one loop runs over the sum: per step one load for each
// vector of b, one broadcast for each row of a, and kRows x kColumns multiply-adds. Rows are shared out evenly among the blocks,
// so that no block is so small that it waits for its own additions.
#pragma once

#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two bfloat16, the first in the low half.
typedef uint32_t Pair;

// Widest block, and rows of a block of that many vectors: as large as 32 or 16 registers allow with b and one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxColumns = 5;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 8, 8, 8, 6, 5};
#else
constexpr int kMaxColumns = 3;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 6, 6, 4};
#endif

// AVX-512 has narrower vectors too, so the last vector of a row may be a half one: 40 columns are 2.5 vectors, not 3.
constexpr bool kHasHalves = kFloats == 16;
constexpr int kHalf = kHasHalves ? kFloats / 2 : kFloats;

template <class T>
struct HalfSimd;

template <>
struct HalfSimd<float> {
    typedef float Vec __attribute__((vector_size(4 * kHalf)));
    typedef float Unaligned __attribute__((vector_size(4 * kHalf), aligned(4), may_alias));
};

template <>
struct HalfSimd<Pair> {
    typedef Pair Vec __attribute__((vector_size(4 * kHalf)));
    typedef Pair Unaligned __attribute__((vector_size(4 * kHalf), aligned(4), may_alias));
};

template <class T>
using Halves = typename HalfSimd<T>::Vec;

template <class T>
inline Halves<T> load_half(const T* p) {
    return *reinterpret_cast<const typename HalfSimd<T>::Unaligned*>(p);
}

inline void store_half(float* p, Halves<float> v) { *reinterpret_cast<HalfSimd<float>::Unaligned*>(p) = v; }

template <class Sums, class Right>
inline void add_product(Sums& sums, float left, Right right) {
    sums += left * right;
}

#if defined(__AVX512BF16__)
inline void add_product(Floats& sums, Pair left, Vec<Pair> right) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
}

inline void add_product(Halves<float>& sums, Pair left, Halves<Pair> right) {
    sums = (Halves<float>)_mm256_dpbf16_ps((__m256)sums, (__m256bh)_mm256_set1_epi32(int(left)), (__m256bh)right);
}
#endif

template <class T>
struct Matrix {
    T* data;
    int64_t stride;
};

// c = a b, or c += a b if add; with kHalved, the last of the columns of vectors is a half one.
// Element (row, step) of a is a[step * stride + row] if kAdjacentRows, else a[row * stride + step].
template <int kRows, int kColumns, bool kHalved, bool kAdjacentRows, class Cell>
__attribute__((noinline)) void multiply_block(Matrix<Cell> a, Matrix<Cell> b, Matrix<float> c, int64_t steps, bool add) {
    constexpr int kFull = kColumns - kHalved;
    Floats sums[kRows][kColumns] = {};
    Halves<float> halves[kRows] = {};
    for (int64_t step = 0; step < steps; ++step) {
        const Cell* row = b.data + step * b.stride;
        Vec<Cell> right[kColumns];
        Halves<Cell> last = {};
#pragma GCC unroll 8
        for (int j = 0; j < kFull; ++j) right[j] = load(row + j * kFloats);
        if constexpr (kHalved) last = load_half(row + kFull * kFloats);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Cell left = kAdjacentRows ? a.data[step * a.stride + i] : a.data[i * a.stride + step];
#pragma GCC unroll 8
            for (int j = 0; j < kFull; ++j) add_product(sums[i][j], left, right[j]);
            if constexpr (kHalved) add_product(halves[i], left, last);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        float* row = c.data + i * c.stride;
#pragma GCC unroll 8
        for (int j = 0; j < kFull; ++j) {
            float* at = row + j * kFloats;
            store(at, add ? load(at) + sums[i][j] : sums[i][j]);
        }
        if constexpr (kHalved) {
            float* at = row + kFull * kFloats;
            store_half(at, add ? load_half(at) + halves[i] : halves[i]);
        }
    }
}

template <int kRows, int kColumns, bool kHalved, bool kAdjacentRows, class Cell>
inline void multiply_rows(int64_t rows, Matrix<Cell> a, Matrix<Cell> b, Matrix<float> c, int64_t steps, bool add) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return multiply_rows<kRows - 1, kColumns, kHalved, kAdjacentRows>(rows, a, b, c, steps, add);
    }
    multiply_block<kRows, kColumns, kHalved, kAdjacentRows>(a, b, c, steps, add);
}

template <int kColumns, bool kHalved, bool kAdjacentRows, class Cell>
inline void multiply_columns(int64_t columns, int64_t rows, Matrix<Cell> a, Matrix<Cell> b, Matrix<float> c, int64_t steps,
                             bool add) {
    if constexpr (kColumns > 1) {
        if (columns < kColumns)
            return multiply_columns<kColumns - 1, kHalved, kAdjacentRows>(columns, rows, a, b, c, steps, add);
    }
    const int64_t blocks = ceil_div(rows, kMaxRows[kColumns]);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
        multiply_rows<kMaxRows[kColumns], kColumns, kHalved, kAdjacentRows>(
            last - first, {a.data + first * (kAdjacentRows ? 1 : a.stride), a.stride}, b,
            {c.data + first * c.stride, c.stride}, steps, add);
    }
}

// c [rows, columns] = a b or c += a b. Columns are rounded up to (half) vectors, which b and c must have room for.
// See `multiply_block` for a.
template <bool kAdjacentRows, class Cell>
inline void multiply(Matrix<Cell> a, Matrix<Cell> b, Matrix<float> c, int64_t rows, int64_t columns, int64_t steps,
                     bool add = false) {
    const int64_t vectors = ceil_div(columns, kFloats);
    const int64_t panels = ceil_div(vectors, kMaxColumns);
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * vectors / panels, last = (panel + 1) * vectors / panels;
        const Matrix<Cell> right{b.data + first * kFloats, b.stride};
        const Matrix<float> result{c.data + first * kFloats, c.stride};
        if (kHasHalves && last * kFloats - columns >= kHalf)
            multiply_columns<kMaxColumns, kHasHalves, kAdjacentRows>(last - first, rows, a, right, result, steps, add);
        else
            multiply_columns<kMaxColumns, false, kAdjacentRows>(last - first, rows, a, right, result, steps, add);
    }
}

template <int... kIndices>
struct Indices {};

template <int kCount, int... kIndices>
struct FirstIndices : FirstIndices<kCount - 1, kCount - 1, kIndices...> {};

template <int... kIndices>
struct FirstIndices<0, kIndices...> {
    typedef Indices<kIndices...> Type;
};

// Exchanges one bit of the row index with the same bit of the lane index, for two rows that differ in that bit alone.
template <int kBit, class Lanes, int... kLane>
inline void exchange_bit(Lanes& lower, Lanes& upper, Indices<kLane...>) {
    const Lanes low = __builtin_shufflevector(lower, upper, (kLane & kBit ? kFloats + kLane - kBit : kLane)...);
    upper = __builtin_shufflevector(lower, upper, (kLane & kBit ? kFloats + kLane : kLane + kBit)...);
    lower = low;
}

template <int kBit, class Lanes>
inline void exchange_bits(Lanes* rows) {
    if constexpr (kBit < kFloats) {
#pragma GCC unroll 16
        for (int i = 0; i < kFloats; ++i)
            if (!(i & kBit)) exchange_bit<kBit>(rows[i], rows[i | kBit], typename FirstIndices<kFloats>::Type{});
        exchange_bits<2 * kBit>(rows);
    }
}

// to[j, i] = from[i, j] for rows and columns rounded up to whole vectors, which both must have.
template <class Cell>
inline void transpose(Matrix<Cell> from, Matrix<Cell> to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kFloats) {
        for (int64_t j = 0; j < columns; j += kFloats) {
            Vec<Cell> block[kFloats];
#pragma GCC unroll 16
            for (int r = 0; r < kFloats; ++r) block[r] = load(from.data + (i + r) * from.stride + j);
            exchange_bits<1>(block);
#pragma GCC unroll 16
            for (int r = 0; r < kFloats; ++r) store(to.data + (j + r) * to.stride + i, block[r]);
        }
    }
}

}  // namespace
