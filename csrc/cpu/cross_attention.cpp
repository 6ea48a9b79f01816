// cross_attention: per batch b and head h, with P = softmax(scale q k^T) over the keys,
//     out = P v,    maps[b,t,m] = mean over h of P[b,h,m,token t]
// and for gradients dO of out and dA of maps, dA scattered to its tokens:
//     G = dO v^T + dA / H,  dS = P (G - rowsum(P G)),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO
//
// The probabilities of at most kTile queries are a tile that stays in cache: keys are its rows and queries its columns. So the
// sums of the softmax run over vectors and never across lanes, a row of the tile is a piece of a row of the maps, and no key is
// padded. The backward pass recomputes the tile. Results do not depend on the number of threads: forward, one task owns a block of
// queries for all heads; backward, one task owns a fixed slice of queries of one head, and slices are added in order.
#include "cross_attention.h"

#include "matmul.h"

namespace {

using namespace seal_fast;

constexpr int64_t kTile = 64;
constexpr int64_t kSlice = 1024;
constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows are padded to a cache line, at every level alike.
inline int64_t padded(int64_t dims) { return ceil_div(dims, 16) * 16; }

// 2^x for x <= 0, to about one unit in the last place: 2^round(x) times a polynomial in the rest, |rest| <= 1/2, with relative
// error 2e-8. Results that would be subnormal are zero; NaN stays NaN.
inline Floats exp2_nonpositive(Floats x) {
    // adding it leaves round(x) + 127, an exponent with its bias, in the low bits of the sum
    constexpr float kRound = 12582912.0f + 127.0f;
    const Floats shifted = x + kRound, rest = x - (shifted - kRound);
    Floats power = Floats{} + 1.5353361959569156e-4f;
    power = power * rest + 1.3398873852565885e-3f;
    power = power * rest + 9.61843691766262e-3f;
    power = power * rest + 5.5503323674201965e-2f;
    power = power * rest + 2.4022647738456726e-1f;
    power = power * rest + 6.931471824645996e-1f;
    power = power * rest + 1.0f;
    return x < -126.0f ? Floats{} : power * (Floats)((Words)shifted << 23);
}

// kVectors columns of vectors of a tile, from logits (in units of log 2) to exponentials; `inverse` gets 1 / their sum.
template <int kVectors>
inline void exponentials(float* tile, int64_t keys, float* inverse) {
    Floats top[kVectors], sum[kVectors] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) top[j] = load(tile + j * kFloats);
    for (int64_t n = 1; n < keys; ++n) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const Floats logit = load(tile + n * kTile + j * kFloats);
            top[j] = top[j] > logit ? top[j] : logit;
        }
    }
    for (int64_t n = 0; n < keys; ++n) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            float* at = tile + n * kTile + j * kFloats;
            const Floats e = exp2_nonpositive(load(at) - top[j]);
            sum[j] += e;
            store(at, e);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(inverse + j * kFloats, 1.0f / sum[j]);
}

void exponentials(float* tile, int64_t keys, int64_t width, float* inverse) {
    int64_t m = 0;
    for (; m + 4 * kFloats <= width; m += 4 * kFloats) exponentials<4>(tile + m, keys, inverse + m);
    for (; m < width; m += kFloats) exponentials<1>(tile + m, keys, inverse + m);
}

// Chunks of constant length become vector instructions without a remainder; head sizes are mostly multiples of eight.
template <int kCount, class From, class To>
inline void convert(const From* __restrict from, float factor, To* __restrict to) {
#pragma GCC unroll 1
    for (int i = 0; i < kCount; ++i) from_float(to_float(from[i]) * factor, to[i]);
}

template <class From, class To>
inline void convert(const From* from, float factor, int64_t count, To* to) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) convert<16>(from + i, factor, to + i);
    for (; i + 8 <= count; i += 8) convert<8>(from + i, factor, to + i);
    for (; i < count; ++i) convert<1>(from + i, factor, to + i);
}

// Rows as floats, padded with zeros up to `stride` and to `height` rows.
template <class T>
void pack(const T* from, int64_t from_stride, int64_t rows, int64_t height, int64_t dims, Matrix to) {
    for (int64_t i = 0; i < rows; ++i) {
        float* row = to.data + i * to.stride;
        for (int d = 0; d < 16; ++d) row[to.stride - 16 + d] = 0;
        convert(from + i * from_stride, 1.0f, dims, row);
    }
    for (int64_t i = rows * to.stride; i < height * to.stride; ++i) to.data[i] = 0;
}

