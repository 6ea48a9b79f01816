// Python face of the CPU kernels: arguments by name in, nothing owned, nothing allocated. Shapes are checked by the caller
// (seal_fast.ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cross_attention.h"
#include "cpu/gaussian.h"
#include "cpu/group_norm_silu.h"
#include "cpu/isa.h"
#include "cpu/reversed_loss.h"
#include "cpu/sampler_step.h"
#include "cpu/winograd_convolution.h"
#include "named_arguments.h"

namespace py = pybind11;
using namespace py::literals;
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

// A kernel of all instruction set levels as one function, for `define`.
#define SEAL_KERNEL(function) \
    [](const auto& call, int threads, int isa) { SEAL_SELECT(isa, function)(call, threads); }

template <class Call, class Kernel>
void define(py::module_& m, const std::string& name, Kernel kernel) {
    const NamedArguments<Call> named(name);
    const auto run = [named, kernel](const py::dict& arguments, int threads, int isa) {
        const Call call = named.read(arguments);
        checked(isa);
        const py::gil_scoped_release unlocked;
        kernel(call, threads, isa);
    };
    m.def(name.c_str(), run, "arguments"_a, "threads"_a, "isa"_a = static_cast<int>(best_isa()));
}

template <class T>
void define_gaussian(py::module_& m, const std::string& suffix) {
    define<GaussianKlStats<T>>(m, "gaussian_kl_stats_" + suffix, SEAL_KERNEL(gaussian_kl_stats<T>));
    define<GaussianLogRatio<T>>(m, "gaussian_log_ratio_" + suffix, SEAL_KERNEL(gaussian_log_ratio<T>));
}

template <class T>
void define_cross_attention(py::module_& m, const std::string& suffix) {
    define<AttentionForward<T>>(m, "cross_attention_forward_" + suffix, SEAL_KERNEL(cross_attention_forward<T>));
    define<AttentionBackward<T>>(m, "cross_attention_backward_" + suffix, SEAL_KERNEL(cross_attention_backward<T>));
}

template <class T>
void define_group_norm_silu(py::module_& m, const std::string& suffix) {
    define<GroupNormSiluForward<T>>(m, "group_norm_silu_" + suffix, SEAL_KERNEL(group_norm_silu<T>));
    define<GroupNormSiluBackward<T>>(m, "group_norm_silu_backward_" + suffix, SEAL_KERNEL(group_norm_silu_backward<T>));
}

template <class T>
void define_winograd_convolution(py::module_& m, const std::string& suffix) {
    define<WinogradConvolution<T>>(m, "winograd_convolution_" + suffix, SEAL_KERNEL(winograd_convolution<T>));
}

void define_attention_workspace(py::module_& m) {
    const char* name = "cross_attention_workspace";
    const auto floats = [named = NamedArguments<AttentionShape>(name)](const py::dict& shape, bool backward, int threads) {
        return baseline::cross_attention_workspace(named.read(shape), backward, threads);
    };
    m.def(name, floats, "Floats that the workspace must hold.", "shape"_a, "backward"_a, "threads"_a);
}

int64_t winograd_workspace(int64_t channels, int64_t filters, int threads) {
    return baseline::winograd_workspace(channels, filters, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of seal-fast; called through seal_fast.ops";
    m.def("isa_levels", &isa_levels, "Instruction set levels this processor runs, slowest first; kernels take an index into it.");
    define_attention_workspace(m);
    m.def("winograd_workspace", &winograd_workspace, "Floats that the workspace must hold.", "channels"_a, "filters"_a,
          "threads"_a);
    define_gaussian<float>(m, "f32");
    define_gaussian<double>(m, "f64");
    define_cross_attention<float>(m, "f32");
    define_cross_attention<Bfloat16>(m, "bf16");
    define_cross_attention<Float16>(m, "f16");
    define_group_norm_silu<float>(m, "f32");
    define_group_norm_silu<Bfloat16>(m, "bf16");
    define_winograd_convolution<float>(m, "f32");
    define_winograd_convolution<Bfloat16>(m, "bf16");
    define<ReversedLoss>(m, "reversed_loss", SEAL_KERNEL(reversed_loss));
    define<SamplerStep>(m, "sampler_step", SEAL_KERNEL(sampler_step));
}
