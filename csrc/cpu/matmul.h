// Small float matrix products whose operands lie in cache, and the transposition that prepares them.
//
// The result is cut into blocks that stay in the vector registers while the depth is walked once: per step one load for each
// vector of b, one broadcast for each row of a, and kRows x kColumns multiply-adds. Rows are shared out evenly among the blocks,
// so that no block is so small that it waits for its own additions.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

typedef Vec<float> Floats;
constexpr int kFloats = kLanes<float>;

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
typedef float Halves __attribute__((vector_size(4 * kHalf)));
typedef float UnalignedHalves __attribute__((vector_size(4 * kHalf), aligned(4), may_alias));

inline void store(float* p, Floats v) { *reinterpret_cast<Simd<float>::Unaligned*>(p) = v; }

struct Matrix {
    float* data;
    int64_t stride;
};

// c = a b, or c += a b if add; with kHalved, the last of the columns of vectors is a half one.
// Element (row, step) of a is a[step * stride + row] if kAdjacentRows, else a[row * stride + step].
template <int kRows, int kColumns, bool kHalved, bool kAdjacentRows>
__attribute__((noinline)) void multiply_block(Matrix a, Matrix b, Matrix c, int64_t depth, bool add) {
    constexpr int kFull = kColumns - kHalved;
    Floats sums[kRows][kColumns] = {};
    Halves halves[kRows] = {};
    for (int64_t step = 0; step < depth; ++step) {
        const float* row = b.data + step * b.stride;
        Floats right[kColumns];
        Halves last = {};
#pragma GCC unroll 8
        for (int j = 0; j < kFull; ++j) right[j] = load(row + j * kFloats);
        if constexpr (kHalved) last = *reinterpret_cast<const UnalignedHalves*>(row + kFull * kFloats);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const float left = kAdjacentRows ? a.data[step * a.stride + i] : a.data[i * a.stride + step];
#pragma GCC unroll 8
            for (int j = 0; j < kFull; ++j) sums[i][j] += left * right[j];
            if constexpr (kHalved) halves[i] += left * last;
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
            auto* at = reinterpret_cast<UnalignedHalves*>(row + kFull * kFloats);
            *at = add ? *at + halves[i] : halves[i];
        }
    }
}

template <int kRows, int kColumns, bool kHalved, bool kAdjacentRows>
inline void multiply_rows(int64_t rows, Matrix a, Matrix b, Matrix c, int64_t depth, bool add) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return multiply_rows<kRows - 1, kColumns, kHalved, kAdjacentRows>(rows, a, b, c, depth, add);
    }
    multiply_block<kRows, kColumns, kHalved, kAdjacentRows>(a, b, c, depth, add);
}

template <int kColumns, bool kHalved, bool kAdjacentRows>
inline void multiply_columns(int64_t columns, int64_t rows, Matrix a, Matrix b, Matrix c, int64_t depth, bool add) {
    if constexpr (kColumns > 1) {
        if (columns < kColumns)
            return multiply_columns<kColumns - 1, kHalved, kAdjacentRows>(columns, rows, a, b, c, depth, add);
    }
    const int64_t blocks = (rows + kMaxRows[kColumns] - 1) / kMaxRows[kColumns];
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
        multiply_rows<kMaxRows[kColumns], kColumns, kHalved, kAdjacentRows>(
            last - first, {a.data + first * (kAdjacentRows ? 1 : a.stride), a.stride}, b,
            {c.data + first * c.stride, c.stride}, depth, add);
    }
}

// c [rows, columns] = a b or c += a b. Columns are rounded up to (half) vectors, which b and c must have room for.
// See `multiply_block` for a.
template <bool kAdjacentRows>
inline void multiply(Matrix a, Matrix b, Matrix c, int64_t rows, int64_t columns, int64_t depth, bool add = false) {
    const int64_t vectors = (columns + kFloats - 1) / kFloats;
    const int64_t panels = (vectors + kMaxColumns - 1) / kMaxColumns;
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * vectors / panels, last = (panel + 1) * vectors / panels;
        const Matrix right{b.data + first * kFloats, b.stride}, result{c.data + first * kFloats, c.stride};
        if (kHasHalves && last * kFloats - columns >= kHalf)
            multiply_columns<kMaxColumns, kHasHalves, kAdjacentRows>(last - first, rows, a, right, result, depth, add);
        else
            multiply_columns<kMaxColumns, false, kAdjacentRows>(last - first, rows, a, right, result, depth, add);
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
template <int kBit, int... kLane>
inline void exchange_bit(Floats& lower, Floats& upper, Indices<kLane...>) {
    const Floats low = __builtin_shufflevector(lower, upper, (kLane & kBit ? kFloats + kLane - kBit : kLane)...);
    upper = __builtin_shufflevector(lower, upper, (kLane & kBit ? kFloats + kLane : kLane + kBit)...);
    lower = low;
}

template <int kBit>
inline void exchange_bits(Floats* rows) {
    if constexpr (kBit < kFloats) {
#pragma GCC unroll 16
        for (int i = 0; i < kFloats; ++i)
            if (!(i & kBit)) exchange_bit<kBit>(rows[i], rows[i | kBit], typename FirstIndices<kFloats>::Type{});
        exchange_bits<2 * kBit>(rows);
    }
}

// to[j, i] = from[i, j] for rows and columns rounded up to whole vectors, which both must have.
inline void transpose(Matrix from, Matrix to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kFloats) {
        for (int64_t j = 0; j < columns; j += kFloats) {
            Floats block[kFloats];
#pragma GCC unroll 16
            for (int r = 0; r < kFloats; ++r) block[r] = load(from.data + (i + r) * from.stride + j);
            exchange_bits<1>(block);
#pragma GCC unroll 16
            for (int r = 0; r < kFloats; ++r) store(to.data + (j + r) * to.stride + i, block[r]);
        }
    }
}

}  // namespace
