// Cross-attention with head-averaged maps on the CPU. T is float, Bfloat16 or Float16; sums are float.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa.h"

namespace seal_fast {

struct AttentionShape {
    int64_t batches, heads, queries, keys, dims;
    int64_t map_rows;   // one per chosen token

    template <class Visit>
    void fields(Visit& visit) {
        visit("batches", batches);
        visit("heads", heads);
        visit("queries", queries);
        visit("keys", keys);
        visit("dims", dims);
        visit("map_rows", map_rows);
    }
};

// [batches, heads, rows, dims]; the last dimension is dense, the strides of all four count elements.
template <class T>
struct Heads {
    T* data;
    int64_t strides[4];
};

enum HeadsAxis { kBatch, kHead, kRow };

// What both passes read.
template <class T>
struct Attention {
    AttentionShape shape;
    Heads<const T> q, k, v;
    const int64_t* tokens;   // [map rows], or null for all keys in order
    double scale;
    float* workspace;        // cross_attention_workspace(shape, backward, threads) floats, 64-byte aligned

    template <class Visit>
    void fields(Visit& visit) {
        shape.fields(visit);
        visit("q", q.data);
        visit("q_strides", q.strides);
        visit("k", k.data);
        visit("k_strides", k.strides);
        visit("v", v.data);
        visit("v_strides", v.strides);
        visit("tokens", tokens);
        visit("scale", scale);
        visit("workspace", workspace);
    }
};

template <class T>
struct AttentionForward : Attention<T> {
    Heads<T> out;
    float* maps;   // dense [batches, map rows, queries]

    template <class Visit>
    void fields(Visit& visit) {
        Attention<T>::fields(visit);
        visit("out", out.data);
        visit("out_strides", out.strides);
        visit("maps", maps);
    }
};

// A null gradient of `out` or `maps` counts as zero; a null gradient of q, k or v is not computed.
template <class T>
struct AttentionBackward : Attention<T> {
    Heads<const T> out_grad;
    const float* maps_grad;   // dense like maps
    Heads<T> q_grad, k_grad, v_grad;

    template <class Visit>
    void fields(Visit& visit) {
        Attention<T>::fields(visit);
        visit("out_grad", out_grad.data);
        visit("out_grad_strides", out_grad.strides);
        visit("maps_grad", maps_grad);
        visit("q_grad", q_grad.data);
        visit("q_grad_strides", q_grad.strides);
        visit("k_grad", k_grad.data);
        visit("k_grad_strides", k_grad.strides);
        visit("v_grad", v_grad.data);
        visit("v_grad_strides", v_grad.strides);
    }
};

#define SEAL_FAST_DECLARE_CROSS_ATTENTION(ISA)                                                       \
    namespace ISA {                                                                             \
    int64_t cross_attention_workspace(const AttentionShape& shape, bool backward, int threads); \
    template <class T>                                                                          \
    void cross_attention_forward(const AttentionForward<T>& call, int threads);                 \
    template <class T>                                                                          \
    void cross_attention_backward(const AttentionBackward<T>& call, int threads);               \
    }
SEAL_FAST_FOR_EACH_ISA(SEAL_FAST_DECLARE_CROSS_ATTENTION)
#undef SEAL_FAST_DECLARE_CROSS_ATTENTION

}  // namespace seal_fast
