// Python face of the GPU kernels: arguments by name and a stream in; a failed launch raises RuntimeError.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/gaussian.h"
#include "cuda/reversed_loss.h"
#include "cuda/sampler_step.h"
#include "named_arguments.h"

namespace py = pybind11;
using namespace py::literals;
using namespace seal_fast;

namespace {

void check(cudaError_t code, const std::string& step) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(step + " failed: CUDA error " + std::to_string(code) + ", " + cudaGetErrorString(code));
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

template <class Call>
void define(py::module_& m, const std::string& name, cudaError_t (*kernel)(const Call&, cudaStream_t)) {
    const NamedArguments<Call> named(name);
    const auto run = [name, named, kernel](const py::dict& arguments, int device, uintptr_t stream) {
        const Call call = named.read(arguments);
        const py::gil_scoped_release unlocked;
        const DeviceGuard guard(device);
        check(kernel(call, reinterpret_cast<cudaStream_t>(stream)), "launching " + name);
    };
    m.def(name.c_str(), run, "arguments"_a, "device"_a, "stream"_a);
}

template <class T>
void define_gaussian(py::module_& m, const std::string& suffix) {
    define<GaussianKlStats<T>>(m, "gaussian_kl_stats_" + suffix, &gaussian_kl_stats<T>);
    define<GaussianLogRatio<T>>(m, "gaussian_log_ratio_" + suffix, &gaussian_log_ratio<T>);
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
    m.doc() = "GPU kernels of seal-fast; called through seal_fast.ops";
    m.def("gaussian_log_ratio_slices", &gaussian_log_ratio_slices, "inputs"_a, "dims"_a);
    define_gaussian<float>(m, "f32");
    define_gaussian<double>(m, "f64");
    define<ReversedLoss>(m, "reversed_loss", &reversed_loss);
    define<SamplerStep>(m, "sampler_step", &sampler_step);
}
