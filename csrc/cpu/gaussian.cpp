// gaussian_kl_stats: per trigger k, with kl_i = -log g_i + (g_i^2 + mu_i^2 - 1) / 2 and g = max(gamma, floor),
//     stats[k] = mean_i kl_i, mean_i (kl_i - mean)^2, sum_i mu_i^2
//
// gaussian_log_ratio: log N(x; mu, g^2) - log N(x; 0, 1), summed over dimensions, in standardised form
//     out[n,k] = offset[k] + 1/2 sum_i x[n,i]^2 - 1/2 sum_i z^2,    z = x[n,i] scale[k,i] + shift[k,i] = (x - mu) / g
// Two fused multiply-adds per (n, k, i); the sum of x^2 is shared by all triggers. Expanding the square instead would cost the
// same, but lose 1/g^2 in relative precision to cancellation where g is small.
#include "gaussian.h"

#include "simd.h"

namespace {

template <class T>
inline T smaller(T a, T b) {
    return a < b ? a : b;
}

// A float accumulator takes at most this many additions before it is emptied into double.
constexpr int kChain = 128;

// Inputs that share one pass over the coefficients of a chunk of dimensions, so that those come from the first-level cache.
constexpr int64_t kBlockInputs = 32;

// Register tile: accumulators for kTileInputs x kTileTriggers, plus one per input for x^2, fit the vector registers.
constexpr int kTileInputs = 4;
constexpr int kTileTriggers = kVectorBytes == 64 ? 4 : 2;

// The coefficients of a tile's first trigger; those of the next lie `stride` elements further.
template <class T>
struct Coefficients {
    const T* scale;
    const T* shift;
    int64_t stride;
};

// Adds -1/2 sum z^2 of `length` dimensions to out[R,C], and 1/2 sum x^2 to squares[R] if kSquares.
template <class T, int R, int C, bool kSquares>
inline void add_tile(const T* x, int64_t x_stride, Coefficients<T> at, int64_t length, double* out, int64_t out_stride,
                     double* squares) {
    Vec<T> z2[R][C] = {}, x2[R] = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= length; i += kLanes<T>) {
        Vec<T> xs[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            xs[r] = load(x + r * x_stride + i);
            if (kSquares) x2[r] += xs[r] * xs[r];
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const Vec<T> scale = load(at.scale + c * at.stride + i), shift = load(at.shift + c * at.stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec<T> z = xs[r] * scale + shift;
                z2[r][c] += z * z;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            double sum = sum_lanes<T>(z2[r][c]);
            for (int64_t j = i; j < length; ++j) {
                const double z = double(x[r * x_stride + j]) * at.scale[c * at.stride + j] + at.shift[c * at.stride + j];
                sum += z * z;
            }
            out[r * out_stride + c] -= sum / 2;
        }
        if (kSquares) {
            double sum = sum_lanes<T>(x2[r]);
            for (int64_t j = i; j < length; ++j) sum += double(x[r * x_stride + j]) * x[r * x_stride + j];
            squares[r] += sum / 2;
        }
    }
}

// One chunk of dimensions for R inputs and every trigger.
template <class T, int R>
inline void add_inputs(const T* x, int64_t dims, Coefficients<T> at, int64_t length, double* out, int64_t triggers,
                     double* squares) {
    int64_t k = 0;
    if (triggers >= kTileTriggers) {
        add_tile<T, R, kTileTriggers, true>(x, dims, at, length, out, triggers, squares);
        k = kTileTriggers;
    } else {
        add_tile<T, R, 1, true>(x, dims, at, length, out, triggers, squares);
        k = 1;
    }
    for (; k < triggers;) {
        const Coefficients<T> next{at.scale + k * at.stride, at.shift + k * at.stride, at.stride};
        if (k + kTileTriggers <= triggers) {
            add_tile<T, R, kTileTriggers, false>(x, dims, next, length, out + k, triggers, nullptr);
            k += kTileTriggers;
        } else {
            add_tile<T, R, 1, false>(x, dims, next, length, out + k, triggers, nullptr);
            k += 1;
        }
    }
}

// With one trigger memory bandwidth limits the speed: an input is read on its own, in order, and asked for a page ahead, because
// hardware prefetching ends with the page. (bench_input_detection's share of a plain sum's rate is .85 this way, .71 in tiles of
// four inputs.)
constexpr int kChains = 4, kPage = 4096;

// One chunk of dimensions for one input and the only trigger.
template <class T>
inline void add_alone(const T* x, Coefficients<T> at, int64_t length, double* out, double* squares) {
    Vec<T> z2[kChains] = {}, x2[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes<T> <= length; i += kChains * kLanes<T>) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
            const int64_t j = i + c * kLanes<T>;
            __builtin_prefetch(reinterpret_cast<const char*>(x + j) + kPage);
            const Vec<T> xs = load(x + j), z = xs * load(at.scale + j) + load(at.shift + j);
            x2[c] += xs * xs;
            z2[c] += z * z;
        }
    }
    double sum = 0, sum2 = 0;
    for (int c = 0; c < kChains; ++c) {
        sum += sum_lanes<T>(z2[c]);
        sum2 += sum_lanes<T>(x2[c]);
    }
    for (; i < length; ++i) {
        const double z = double(x[i]) * at.scale[i] + at.shift[i];
        sum += z * z;
        sum2 += double(x[i]) * x[i];
    }
    *out -= sum / 2;
    *squares += sum2 / 2;
}

