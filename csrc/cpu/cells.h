// How elements of tensors become the cells of matrix products (see matmul.h), and sums become elements again.
//
// Where the processor multiplies bfloat16, two neighbours along the sum share a cell: in a row when a matrix is packed by rows,
// in a column when it is packed by columns. Otherwise a cell is one element as a float, and both are the same.
#pragma once

#include "half.h"
#include "matmul.h"

namespace {

using seal_fast::Bfloat16;

template <class T>
struct CellOf {
    typedef float Type;
};

#if defined(__AVX512BF16__)
template <>
struct CellOf<Bfloat16> {
    typedef Pair Type;
};
#endif

// Elements in a cell.
template <class Cell>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<Pair> = 2;

template <class Cell>
inline int64_t cells(int64_t elements) {
    return ceil_div(elements, kDepth<Cell>);
}

// Rows are padded to a cache line, at every level in the same way.
inline int64_t padded(int64_t cells) { return ceil_div(cells, 16) * 16; }

// Chunks of constant length become vector instructions without a remainder; head sizes are mostly multiples of eight.
template <int kCount, class From, class To>
inline void convert(const From* __restrict from, float factor, To* __restrict to) {
#pragma GCC unroll 1
    for (int i = 0; i < kCount; ++i) from_float(to_float(from[i]) * factor, to[i]);
}

#if defined(__AVX512BF16__)
template <>
inline void convert<16>(const float* __restrict from, float factor, Bfloat16* __restrict to) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(load(from) * factor));
    __builtin_memcpy(to, &rounded, sizeof rounded);
}

template <>
inline void convert<8>(const float* __restrict from, float factor, Bfloat16* __restrict to) {
    const __m128bh rounded = _mm256_cvtneps_pbh((__m256)(load_half(from) * factor));
    __builtin_memcpy(to, &rounded, sizeof rounded);
}
#endif

template <class From, class To>
inline void convert(const From* from, float factor, int64_t count, To* to) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) convert<16>(from + i, factor, to + i);
    for (; i + 8 <= count; i += 8) convert<8>(from + i, factor, to + i);
    for (; i < count; ++i) convert<1>(from + i, factor, to + i);
}

template <class T>
inline void to_cells(const T* from, int64_t count, float* to) {
    convert(from, 1.0f, count, to);
}

inline void to_cells(const Bfloat16* from, int64_t count, Pair* to) {
    auto* elements = reinterpret_cast<Bfloat16*>(to);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) __builtin_memcpy(elements + i, from + i, 64);
    for (; i + 8 <= count; i += 8) __builtin_memcpy(elements + i, from + i, 16);
    for (; i < count; ++i) __builtin_memcpy(elements + i, from + i, 2);
}

template <class Cell>
inline void clear(Cell* cells, int64_t count) {
    for (int64_t i = 0; i < count; ++i) cells[i] = 0;
}

// Packed by rows, padded with zeros up to `stride` and to `height` rows.
template <class T, class Cell>
void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t height, int64_t dims, Matrix<Cell> to) {
    for (int64_t i = 0; i < rows; ++i) {
        Cell* row = to.data + i * to.stride;
        clear(row + to.stride - 16, 16);
        to_cells(from + i * from_stride, dims, row);
    }
    clear(to.data + rows * to.stride, (height - rows) * to.stride);
}

template <int kCount>
inline void join(const Bfloat16* __restrict low, const Bfloat16* __restrict high, Pair mask, Pair* __restrict to) {
#pragma GCC unroll 1
    for (int i = 0; i < kCount; ++i) to[i] = low[i].bits | (Pair(high[i].bits) << 16 & mask);
}

inline void join(const Bfloat16* low, const Bfloat16* high, Pair mask, int64_t count, Pair* to) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) join<16>(low + i, high + i, mask, to + i);
    for (; i + 8 <= count; i += 8) join<8>(low + i, high + i, mask, to + i);
    for (; i < count; ++i) join<1>(low + i, high + i, mask, to + i);
}

// Packed by columns, rows padded with zeros up to `stride`; the partner of an odd last row is zero.
inline void pack_columns(const Bfloat16* from, int64_t from_stride, int64_t rows, int64_t dims, Matrix<Pair> to) {
    for (int64_t i = 0; i < rows; i += 2) {
        Pair* row = to.data + i / 2 * to.stride;
        const bool partner = i + 1 < rows;
        const Bfloat16 *low = from + i * from_stride, *high = partner ? low + from_stride : low;
        clear(row + to.stride - 16, 16);
        join(low, high, partner ? ~Pair(0) : 0, dims, row);
    }
}

template <class T>
inline void pack_columns(const T* from, int64_t from_stride, int64_t rows, int64_t dims, Matrix<float> to) {
    pack_rows(from, from_stride, rows, rows, dims, to);
}

inline void negate(float& cell) { cell = -cell; }
inline void negate(Pair& cell) { cell ^= 0x80008000u; }

// A matrix of sums packed by rows or by columns, into `to` if it is not so already. Rows have `width` columns that may be read,
// of which `columns` count.
inline Matrix<float> packed_rows(Matrix<float> sums, int64_t, int64_t, int64_t, Matrix<float>) { return sums; }
inline Matrix<float> packed_columns(Matrix<float> sums, int64_t, int64_t, Matrix<float>) { return sums; }

#if defined(__AVX512BF16__)
inline Matrix<Pair> packed_rows(Matrix<float> sums, int64_t rows, int64_t columns, int64_t width, Matrix<Pair> to) {
    for (int64_t i = 0; i < rows; ++i) {
        Pair* row = to.data + i * to.stride;
        for (int64_t j = 0; j < width; j += kFloats) {
            const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(sums.data + i * sums.stride + j));
            __builtin_memcpy(row + j / 2, &rounded, sizeof rounded);
        }
        if (columns % 2) row[columns / 2] &= 0xFFFFu;
    }
    return to;
}

inline Matrix<Pair> packed_columns(Matrix<float> sums, int64_t rows, int64_t width, Matrix<Pair> to) {
    typedef uint16_t Words __attribute__((vector_size(64)));
    constexpr Words kInterleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int64_t i = 0; i < rows; i += 2) {
        const float* row = sums.data + i * sums.stride;
        for (int64_t j = 0; j < width; j += kFloats) {
            const Floats low = load(row + j), high = i + 1 < rows ? load(row + sums.stride + j) : Floats{};
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            store(to.data + i / 2 * to.stride + j, (Vec<Pair>)_mm512_permutexvar_epi16((__m512i)kInterleaved, rounded));
        }
    }
    return to;
}
#endif

// factor * sums as elements
template <class T>
void unpack(Matrix<float> from, double factor, int64_t rows, int64_t dims, T* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) convert(from.data + i * from.stride, float(factor), dims, to + i * to_stride);
}

}  // namespace
