// F(4x4, 3x3) of Lavin and Gray 2016 (arXiv 1509.09308): a tile of 4 x 4 outputs Y of a 3 x 3 filter g on the 6 x 6 inputs d is
//     Y = A' [ (G g G') * (B' d B) ] A
// with 36 products in place of 144. Summed over channels, each of the 36 places is one matrix product for a block of tiles:
//     [tiles, channels] [channels, filters]
// G g G' is the weight as it is given. A block lies in cache from its input to its output.
#include "winograd_convolution.h"

#include "half_vectors.h"
#include "matmul.h"

namespace {

using seal_fast::Bfloat16;
using seal_fast::WinogradConvolution;

constexpr int kTile = 4, kInput = 6, kPlaces = kInput * kInput;

// Tiles of a block. From 24 to 96 the same speed for up to 256 channels; fewer read the weights of wide layers too often.
constexpr int64_t kBlock = 48;

// Floats between the places of a block beyond what is in them, so that they do not compete for the same lines of the first-level
// cache: 1.03 to 1.18 times as fast.
constexpr int64_t kGap = 16;

// to[i * step] = (B' d)[i]
inline void transform_input(const Floats* d, Floats* to, int step) {
    const Floats even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
    const Floats outer = d[4] - d[2], inner = 2.0f * (d[3] - d[1]);
    to[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = outer + inner;
    to[4 * step] = outer - inner;
    to[5 * step] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// to[i * step] = (A' m)[i]
inline void transform_output(const Floats* m, Floats* to, int step) {
    const Floats sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    to[0] = m[0] + sum1 + sum2;
    to[step] = difference1 + 2.0f * difference2;
    to[2 * step] = sum1 + 4.0f * sum2;
    to[3 * step] = difference1 + 8.0f * difference2 + m[5];
}

// A call and the grid of its tiles.
template <class T>
struct Tiling : WinogradConvolution<T> {
    int64_t down, across;

    explicit Tiling(const WinogradConvolution<T>& call)
        : WinogradConvolution<T>(call), down(ceil_div(call.height, kTile)), across(ceil_div(call.width, kTile)) {}

    int64_t tiles() const { return this->images * down * across; }
};

// Where a tile's outputs begin.
struct Place {
    int64_t image, top, left;

    template <class T>
    Place(const Tiling<T>& call, int64_t tile)
        : image(tile / (call.across * call.down)),
          top(tile / call.across % call.down * kTile),
          left(tile % call.across * kTile) {}
};

// B' d B of one tile, at to[place * stride + channel]; `zeros` holds as many as there are channels.
template <class T>
inline void gather(const Tiling<T>& call, Place at, const T* zeros, float* to, int64_t stride) {
    const T* inputs[kPlaces];
    for (int i = 0; i < kInput; ++i) {
        for (int j = 0; j < kInput; ++j) {
            const int64_t y = at.top - 1 + i, x = at.left - 1 + j;
            const bool inside = uint64_t(y) < uint64_t(call.height) && uint64_t(x) < uint64_t(call.width);
            inputs[i * kInput + j] =
                inside ? call.x + ((at.image * call.height + y) * call.width + x) * call.channels : zeros;
        }
    }
    for (int64_t c = 0; c < call.channels; c += kFloats) {
        Floats half[kPlaces];
        for (int j = 0; j < kInput; ++j) {
            Floats column[kInput];
#pragma GCC unroll 6
            for (int i = 0; i < kInput; ++i) {
                // what the next tile adds to this one: up to 1.2 times as fast where the images fill more than a cache
                if (j >= kInput - kTile) __builtin_prefetch(inputs[i * kInput + j] + kTile * call.channels + c);
                column[i] = to_floats(inputs[i * kInput + j] + c);
            }
            transform_input(column, half + j, kInput);
        }
        for (int i = 0; i < kInput; ++i) {
            Floats row[kInput];
            transform_input(half + i * kInput, row, 1);
#pragma GCC unroll 6
            for (int j = 0; j < kInput; ++j) store(to + (i * kInput + j) * stride + c, row[j]);
        }
    }
}

// Adds the bias to A' m A of one tile, m at from[place * stride + filter], and writes what lies inside the image.
template <class T>
inline void scatter(const Tiling<T>& call, Place at, const float* from, int64_t stride) {
    T* image = call.out + at.image * call.height * call.width * call.filters;
    const int64_t down = call.height - at.top, across = call.width - at.left;
    for (int64_t f = 0; f < call.filters; f += kFloats) {
        Floats half[kTile * kInput];
        for (int j = 0; j < kInput; ++j) {
            Floats column[kInput];
#pragma GCC unroll 6
            for (int i = 0; i < kInput; ++i) column[i] = load(from + (i * kInput + j) * stride + f);
            transform_output(column, half + j, kInput);
        }
        const Floats bias = call.bias == nullptr ? Floats{} : load(call.bias + f);
        for (int i = 0; i < kTile && i < down; ++i) {
            Floats row[kTile];
            transform_output(half + i * kInput, row, 1);
            for (int j = 0; j < kTile && j < across; ++j)
                from_floats(row[j] + bias, image + ((at.top + i) * call.width + at.left + j) * call.filters + f);
        }
    }
}

// Of one thread: as many zeros as there are channels, then both transformed forms of a block.
inline int64_t workspace_floats(int64_t channels, int64_t filters) {
    return channels + kPlaces * (kBlock * (channels + filters) + 2 * kGap);
}

template <class T>
inline void convolve_block(const Tiling<T>& call, int64_t first, int64_t tiles, float* workspace) {
    const int64_t inputs = tiles * call.channels + kGap, outputs = tiles * call.filters + kGap;
    float *zeros = workspace, *transformed = zeros + call.channels, *products = transformed + kPlaces * inputs;
    // zero has the same bits in both types, and a float is never the narrower one
    const T* padding = reinterpret_cast<const T*>(zeros);
    for (int64_t i = 0; i < tiles; ++i) gather(call, Place(call, first + i), padding, transformed + i * call.channels, inputs);
    for (int place = 0; place < kPlaces; ++place) {
        // matmul.h takes what it reads as not const
        float* weight = const_cast<float*>(call.weight) + place * call.channels * call.filters;
        multiply<false, float>({transformed + place * inputs, call.channels}, {weight, call.filters},
                               {products + place * outputs, call.filters}, tiles, call.filters, call.channels);
    }
    for (int64_t i = 0; i < tiles; ++i) scatter(call, Place(call, first + i), products + i * call.filters, outputs);
}

}  // namespace

namespace seal_fast {
namespace SEAL_FAST_ISA {

int64_t winograd_workspace(int64_t channels, int64_t filters, int threads) {
    return threads * workspace_floats(channels, filters);
}

template <class T>
void winograd_convolution(const WinogradConvolution<T>& arguments, int threads) {
    const Tiling<T> call(arguments);
    const int64_t tiles = call.tiles(), workers = tiles < kBlock ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (workers > 1)
    for (int64_t worker = 0; worker < workers; ++worker) {
        float* workspace = call.workspace + worker * workspace_floats(call.channels, call.filters);
        for (int64_t c = 0; c < call.channels; ++c) workspace[c] = 0;
        const int64_t last = (worker + 1) * tiles / workers;
        for (int64_t first = worker * tiles / workers; first < last; first += kBlock)
            convolve_block(call, first, last - first < kBlock ? last - first : kBlock, workspace);
    }
}

template void winograd_convolution<float>(const WinogradConvolution<float>&, int);
template void winograd_convolution<Bfloat16>(const WinogradConvolution<Bfloat16>&, int);

}  // namespace SEAL_FAST_ISA
}  // namespace seal_fast