// All dimensions of at most kBlockInputs inputs, from number `first`.
template <class T>
void block_of_inputs(const seal_fast::GaussianLogRatio<T>& call, int64_t first, int64_t inputs) {
    const int64_t triggers = call.triggers, dims = call.dims;
    const T* x = call.x + first * dims;
    double *out = call.out + first * triggers, squares[kBlockInputs] = {};
    for (int64_t n = 0; n < inputs; ++n)
        for (int64_t k = 0; k < triggers; ++k) out[n * triggers + k] = call.offset[k];
    const int64_t chunk = kChain * kLanes<T> * (triggers == 1 ? kChains : 1);
    for (int64_t start = 0; start < dims; start += chunk) {
        const int64_t length = smaller(chunk, dims - start);
        const Coefficients<T> at{call.scale + start, call.shift + start, dims};
        int64_t n = 0;
        if (triggers == 1)
            for (; n < inputs; ++n) add_alone<T>(x + n * dims + start, at, length, out + n, squares + n);
        for (; n + kTileInputs <= inputs; n += kTileInputs)
            add_inputs<T, kTileInputs>(x + n * dims + start, dims, at, length, out + n * triggers, triggers, squares + n);
        for (; n < inputs; ++n)
            add_inputs<T, 1>(x + n * dims + start, dims, at, length, out + n * triggers, triggers, squares + n);
    }
    for (int64_t n = 0; n < inputs; ++n)
        for (int64_t k = 0; k < triggers; ++k) out[n * triggers + k] += squares[n];
}

constexpr int kWide = kLanes<double>;
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));

// Natural logarithm of positive, normal, finite lanes, to a few units in the last place: x = 2^e m with m in
// [sqrt(1/2), sqrt(2)), log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, by the Taylor series of atanh to s^21.
inline Doubles log_lanes(Doubles x) {
    constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCDull, kTwo52 = 0x4330000000000000ull;
    const Bits bits = (Bits)x;
    // exponent e + 1024 as an unsigned number: AVX2 has no arithmetic shift of 64-bit lanes
    const Bits biased = (bits - kSqrtHalf + (1024ull << 52)) >> 52;
    const Doubles m = (Doubles)(bits - ((biased - 1024) << 52));
    const Doubles e = (Doubles)(biased | kTwo52) - (4503599627370496.0 + 1024.0);
    const Doubles s = (m - 1.0) / (m + 1.0), s2 = s * s;
    Doubles series = Doubles{} + 1.0 / 21;
#pragma GCC unroll 16
    for (int power = 19; power >= 3; power -= 2) series = series * s2 + 1.0 / power;
    constexpr double kLn2 = 0.693147180559945309417;
    return e * kLn2 + 2.0 * (s + s * s2 * series);
}

inline Doubles divergence(Doubles mu, Doubles g) { return (g * g + mu * mu - 1.0) * 0.5 - log_lanes(g); }

template <class T>
inline Doubles load_wide(const T* p) {
    Doubles v;
    for (int i = 0; i < kWide; ++i) v[i] = static_cast<double>(p[i]);
    return v;
}

// Comparison written so that NaN passes through and is seen in the result.
inline Doubles floored(Doubles gamma, double floor) { return gamma < floor ? Doubles{} + floor : gamma; }

// Sums of deviations from the first dimension's kl: shifting by any sample bounds the cancellation in the variance by the number
// of dimensions, so one pass in double is enough.
template <class T>
void one_trigger(const T* mu, const T* gamma, double gamma_floor, double* stats, int64_t dims) {
    const Doubles zero = {};
    const double origin = divergence(zero + double(mu[0]), floored(zero + double(gamma[0]), gamma_floor))[0];
    Doubles sum = {}, sum2 = {}, norm2 = {};
    int64_t i = 0;
    for (; i + kWide <= dims; i += kWide) {
        const Doubles m = load_wide(mu + i);
        const Doubles away = divergence(m, floored(load_wide(gamma + i), gamma_floor)) - origin;
        sum += away;
        sum2 += away * away;
        norm2 += m * m;
    }
    double total = sum_lanes<double>(sum), total2 = sum_lanes<double>(sum2), total_norm2 = sum_lanes<double>(norm2);
    for (; i < dims; ++i) {
        const double m = static_cast<double>(mu[i]);
        const double away = divergence(zero + m, floored(zero + double(gamma[i]), gamma_floor))[0] - origin;
        total += away;
        total2 += away * away;
        total_norm2 += m * m;
    }
    const double mean = total / double(dims);
    const double variance = total2 / double(dims) - mean * mean;
    stats[0] = origin + mean;
    stats[1] = variance < 0 ? 0 : variance;
    stats[2] = total_norm2;
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

template <class T>
void gaussian_kl_stats(const GaussianKlStats<T>& call, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < call.triggers; ++k)
        one_trigger(call.mu + k * call.dims, call.gamma + k * call.dims, call.gamma_floor, call.stats + 3 * k, call.dims);
}

template <class T>
void gaussian_log_ratio(const GaussianLogRatio<T>& call, int threads) {
    if (call.inputs == 0 || call.triggers == 0) return;
    // every thread gets inputs before blocks get large: an input's sums do not depend on its block
    const int64_t share = (call.inputs + threads - 1) / threads;
    const int64_t block = smaller(kBlockInputs, (share + kTileInputs - 1) / kTileInputs * kTileInputs);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < call.inputs; n += block) block_of_inputs(call, n, smaller(block, call.inputs - n));
}

#define SEAL_INSTANTIATE(T)                                              \
    template void gaussian_kl_stats<T>(const GaussianKlStats<T>&, int);  \
    template void gaussian_log_ratio<T>(const GaussianLogRatio<T>&, int);
SEAL_INSTANTIATE(float)
SEAL_INSTANTIATE(double)

}  // namespace SEAL_ISA
}  // namespace seal_fast
