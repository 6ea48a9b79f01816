// group_norm_silu, per image and group of channels, with h = x + shift:
//     u = (h - mean) / deviation,  z = weight u + bias,  out = z s,  s = 1 / (1 + exp(-z))
// and for a gradient G of out, with averages over the group:
//     dz = G s (1 + z (1 - s)),  dx = (weight dz - average(weight dz) - u average(weight dz u)) / deviation
//
// A pixel's channels lie side by side, so vectors run over channels, and every sum over pixels is one per channel; those of a
// group are added up at the end. The backward pass recomputes u, z and s, which is cheaper than to keep them, and holds dz where dx
// will be, rounded to T. One task owns an image, so results do not depend on the number of threads.
#include "group_norm_silu.h"

#include "exponential.h"
#include "half_vectors.h"

namespace {

using seal_fast::Bfloat16;
using seal_fast::GroupNormSilu;

// Pixels summed up before the sum joins the others: the rounding error grows with the square root of both counts at most.
constexpr int64_t kChain = 64;

// Neighbouring channels that are processed together: kVectors full vectors, or one of which `count` lanes are there.
template <int kVectors>
struct Columns {
    static constexpr int kCount = kVectors;
    int64_t start;

    template <class T>
    Floats read(const T* row, int j) const {
        return to_floats(row + start + j * kFloats);
    }
    template <class T>
    void write(T* row, int j, Floats v) const {
        from_floats(v, row + start + j * kFloats);
    }
};

struct PartialColumn {
    static constexpr int kCount = 1;
    int64_t start, count;

    template <class T>
    Floats read(const T* row, int) const {
        T lanes[kFloats] = {};
        for (int64_t i = 0; i < count; ++i) lanes[i] = row[start + i];
        return to_floats(lanes);
    }
    template <class T>
    void write(T* row, int, Floats v) const {
        T lanes[kFloats];
        from_floats(v, lanes);
        for (int64_t i = 0; i < count; ++i) row[start + i] = lanes[i];
    }
};

template <class Work>
inline void for_columns(int64_t channels, Work work) {
    int64_t c = 0;
    for (; c + 4 * kFloats <= channels; c += 4 * kFloats) work(Columns<4>{c});
    for (; c + 2 * kFloats <= channels; c += 2 * kFloats) work(Columns<2>{c});
    for (; c + kFloats <= channels; c += kFloats) work(Columns<1>{c});
    if (c < channels) work(PartialColumn{c, channels - c});
}

// Sums two values over all pixels: add(j, row, first, second) adds those of one pixel.
template <class Columns, class T, class Add>
inline void sum_pixels(Columns columns, const T* x, int64_t pixels, int64_t channels, float* first, float* second, Add add) {
    constexpr int kCount = Columns::kCount;
    Floats totals[2][kCount] = {};
    for (int64_t start = 0; start < pixels; start += kChain) {
        Floats sums[2][kCount] = {};
        const int64_t end = start + kChain < pixels ? start + kChain : pixels;
        for (int64_t p = start; p < end; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < kCount; ++j) add(j, columns.read(x + p * channels, j), p, sums[0][j], sums[1][j]);
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
            totals[0][j] += sums[0][j];
            totals[1][j] += sums[1][j];
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
        columns.write(first, j, totals[0][j]);
        columns.write(second, j, totals[1][j]);
    }
}

// The arguments of one image.
template <class T>
struct Image {
    const T* x;
    const float *shift, *weight, *bias;
    float *stats, *scale, *offset, *first, *second;
    int64_t pixels, channels, groups;

    Image(const GroupNormSilu<T>& call, int64_t n)
        : x(call.x + n * call.pixels * call.channels),
          shift(call.shift == nullptr ? nullptr : call.shift + n * call.channels),
          weight(call.weight),
          bias(call.bias),
          stats(call.stats + 2 * n * call.groups),
          scale(call.workspace + 4 * n * call.channels),
          offset(scale + call.channels),
          first(offset + call.channels),
          second(first + call.channels),
          pixels(call.pixels),
          channels(call.channels),
          groups(call.groups) {}

    // Deviations are taken from a channel's first pixel, so its variance loses nothing to a large mean.
    void measure(double eps) const {
        for_columns(channels, [&](auto columns) {
            Floats origin[columns.kCount];
#pragma GCC unroll 4
            for (int j = 0; j < columns.kCount; ++j) origin[j] = columns.read(x, j);
            sum_pixels(columns, x, pixels, channels, first, second, [&](int j, Floats v, int64_t, Floats& sum, Floats& squares) {
                const Floats away = v - origin[j];
                sum += away;
                squares += away * away;
            });
#pragma GCC unroll 4
            for (int j = 0; j < columns.kCount; ++j) columns.write(offset, j, origin[j]);
        });
        const int64_t width = channels / groups;
        for (int64_t g = 0; g < groups; ++g) {
            double mean = 0, squares = 0;
            for (int64_t c = g * width; c < (g + 1) * width; ++c) mean += channel_mean(c);
            mean /= double(width);
            for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                const double away = channel_mean(c) - mean;
                squares += second[c] - double(first[c]) * first[c] / double(pixels) + double(pixels) * away * away;
            }
            stats[2 * g] = float(mean);
            stats[2 * g + 1] = float(1 / __builtin_sqrt(squares / double(width * pixels) + eps));
        }
    }

