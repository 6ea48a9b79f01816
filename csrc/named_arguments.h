// From a Python dict to the arguments of a kernel: every field is filled by its name. Included by the bindings of both devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace seal_fast {

// Visits the fields of a struct (see arguments.h) and reads each from the dict. An array is an address, 0 if it is absent.
class NamedArguments {
public:
    NamedArguments(const std::string& kernel, const pybind11::dict& given) : kernel_(kernel), given_(given) {
        names_.reserve(given.size());
    }

    template <class Field>
    void operator()(const char* name, Field& field) {
        PyObject* value = PyDict_GetItemString(given_.ptr(), name);
        if (value == nullptr) throw pybind11::type_error(kernel_ + " lacks the argument " + name);
        read(value, field);
        if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
        names_.push_back(name);
    }

    // Throws if the dict holds a name that no field has.
    void check_all_read() const {
        if (names_.size() == given_.size()) return;
        for (const auto& item : given_) {
            const auto given = pybind11::cast<std::string>(item.first);
            bool known = false;
            for (const char* name : names_) known = known || given == name;
            if (!known) throw pybind11::type_error(kernel_ + " takes no argument " + given);
        }
    }

private:
    template <class T>
    static void read(PyObject* value, T*& field) {
        field = reinterpret_cast<T*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value)));
    }
    static void read(PyObject* value, int64_t& field) { field = PyLong_AsLongLong(value); }
    static void read(PyObject* value, double& field) { field = PyFloat_AsDouble(value); }
    static void read(PyObject* value, float& field) { field = static_cast<float>(PyFloat_AsDouble(value)); }

    const std::string& kernel_;
    const pybind11::dict& given_;
    std::vector<const char*> names_;
};

template <class Call>
Call named_arguments(const std::string& kernel, const pybind11::dict& given) {
    Call call{};
    NamedArguments arguments(kernel, given);
    call.fields(arguments);
    arguments.check_all_read();
    return call;
}

}  // namespace seal_fast