template <class T>
void unpack(Matrix from, double factor, int64_t rows, int64_t dims, T* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) convert(from.data + i * from.stride, float(factor), dims, to + i * to_stride);
}

template <class T>
T* head_of(Heads<T> x, int64_t head, int64_t heads) {
    return x.data + head / heads * x.batch + head % heads * x.head;
}

// Keys and values of all heads as floats, [batches * heads, keys, padded dims] each. Keys carry the scale, so that the tile comes
// out in units of log 2; it is multiplied in double, one rounding instead of two.
struct Packed {
    float *keys, *values;
    int64_t size, stride;

    Packed(float* workspace, const AttentionShape& s) {
        stride = padded(s.dims);
        size = s.keys * stride;
        keys = workspace;
        values = workspace + s.batches * s.heads * size;
    }
    Matrix key(int64_t head) const { return {keys + head * size, stride}; }
    Matrix value(int64_t head) const { return {values + head * size, stride}; }
    static int64_t floats(const AttentionShape& s) { return 2 * s.batches * s.heads * s.keys * padded(s.dims); }
};

template <class T>
void pack_head(const AttentionShape& s, Heads<const T> k, Heads<const T> v, double scale, const Packed& packed, int64_t head) {
    const Matrix key = packed.key(head);
    pack(head_of(k, head, s.heads), k.row, s.keys, s.keys, s.dims, key);
    const double factor = scale * kLog2E;
    for (int64_t i = 0; i < packed.size; ++i) key.data[i] = static_cast<float>(key.data[i] * factor);
    pack(head_of(v, head, s.heads), v.row, s.keys, s.keys, s.dims, packed.value(head));
}

// What one thread works in. `transposed` holds queries or gradients as columns, the tiles keys x queries.
struct Scratch {
    Matrix rows, grads, transposed, tile, tile_grad, maps;
    float* inverse;

    Scratch(float* workspace, const AttentionShape& s) {
        const int64_t stride = padded(s.dims);
        auto take = [&](int64_t height, int64_t width) {
            const Matrix matrix{workspace, width};
            workspace += height * width;
            return matrix;
        };
        rows = take(kTile, stride);
        grads = take(kTile, stride);
        transposed = take(stride, kTile);
        tile = take(s.keys, kTile);
        tile_grad = take(s.keys, kTile);
        maps = take(s.tokens, kTile);
        inverse = take(1, kTile).data;
    }
    static int64_t floats(const AttentionShape& s) {
        return 3 * kTile * padded(s.dims) + (2 * s.keys + s.tokens + 1) * kTile;
    }
};

// Exponentials of `rows` queries against all keys of a head in scratch.tile, 1 / their sums in scratch.inverse; the queries
// remain in scratch.rows. Columns are rounded up to whole vectors of queries that are zero.
template <class T>
int64_t recompute_tile(const AttentionShape& s, const T* q, int64_t q_stride, int64_t rows, Matrix key, const Scratch& scratch) {
    const int64_t width = ceil_div(rows, kFloats) * kFloats;
    pack(q, q_stride, rows, width, s.dims, scratch.rows);
    transpose(scratch.rows, scratch.transposed, width, s.dims);
    multiply<false>(key, scratch.transposed, scratch.tile, s.keys, width, s.dims);
    exponentials(scratch.tile.data, s.keys, width, scratch.inverse);
    return width;
}

// Adds the probabilities of the chosen tokens, or sets the maps to them for the first head.
void add_maps(const AttentionShape& s, const int64_t* tokens, int64_t width, bool first, const Scratch& scratch) {
    for (int64_t t = 0; t < s.tokens; ++t) {
        const float* from = scratch.tile.data + (tokens ? tokens[t] : t) * kTile;
        float* to = scratch.maps.data + t * kTile;
        for (int64_t m = 0; m < width; m += kFloats) {
            const Floats p = load(from + m) * load(scratch.inverse + m);
            store(to + m, first ? p : load(to + m) + p);
        }
    }
}

