// What the bindings of all operations share. Only bindings know Python. They take addresses and strides instead of
// tensors. The modules of lynx_kernels that call them have checked shapes, dtypes and devices.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace lynx {

template <class Number>
Number* pointer(uintptr_t address) {
    return reinterpret_cast<Number*>(address);
}

// Each adds an operation's functions to the module. They stand in the operation's folder.
void bind_adapter(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_embeddings(pybind11::module_& module);
void bind_frames(pybind11::module_& module);

}  // namespace lynx
