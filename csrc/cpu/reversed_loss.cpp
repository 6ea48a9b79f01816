// reversed_loss: residual = difference - (first - second), losses[item] = 1/2 sum residual^2. Each item is summed in order, a
// chunk in float lanes and chunks in double, so a loss does not depend on the number of threads.
#include "reversed_loss.h"

#include "chunks.h"
#include "simd.h"

namespace {

// Fills `residual` and returns the sum of its squares.
double chunk(const float* first, const float* second, const float* difference, float* residual, int64_t length) {
    Vec<float> squares = {};
    int64_t i = 0;
    for (; i + kLanes<float> <= length; i += kLanes<float>) {
        const Vec<float> r = load(difference + i) - (load(first + i) - load(second + i));
        store(residual + i, r);
        squares += r * r;
    }
    double sum = sum_lanes<float>(squares);
    for (; i < length; ++i) {
        const float r = difference[i] - (first[i] - second[i]);
        residual[i] = r;
        sum += double(r) * double(r);
    }
    return sum;
}

}  // namespace

namespace seal_fast {
namespace SEAL_ISA {

void reversed_loss(const ReversedLoss& call, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (call.items * call.dims > kWorthThreads)
    for (int64_t item = 0; item < call.items; ++item) {
        double sum = 0;
        for (int64_t start = 0; start < call.dims; start += kChunk) {
            const int64_t at = item * call.dims + start, left = call.dims - start;
            sum += chunk(call.first + at, call.second + at, call.difference + at, call.residual + at, left < kChunk ? left : kChunk);
        }
        call.losses[item] = sum / 2;
    }
}

}  // namespace SEAL_ISA
}  // namespace seal_fast