// All heads of `rows` queries of one batch.
template <class T>
void forward_queries(const AttentionForward<T>& call, const Packed& packed, int64_t batch, int64_t start, int64_t rows,
                     const Scratch& scratch) {
    const AttentionShape& s = call.shape;
    for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t head = batch * s.heads + h;
        const T* q = head_of(call.q, head, s.heads) + start * call.q.row;
        const int64_t width = recompute_tile(s, q, call.q.row, rows, packed.key(head), scratch);
        add_maps(s, call.tokens, width, h == 0, scratch);
        multiply<true>(scratch.tile, packed.value(head), scratch.rows, rows, s.dims, s.keys);
        T* out = head_of(call.out, head, s.heads) + start * call.out.row;
        for (int64_t m = 0; m < rows; ++m)
            convert(scratch.rows.data + m * scratch.rows.stride, scratch.inverse[m], s.dims, out + m * call.out.row);
    }
    for (int64_t t = 0; t < s.tokens; ++t)
        convert(scratch.maps.data + t * kTile, 1.0f / float(s.heads), rows,
                call.maps + (batch * s.tokens + t) * s.queries + start);
}

// G = dO v^T + dA / H in scratch.tile_grad. The gradients dO are expected in scratch.grads.
template <class T>
void probability_grad(const AttentionBackward<T>& call, Matrix value, int64_t batch, int64_t start, int64_t rows,
                      int64_t width, const Scratch& scratch) {
    const AttentionShape& s = call.shape;
    if (call.out_grad.data) {
        transpose(scratch.grads, scratch.transposed, width, s.dims);
        multiply<false>(value, scratch.transposed, scratch.tile_grad, s.keys, width, s.dims);
    } else {
        for (int64_t i = 0; i < s.keys * kTile; ++i) scratch.tile_grad.data[i] = 0;
    }
    if (!call.maps_grad) return;
    const float share = 1.0f / static_cast<float>(s.heads);
    for (int64_t t = 0; t < s.tokens; ++t) {
        const float* from = call.maps_grad + (batch * s.tokens + t) * s.queries + start;
        float* to = scratch.tile_grad.data + (call.tokens ? call.tokens[t] : t) * kTile;
        for (int64_t m = 0; m < rows; ++m) to[m] += from[m] * share;
    }
}

// Exponentials become probabilities P, and G becomes dS = P (G - rowsum(P G)).
void logit_grad(int64_t keys, int64_t width, const Scratch& scratch) {
    for (int64_t m = 0; m < width; m += kFloats) {
        const Floats inverse = load(scratch.inverse + m);
        Floats mean = {};
        for (int64_t n = 0; n < keys; ++n) {
            float* p = scratch.tile.data + n * kTile + m;
            const Floats probability = load(p) * inverse;
            store(p, probability);
            mean += probability * load(scratch.tile_grad.data + n * kTile + m);
        }
        for (int64_t n = 0; n < keys; ++n) {
            float* g = scratch.tile_grad.data + n * kTile + m;
            store(g, load(scratch.tile.data + n * kTile + m) * (load(g) - mean));
        }
    }
}

void normalise(int64_t keys, int64_t width, const Scratch& scratch) {
    for (int64_t n = 0; n < keys; ++n)
        for (int64_t m = 0; m < width; m += kFloats) {
            float* p = scratch.tile.data + n * kTile + m;
            store(p, load(p) * load(scratch.inverse + m));
        }
}

// At most kTile queries of one head. Gradients of k and v are added to the sums of their slice, or start them.
template <class T>
void backward_queries(const AttentionBackward<T>& call, const Packed& packed, int64_t head, int64_t start, int64_t rows,
                      Matrix k_sum, Matrix v_sum, bool first, const Scratch& scratch) {
    const AttentionShape& s = call.shape;
    const T* q = head_of(call.q, head, s.heads) + start * call.q.row;
    const int64_t width = recompute_tile(s, q, call.q.row, rows, packed.key(head), scratch);
    if (call.out_grad.data) {
        const T* grad = head_of(call.out_grad, head, s.heads) + start * call.out_grad.row;
        pack(grad, call.out_grad.row, rows, width, s.dims, scratch.grads);
    }
    if (call.q_grad.data || call.k_grad.data) {
        probability_grad(call, packed.value(head), head / s.heads, start, rows, width, scratch);
        logit_grad(s.keys, width, scratch);
    } else {
        normalise(s.keys, width, scratch);
    }
    if (call.v_grad.data) multiply<false>(scratch.tile, scratch.grads, v_sum, s.keys, s.dims, rows, !first);
    if (call.k_grad.data) multiply<false>(scratch.tile_grad, scratch.rows, k_sum, s.keys, s.dims, rows, !first);
    if (call.q_grad.data) {
        multiply<true>(scratch.tile_grad, packed.key(head), scratch.grads, rows, s.dims, s.keys);
        // the packed keys are scale * log2(e) * k
        unpack(scratch.grads, kLn2, rows, s.dims, head_of(call.q_grad, head, s.heads) + start * call.q_grad.row, call.q_grad.row);
    }
}

