// Cross-attention with head-averaged maps on the CPU. T is float, Bfloat16 or Float16; sums are float.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace seal_fast {

struct AttentionShape {
    int64_t batches, heads, queries, keys, dims;
    int64_t tokens;  // rows of the maps
};

// [batches, heads, rows, dims]; the last dimension is dense, the strides of the others count elements.
template <class T>
struct Heads {
    T* data;
    int64_t batch, head, row;
};

// One set of arguments for both directions. `tokens` null stands for all keys in order. Maps are dense [batches, tokens, queries].
template <class T>
struct AttentionForward {
    AttentionShape shape;
    Heads<const T> q, k, v;
    const int64_t* tokens;
    double scale;
    Heads<T> out;
    float* maps;
};

// A null gradient of `out` or `maps` counts as zero; a null gradient of q, k or v is not computed.
template <class T>
struct AttentionBackward {
    AttentionShape shape;
    Heads<const T> q, k, v;
    const int64_t* tokens;
    double scale;
    Heads<const T> out_grad;
    const float* maps_grad;
    Heads<T> q_grad, k_grad, v_grad;
};

#define SEAL_DECLARE_CROSS_ATTENTION(ISA)                                                           \
    namespace ISA {                                                                                 \
    /* Floats that `workspace` must hold, 64-byte aligned. */                                       \
    int64_t cross_attention_workspace(const AttentionShape& shape, bool backward, int threads);     \
    template <class T>                                                                              \
    void cross_attention_forward(const AttentionForward<T>& call, float* workspace, int threads);   \
    template <class T>                                                                              \
    void cross_attention_backward(const AttentionBackward<T>& call, float* workspace, int threads); \
    }
SEAL_FOR_EACH_ISA(SEAL_DECLARE_CROSS_ATTENTION)
#undef SEAL_DECLARE_CROSS_ATTENTION

}  // namespace seal_fast
