// Layout of the workspace of cross_attention: keys and values of all heads as products take them (Packed), in the backward pass
// the sums of their gradients (Sums), then the memory of each thread (Scratch).
#pragma once

#include "cells.h"
#include "cross_attention.h"

namespace {

using seal_fast::AttentionShape;

// Queries of a tile.
constexpr int64_t kTile = 64;

// Matrices of all heads, [batches * heads, height, padded width] floats or cells.
template <class Cell>
struct PerHead {
    Cell* data;
    int64_t size, stride;

    Matrix<Cell> operator[](int64_t head) const { return {data + head * size, stride}; }
};

// Keys and values of all heads as a pass multiplies them. Keys are negated if the scale is negative: the largest logit is then
// the largest product.
template <class Cell>
struct Packed {
    PerHead<Cell> key_rows, key_columns, values;

    Packed(float* workspace, const AttentionShape& s, bool backward) {
        auto take = [&](int64_t height, int64_t width) {
            const PerHead<Cell> matrices{reinterpret_cast<Cell*>(workspace), height * padded(width), padded(width)};
            workspace += s.batches * s.heads * matrices.size;
            return matrices;
        };
        const int64_t dim_cells = cells<Cell>(s.dims), key_cells = cells<Cell>(s.keys);
        key_rows = take(s.keys, dim_cells);
        values = backward ? take(s.keys, dim_cells) : take(key_cells, s.dims);
        key_columns = backward && kDepth<Cell> > 1 ? take(key_cells, s.dims) : key_rows;
    }
    static int64_t floats(const AttentionShape& s, bool backward) {
        const int64_t rows = s.keys * padded(cells<Cell>(s.dims)), columns = cells<Cell>(s.keys) * padded(s.dims);
        const int64_t again = backward && kDepth<Cell> > 1 ? columns : 0;
        return s.batches * s.heads * (rows + (backward ? rows : columns) + again);
    }
};

// Sums of the gradients of keys and values of all heads in one slice of the queries.
struct Sums {
    PerHead<float> keys, values;

    Sums(float* workspace, const AttentionShape& s) {
        const int64_t stride = padded(s.dims), size = s.keys * stride;
        keys = {workspace, size, stride};
        values = {workspace + s.batches * s.heads * size, size, stride};
    }
    static int64_t floats(const AttentionShape& s) { return 2 * s.batches * s.heads * s.keys * padded(s.dims); }
};

// The memory of one thread. `transposed` holds queries or gradients as columns, the tiles keys x queries, `packed` a tile as a
// product takes it. Columns of queries and gradients lie where their rows lay before they were transposed.
template <class Cell>
struct Scratch {
    Matrix<Cell> query_rows, query_columns, grad_rows, grad_columns, transposed, packed;
    Matrix<float> product, tile, tile_grad, maps;
    float* inverse;

    Scratch(float* workspace, const AttentionShape& s) {
        auto take = [&](int64_t height, int64_t width) {
            const Matrix<float> matrix{workspace, width};
            workspace += height * width;
            return matrix;
        };
        auto take_cells = [&](int64_t height, int64_t width) {
            return Matrix<Cell>{reinterpret_cast<Cell*>(take(height, width).data), width};
        };
        const int64_t row_stride = padded(cells<Cell>(s.dims)), stride = padded(s.dims);
        query_columns = take_cells(kTile, stride);
        grad_columns = take_cells(kTile, stride);
        query_rows = {query_columns.data, row_stride};
        grad_rows = {grad_columns.data, row_stride};
        transposed = take_cells(stride, kTile);
        packed = take_cells(s.keys, kTile);
        product = take(kTile, stride);
        tile = take(s.keys, kTile);
        tile_grad = take(s.keys, kTile);
        maps = take(s.map_rows, kTile);
        inverse = take(1, kTile).data;
    }
    static int64_t floats(const AttentionShape& s) {
        return 4 * kTile * padded(s.dims) + (3 * s.keys + s.map_rows + 1) * kTile;
    }
};

}  // namespace