// Adds the slices of one head's gradient of keys or values in order, into the first of them, and writes it.
template <class T>
void add_slices(float* sums, int64_t slices, int64_t slice_stride, const AttentionShape& s, double factor, T* out,
                int64_t out_stride) {
    const int64_t stride = padded(s.dims), size = s.keys * stride;
    for (int64_t slice = 1; slice < slices; ++slice)
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[slice * slice_stride + i];
    unpack({sums, stride}, factor, s.keys, s.dims, out, out_stride);
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

int64_t cross_attention_workspace(const AttentionShape& s, bool backward, int threads) {
    const int64_t slices = backward ? ceil_div(s.queries, kSlice) : 0;
    return (1 + slices) * Packed::floats(s) + threads * Scratch::floats(s);
}

template <class T>
void cross_attention_forward(const AttentionForward<T>& call, float* workspace, int threads) {
    const AttentionShape& s = call.shape;
    const Packed packed(workspace, s);
    float* scratches = workspace + Packed::floats(s);
    const int64_t heads = s.batches * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) pack_head(s, call.k, call.v, call.scale, packed, head);

    // every thread gets queries before blocks get large: a query's results do not depend on its block
    int64_t block = kTile;
    while (block > kFloats && s.batches * ceil_div(s.queries, block) < threads) block /= 2;
    const int64_t blocks = ceil_div(s.queries, block), tasks = s.batches * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t worker = 0; worker < threads; ++worker) {
        const Scratch scratch(scratches + worker * Scratch::floats(s), s);
        for (int64_t task = worker * tasks / threads; task < (worker + 1) * tasks / threads; ++task) {
            const int64_t start = task % blocks * block;
            forward_queries(call, packed, task / blocks, start, smaller(block, s.queries - start), scratch);
        }
    }
}

template <class T>
void cross_attention_backward(const AttentionBackward<T>& call, float* workspace, int threads) {
    const AttentionShape& s = call.shape;
    const Packed packed(workspace, s);
    float* sums = workspace + Packed::floats(s);
    const int64_t heads = s.batches * s.heads, slices = ceil_div(s.queries, kSlice), tasks = heads * slices;
    float* scratches = sums + slices * Packed::floats(s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) pack_head(s, call.k, call.v, call.scale, packed, head);

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t worker = 0; worker < threads; ++worker) {
        const Scratch scratch(scratches + worker * Scratch::floats(s), s);
        for (int64_t task = worker * tasks / threads; task < (worker + 1) * tasks / threads; ++task) {
            const int64_t head = task / slices, begin = task % slices * kSlice, end = smaller(begin + kSlice, s.queries);
            const Packed slice(sums + task % slices * Packed::floats(s), s);
            for (int64_t start = begin; start < end; start += kTile)
                backward_queries(call, packed, head, start, smaller(kTile, end - start), slice.key(head), slice.value(head),
                                 start == begin, scratch);
        }
    }

    const Packed first(sums, s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; ++head) {
        if (call.k_grad.data)
            add_slices(first.key(head).data, slices, Packed::floats(s), s, call.scale, head_of(call.k_grad, head, s.heads),
                       call.k_grad.row);
        if (call.v_grad.data)
            add_slices(first.value(head).data, slices, Packed::floats(s), s, 1.0, head_of(call.v_grad, head, s.heads),
                       call.v_grad.row);
    }
}

#define SEAL_INSTANTIATE(T)                                                                \
    template void cross_attention_forward<T>(const AttentionForward<T>&, float*, int);     \
    template void cross_attention_backward<T>(const AttentionBackward<T>&, float*, int);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(Bfloat16)
SEAL_INSTANTIATE(Float16)

}  // namespace SEAL_ISA
}  // namespace seal_fast
