// Python face of the CPU kernels: addresses in, nothing owned, nothing allocated. Shapes are checked by the caller (seal_fast.ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "addresses.h"
#include "cpu/cross_attention.h"
#include "cpu/gaussian.h"
#include "cpu/group_norm_silu.h"
#include "cpu/isa.h"
#include "cpu/reversed_loss.h"
#include "cpu/sampler_step.h"
#include "cpu/winograd_convolution.h"

namespace py = pybind11;
using namespace seal_fast;

namespace {

int checked(int isa) {
    if (isa < kBaseline || isa > best_isa())
        throw std::invalid_argument("this processor has no instruction set level " + std::to_string(isa));
    return isa;
}

std::vector<std::string> isa_levels() {
    const std::vector<std::string> names = {"baseline", "avx2", "avx512", "avx512bf16"};
    return {names.begin(), names.begin() + best_isa() + 1};
}

template <class T>
void kl_stats(uintptr_t mu, uintptr_t gamma, double gamma_floor, uintptr_t stats, int64_t triggers, int64_t dims, int threads,
              int isa) {
    SEAL_SELECT(checked(isa), gaussian_kl_stats<T>)
    (at<T>(mu), at<T>(gamma), gamma_floor, at<double>(stats), triggers, dims, threads);
}

template <class T>
void log_ratio(uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t offset, uintptr_t out, int64_t rows, int64_t triggers,
               int64_t dims, int threads, int isa) {
    SEAL_SELECT(checked(isa), gaussian_log_ratio<T>)
    (at<T>(x), at<T>(scale), at<T>(shift), at<double>(offset), at<double>(out), rows, triggers, dims, threads);
}

template <class T>
void define(py::module_& m, const std::string& suffix) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    const int best = best_isa();
    m.def(("gaussian_kl_stats_" + suffix).c_str(), &kl_stats<T>, unlocked, "mu"_a, "gamma"_a, "gamma_floor"_a, "stats"_a,
          "triggers"_a, "dims"_a, "threads"_a, "isa"_a = best);
    m.def(("gaussian_log_ratio_" + suffix).c_str(), &log_ratio<T>, unlocked, "x"_a, "scale"_a, "shift"_a, "offset"_a, "out"_a,
          "rows"_a, "triggers"_a, "dims"_a, "threads"_a, "isa"_a = best);
}

// Address and the strides of batch, head and row, all in one tuple; 0 for a tensor that is absent.
using HeadsTuple = std::array<int64_t, 4>;
// batches, heads, queries, keys, dims, tokens
using ShapeTuple = std::array<int64_t, 6>;

template <class T>
Heads<T> heads(const HeadsTuple& x) {
    return {at<T>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]};
}

AttentionShape attention_shape(const ShapeTuple& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

int64_t attention_workspace(const ShapeTuple& shape, bool backward, int threads) {
    return baseline::cross_attention_workspace(attention_shape(shape), backward, threads);
}

template <class T>
void attention_forward(const ShapeTuple& shape, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, uintptr_t tokens,
                       double scale, const HeadsTuple& out, uintptr_t maps, uintptr_t workspace, int threads, int isa) {
    const AttentionForward<T> call{attention_shape(shape), heads<const T>(q),  heads<const T>(k), heads<const T>(v),
                                   at<const int64_t>(tokens), scale, heads<T>(out), at<float>(maps)};
    SEAL_SELECT(checked(isa), cross_attention_forward<T>)(call, at<float>(workspace), threads);
}

template <class T>
void attention_backward(const ShapeTuple& shape, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, uintptr_t tokens,
                        double scale, const HeadsTuple& out_grad, uintptr_t maps_grad, const HeadsTuple& q_grad,
                        const HeadsTuple& k_grad, const HeadsTuple& v_grad, uintptr_t workspace, int threads, int isa) {
    const AttentionBackward<T> call{attention_shape(shape), heads<const T>(q), heads<const T>(k), heads<const T>(v),
                                    at<const int64_t>(tokens), scale, heads<const T>(out_grad), at<const float>(maps_grad),
                                    heads<T>(q_grad), heads<T>(k_grad), heads<T>(v_grad)};
    SEAL_SELECT(checked(isa), cross_attention_backward<T>)(call, at<float>(workspace), threads);
}

template <class T>
void define_cross_attention(py::module_& m, const std::string& suffix) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    const int best = best_isa();
    m.def(("cross_attention_forward_" + suffix).c_str(), &attention_forward<T>, unlocked, "shape"_a, "q"_a, "k"_a, "v"_a,
          "tokens"_a, "scale"_a, "out"_a, "maps"_a, "workspace"_a, "threads"_a, "isa"_a = best);
    m.def(("cross_attention_backward_" + suffix).c_str(), &attention_backward<T>, unlocked, "shape"_a, "q"_a, "k"_a, "v"_a,
          "tokens"_a, "scale"_a, "out_grad"_a, "maps_grad"_a, "q_grad"_a, "k_grad"_a, "v_grad"_a, "workspace"_a, "threads"_a,
          "isa"_a = best);
}

