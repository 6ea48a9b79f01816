// Vectors as wide as the level being compiled, in the vector extension that GCC and Clang share.
//
// Everything is in an anonymous namespace: a helper with a linkable name could be emitted by the AVX-512 object and kept by
// the linker for all levels. For the same reason kernels include no header of the standard library but <cstdint>.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <>
struct Simd<uint32_t> {
    typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

typedef Vec<float> Floats;
constexpr int kFloats = kLanes<float>;

template <class T>
inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Sum of all lanes, added in pairs so that the rounding error grows with log2 of the lanes.
template <class T>
inline double sum_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    store<T>(lanes, v);
#pragma GCC unroll 4
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return static_cast<double>(lanes[0]);
}

}  // namespace
