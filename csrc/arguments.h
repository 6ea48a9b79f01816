// Arguments of the ops of reversion, the same on every device. Arrays are dense and row-major. Those of triggers and ladders have
// fewer rows than `rows`, a divisor of it: each of theirs serves consecutive rows.
#pragma once

#include <cstdint>

namespace seal_fast {

struct ReversedLoss {
    const float* first;        // [rows, dims]
    const float* second;       // [rows, dims]
    const float* difference;   // [rows, dims]
    double* losses;            // [rows]
    float* residual;           // [rows, dims]
    int64_t rows, dims;
};

struct SamplerStep {
    const float* x;               // [rows, dims]
    const float* eps;             // [rows, dims]
    const float* mu;              // [triggers, dims] or null for 0
    const float* gamma;           // [triggers, dims] or null for 1
    const float* fresh;           // [rows, dims] or null
    const float* previous;        // [rows, dims] or null
    const double* coefficients;   // [ladders, 7]: a, b, from_x, from_image, from_mu, from_fresh, from_previous
    float* out;                   // [rows, dims]
    int64_t rows, dims;
    int64_t triggers, ladders;
    float limit;                  // bound on |x0|
};

constexpr int kStepCoefficients = 7;

}  // namespace seal_fast