// x, shift, weight, bias, stats, workspace; shift may be 0
using NormAddresses = std::array<uintptr_t, 6>;
// images, pixels, channels, groups
using NormSizes = std::array<int64_t, 4>;

template <class T>
GroupNormSilu<T> norm_arguments(const NormAddresses& a, const NormSizes& s) {
    return {at<T>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]), at<float>(a[5]), s[0], s[1], s[2], s[3]};
}

template <class T>
void norm_forward(const NormAddresses& addresses, const NormSizes& sizes, double eps, uintptr_t out, int threads, int isa) {
    SEAL_SELECT(checked(isa), group_norm_silu<T>)(norm_arguments<T>(addresses, sizes), eps, at<T>(out), threads);
}

template <class T>
void norm_backward(const NormAddresses& addresses, const NormSizes& sizes, uintptr_t grad, uintptr_t x_grad, int threads, int isa) {
    SEAL_SELECT(checked(isa), group_norm_silu_backward<T>)
    (norm_arguments<T>(addresses, sizes), at<const T>(grad), at<T>(x_grad), threads);
}

template <class T>
void define_group_norm_silu(py::module_& m, const std::string& suffix) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    const int best = best_isa();
    m.def(("group_norm_silu_" + suffix).c_str(), &norm_forward<T>, unlocked, "addresses"_a, "sizes"_a, "eps"_a, "out"_a,
          "threads"_a, "isa"_a = best);
    m.def(("group_norm_silu_backward_" + suffix).c_str(), &norm_backward<T>, unlocked, "addresses"_a, "sizes"_a, "grad"_a,
          "x_grad"_a, "threads"_a, "isa"_a = best);
}

// x, weight, bias, out, workspace; bias may be 0
using ConvolutionAddresses = std::array<uintptr_t, 5>;
// images, height, width, channels, filters
using ConvolutionSizes = std::array<int64_t, 5>;

int64_t convolution_workspace(int64_t channels, int64_t filters, int threads) {
    return baseline::winograd_workspace(channels, filters, threads);
}

template <class T>
void convolution(const ConvolutionAddresses& a, const ConvolutionSizes& s, int threads, int isa) {
    const WinogradConvolution<T> call{at<const T>(a[0]), at<const float>(a[1]), at<const float>(a[2]), at<T>(a[3]),
                                      at<float>(a[4]),   s[0],                  s[1],                  s[2],
                                      s[3],              s[4]};
    SEAL_SELECT(checked(isa), winograd_convolution<T>)(call, threads);
}

template <class T>
void define_winograd_convolution(py::module_& m, const std::string& suffix) {
    using namespace py::literals;
    m.def(("winograd_convolution_" + suffix).c_str(), &convolution<T>, py::call_guard<py::gil_scoped_release>(), "addresses"_a,
          "sizes"_a, "threads"_a, "isa"_a = int(best_isa()));
}

void step(const StepAddresses& addresses, const StepSizes& sizes, double limit, int threads, int isa) {
    SEAL_SELECT(checked(isa), sampler_step)(sampler_step_arguments(addresses, sizes, limit), threads);
}

void loss(const LossAddresses& addresses, int64_t rows, int64_t dims, int threads, int isa) {
    SEAL_SELECT(checked(isa), reversed_loss)(reversed_loss_arguments(addresses, rows, dims), threads);
}

void define_reversion(py::module_& m) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    const int best = best_isa();
    m.def("sampler_step", &step, unlocked, "addresses"_a, "sizes"_a, "limit"_a, "threads"_a, "isa"_a = best);
    m.def("reversed_loss", &loss, unlocked, "addresses"_a, "rows"_a, "dims"_a, "threads"_a, "isa"_a = best);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of seal-fast; called through seal_fast.ops";
    m.def("isa_levels", &isa_levels, "Instruction set levels this processor runs, slowest first; kernels take an index into it.");
    define<float>(m, "f32");
    define<double>(m, "f64");
    m.def("cross_attention_workspace", &attention_workspace, "Floats that both directions' workspace must hold.");
    define_cross_attention<float>(m, "f32");
    define_cross_attention<Bfloat16>(m, "bf16");
    define_cross_attention<Float16>(m, "f16");
    define_group_norm_silu<float>(m, "f32");
    define_group_norm_silu<Bfloat16>(m, "bf16");
    m.def("winograd_workspace", &convolution_workspace, "Floats that the workspace must hold.");
    define_winograd_convolution<float>(m, "f32");
    define_winograd_convolution<Bfloat16>(m, "bf16");
    define_reversion(m);
}
