// What the bindings of all operations share. Bindings are all that knows Python. They know no tensors, only their
// addresses and strides; the modules in lynx_kernels that call them check shapes, dtypes and devices.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace lynx {

template <class Number>
Number* pointer(uintptr_t address) {
    return reinterpret_cast<Number*>(address);
}

// Each adds an operation's functions to the module; they stand in the operation's folder.
void bind_adapter(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_embeddings(pybind11::module_& module);
void bind_frames(pybind11::module_& module);

}  // namespace lynx