    double channel_mean(int64_t c) const { return offset[c] + shift_of(c) + double(first[c]) / double(pixels); }

    double shift_of(int64_t c) const { return shift == nullptr ? 0 : shift[c]; }

    // u = x scale + offset
    void standardise() const {
        const int64_t width = channels / groups;
        for (int64_t c = 0; c < channels; ++c) {
            const float *stat = stats + 2 * (c / width);
            scale[c] = stat[1];
            offset[c] = float((shift_of(c) - stat[0]) * stat[1]);
        }
    }

    // The sums of weight dz and of weight dz u, from channels to averages over their groups.
    void average_gradients() const {
        const int64_t width = channels / groups;
        for (int64_t g = 0; g < groups; ++g) {
            double plain = 0, along = 0;
            for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                plain += double(weight[c]) * first[c];
                along += double(weight[c]) * second[c];
            }
            for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                first[c] = float(plain / double(width * pixels));
                second[c] = float(along / double(width * pixels));
            }
        }
    }
};

// dz / G
inline Floats slope(Floats z) {
    const Floats s = logistic(z);
    return s * (1.0f + z * (1.0f - s));
}

// The coefficients of neighbouring channels.
template <class Columns>
struct Coefficients {
    Floats scale[Columns::kCount], offset[Columns::kCount], weight[Columns::kCount], bias[Columns::kCount];

    template <class T>
    Coefficients(Columns columns, const Image<T>& image) {
#pragma GCC unroll 4
        for (int j = 0; j < Columns::kCount; ++j) {
            scale[j] = columns.read(image.scale, j);
            offset[j] = columns.read(image.offset, j);
            weight[j] = columns.read(image.weight, j);
            bias[j] = columns.read(image.bias, j);
        }
    }
};

template <class T>
void forward_image(const Image<T>& image, double eps, T* out) {
    image.measure(eps);
    image.standardise();
    for_columns(image.channels, [&](auto columns) {
        const Coefficients<decltype(columns)> at(columns, image);
        for (int64_t p = 0; p < image.pixels; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < columns.kCount; ++j) {
                const Floats u = columns.read(image.x + p * image.channels, j) * at.scale[j] + at.offset[j];
                const Floats z = u * at.weight[j] + at.bias[j];
                columns.write(out + p * image.channels, j, z * logistic(z));
            }
    });
}

template <class T>
void backward_image(const Image<T>& image, const T* grad, T* x_grad) {
    image.standardise();
    for_columns(image.channels, [&](auto columns) {
        const Coefficients<decltype(columns)> at(columns, image);
        sum_pixels(columns, image.x, image.pixels, image.channels, image.first, image.second,
                   [&](int j, Floats x, int64_t p, Floats& sum, Floats& along) {
                       const Floats u = x * at.scale[j] + at.offset[j];
                       const Floats dz = columns.read(grad + p * image.channels, j) * slope(u * at.weight[j] + at.bias[j]);
                       columns.write(x_grad + p * image.channels, j, dz);
                       sum += dz;
                       along += dz * u;
                   });
    });
    image.average_gradients();
    for_columns(image.channels, [&](auto columns) {
        const Coefficients<decltype(columns)> at(columns, image);
        Floats plain[columns.kCount], along[columns.kCount];
#pragma GCC unroll 4
        for (int j = 0; j < columns.kCount; ++j) {
            plain[j] = columns.read(image.first, j);
            along[j] = columns.read(image.second, j);
        }
        for (int64_t p = 0; p < image.pixels; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < columns.kCount; ++j) {
                const int64_t row = p * image.channels;
                const Floats u = columns.read(image.x + row, j) * at.scale[j] + at.offset[j];
                columns.write(x_grad + row, j, (at.weight[j] * columns.read(x_grad + row, j) - plain[j] - u * along[j]) * at.scale[j]);
            }
    });
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

template <class T>
void group_norm_silu(const GroupNormSiluForward<T>& call, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < call.images; ++n)
        forward_image(Image<T>(call, n), call.eps, call.out + n * call.pixels * call.channels);
}

template <class T>
void group_norm_silu_backward(const GroupNormSiluBackward<T>& call, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < call.images; ++n) {
        const int64_t at = n * call.pixels * call.channels;
        backward_image(Image<T>(call, n), call.grad + at, call.x_grad + at);
    }
}

#define SEAL_INSTANTIATE(T)                                                           \
    template void group_norm_silu<T>(const GroupNormSiluForward<T>&, int);            \
    template void group_norm_silu_backward<T>(const GroupNormSiluBackward<T>&, int);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(Bfloat16)

}  // namespace SEAL_ISA
}  // namespace seal_fast
