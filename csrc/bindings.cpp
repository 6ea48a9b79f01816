// Python face of the CPU kernels: addresses in, nothing owned, nothing allocated. Shapes are checked by the caller (seal_fast.ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gaussian.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace seal_fast;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int checked(int isa) {
    if (isa < kBaseline || isa > best_isa())
        throw std::invalid_argument("this processor has no instruction set level " + std::to_string(isa));
    return isa;
}

std::vector<std::string> isa_levels() {
    const std::vector<std::string> names = {"baseline", "avx2", "avx512"};
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

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of seal-fast; called through seal_fast.ops";
    m.def("isa_levels", &isa_levels, "Instruction set levels this processor runs, slowest first; kernels take an index into it.");
    define<float>(m, "f32");
    define<double>(m, "f64");
}
