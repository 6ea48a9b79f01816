// From a Python dict to the arguments of a kernel: every field is filled by its name. Included by the bindings of both devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace seal_fast {

// Fills structs whose `fields` shows every field with its name (see arguments.h). The names are made into Python strings once.
template <class Call>
class NamedArguments {
public:
    explicit NamedArguments(std::string kernel) : kernel_(std::move(kernel)) {
        Call call{};
        Collector collector{names_};
        call.fields(collector);
    }

    // An array is an address, 0 if it is absent. Throws if a name is missing or is not that of a field.
    Call read(const pybind11::dict& given) const {
        Call call{};
        Reader reader{kernel_, names_, given.ptr()};
        call.fields(reader);
        if (given.size() != names_.size()) refuse_unknown(given);
        return call;
    }

private:
    using Names = std::vector<pybind11::object>;

    struct Collector {
        Names& names;

        template <class Field>
        void operator()(const char* name, Field&) {
            names.push_back(pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString(name)));
        }
    };

    struct Reader {
        const std::string& kernel;
        const Names& names;
        PyObject* given;
        std::size_t next = 0;

        template <class Field>
        void operator()(const char* name, Field& field) {
            PyObject* value = PyDict_GetItemWithError(given, names[next++].ptr());
            if (value == nullptr) throw pybind11::type_error(kernel + " lacks the argument " + name);
            convert(value, field);
            if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
        }
    };

    void refuse_unknown(const pybind11::dict& given) const {
        for (const auto& item : given) {
            bool known = false;
            for (const auto& name : names_) known = known || name.equal(item.first);
            if (!known) throw pybind11::type_error(kernel_ + " takes no argument " + pybind11::cast<std::string>(item.first));
        }
    }

    template <class T>
    static void convert(PyObject* value, T*& field) {
        field = reinterpret_cast<T*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value)));
    }
    static void convert(PyObject* value, int64_t& field) { field = PyLong_AsLongLong(value); }
    template <std::size_t kCount>
    static void convert(PyObject* value, int64_t (&field)[kCount]) {
        if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != Py_ssize_t(kCount))
            throw pybind11::type_error("strides must be a tuple of " + std::to_string(kCount));
        for (std::size_t i = 0; i < kCount; ++i) convert(PyTuple_GET_ITEM(value, Py_ssize_t(i)), field[i]);
    }
    static void convert(PyObject* value, double& field) { field = PyFloat_AsDouble(value); }
    static void convert(PyObject* value, float& field) { field = static_cast<float>(PyFloat_AsDouble(value)); }

    std::string kernel_;
    Names names_;
};

}  // namespace seal_fast
