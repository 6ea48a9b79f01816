// Arguments of the kernels that run on both devices. Arrays are dense and row-major; T is float or double.
//
// `fields` shows every field with the name that Python calls it by, see named_arguments.h.
#pragma once

#include <cstdint>

namespace seal_fast {

template <class T>
struct GaussianKlStats {
    const T* mu;       // [triggers, dims]
    const T* gamma;    // [triggers, dims]
    double gamma_floor;
    double* stats;     // [triggers, 3]: mean and variance of the divergence, squared norm of mu
    int64_t triggers, dims;

    template <class Visit>
    void fields(Visit& visit) {
        visit("mu", mu);
        visit("gamma", gamma);
        visit("gamma_floor", gamma_floor);
        visit("stats", stats);
        visit("triggers", triggers);
        visit("dims", dims);
    }
};

template <class T>
struct GaussianLogRatio {
    const T* x;             // [inputs, dims]
    const T* scale;         // [triggers, dims], 1 / g
    const T* shift;         // [triggers, dims], -mu / g
    const double* offset;   // [triggers], -sum log g
    double* out;            // [inputs, triggers]; on the GPU [slices, inputs, triggers], to be summed
    int64_t inputs, triggers, dims;

    template <class Visit>
    void fields(Visit& visit) {
        visit("x", x);
        visit("scale", scale);
        visit("shift", shift);
        visit("offset", offset);
        visit("out", out);
        visit("inputs", inputs);
        visit("triggers", triggers);
        visit("dims", dims);
    }
};

struct ReversedLoss {
    const float* first;        // [items, dims]
    const float* second;       // [items, dims]
    const float* difference;   // [items, dims]
    double* losses;            // [items]
    float* residual;           // [items, dims]
    int64_t items, dims;

    template <class Visit>
    void fields(Visit& visit) {
        visit("first", first);
        visit("second", second);
        visit("difference", difference);
        visit("losses", losses);
        visit("residual", residual);
        visit("items", items);
        visit("dims", dims);
    }
};

struct SamplerStep {
    const float* x;          // [items, dims]
    const float* eps;        // [items, dims]
    const float* mu;         // [dims] or null for 0
    const float* gamma;      // [dims] or null for 1
    const float* fresh;      // [items, dims] or null
    const float* previous;   // [items, dims] or null
    float* out;              // [items, dims]
    int64_t items, dims;
    double a, b, from_x, from_image, from_mu, from_fresh, from_previous;
    float limit;             // bound on |x0|

    template <class Visit>
    void fields(Visit& visit) {
        visit("x", x);
        visit("eps", eps);
        visit("mu", mu);
        visit("gamma", gamma);
        visit("fresh", fresh);
        visit("previous", previous);
        visit("out", out);
        visit("items", items);
        visit("dims", dims);
        visit("a", a);
        visit("b", b);
        visit("from_x", from_x);
        visit("from_image", from_image);
        visit("from_mu", from_mu);
        visit("from_fresh", from_fresh);
        visit("from_previous", from_previous);
        visit("limit", limit);
    }
};

// The coefficients of a step as the inner loop takes them: x0 = image x + noise n.
struct SamplerTerms {
    float image, noise, from_x, from_image, from_mu, from_fresh, from_previous;
};

}  // namespace seal_fast

namespace {

inline seal_fast::SamplerTerms terms_of(const seal_fast::SamplerStep& call) {
    return {float(1.0 / call.a),   float(-call.b / call.a),  float(call.from_x),       float(call.from_image),
            float(call.from_mu), float(call.from_fresh), float(call.from_previous)};
}

}  // namespace
