// Python face of the GPU kernels: addresses and a stream in; a failed launch raises RuntimeError.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "addresses.h"
#include "cuda/gaussian.h"
#include "cuda/reversed_loss.h"
#include "cuda/sampler_step.h"

namespace py = pybind11;
using namespace seal_fast;

namespace {

cudaStream_t stream_at(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

void check(cudaError_t code, const char* kernel) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(std::string(kernel) + " did not launch: CUDA error " + std::to_string(code) + ", " +
                             cudaGetErrorString(code));
}

// cudart is linked in statically, so it does not see torch's choice of device: make the one that owns the arrays current.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "reading the current device");
        if (device != before_) check(cudaSetDevice(device), "choosing a device");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }

private:
    int before_ = 0;
};

template <class T>
void kl_stats(uintptr_t mu, uintptr_t gamma, double gamma_floor, uintptr_t stats, int64_t triggers, int64_t dims, int device,
              uintptr_t stream) {
    const DeviceGuard guard(device);
    check(gaussian_kl_stats<T>(at<T>(mu), at<T>(gamma), gamma_floor, at<double>(stats), triggers, dims, stream_at(stream)),
          "gaussian_kl_stats");
}

template <class T>
void log_ratio(uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t offset, uintptr_t out, int64_t rows, int64_t triggers,
               int64_t dims, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    check(gaussian_log_ratio<T>(at<T>(x), at<T>(scale), at<T>(shift), at<double>(offset), at<double>(out), rows, triggers, dims,
                                stream_at(stream)),
          "gaussian_log_ratio");
}

template <class T>
void define(py::module_& m, const std::string& suffix) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def(("gaussian_kl_stats_" + suffix).c_str(), &kl_stats<T>, unlocked, "mu"_a, "gamma"_a, "gamma_floor"_a, "stats"_a,
          "triggers"_a, "dims"_a, "device"_a, "stream"_a);
    m.def(("gaussian_log_ratio_" + suffix).c_str(), &log_ratio<T>, unlocked, "x"_a, "scale"_a, "shift"_a, "offset"_a, "out"_a,
          "rows"_a, "triggers"_a, "dims"_a, "device"_a, "stream"_a);
}

void step(const StepAddresses& addresses, const StepSizes& sizes, double limit, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    check(sampler_step(sampler_step_arguments(addresses, sizes, limit), stream_at(stream)), "sampler_step");
}

void loss(const LossAddresses& addresses, int64_t rows, int64_t dims, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    check(reversed_loss(reversed_loss_arguments(addresses, rows, dims), stream_at(stream)), "reversed_loss");
}

void define_reversion(py::module_& m) {
    using namespace py::literals;
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("sampler_step", &step, unlocked, "addresses"_a, "sizes"_a, "limit"_a, "device"_a, "stream"_a);
    m.def("reversed_loss", &loss, unlocked, "addresses"_a, "rows"_a, "dims"_a, "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
    m.doc() = "GPU kernels of seal-fast; called through seal_fast.ops";
    m.def("gaussian_log_ratio_slices", &gaussian_log_ratio_slices, py::arg("rows"), py::arg("triggers"), py::arg("dims"));
    define<float>(m, "f32");
    define<double>(m, "f64");
    define_reversion(m);
}
