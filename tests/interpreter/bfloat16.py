"""bf16 for Triton's interpreter, which stores it as 16-bit integers and then adds and multiplies these integers.

Here a bf16 value is a float32 that bf16 can represent, so every product is exact. The interpreter wraps every new
result; there it is rounded to nearest even, as on a GPU. Only loads, stores and bitcasts see 16 bits.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_NAN = np.uint32(0x7FC00000)


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest float32 values that bf16 can represent, ties to even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    bits = np.where(np.isnan(values), _NAN, bits)  # otherwise a NaN with only low bits would become infinity
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)


def _is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.view(np.uint32) >> 16).astype(np.uint16), tl.uint16)


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.bfloat16)


def install(monkeypatch):
    """Interpret bf16 until ``monkeypatch`` is undone."""
    builder = interpreter.InterpreterBuilder
    fits, numpy_dtype = interpreter._validate_np_data_size, interpreter._get_np_dtype
    made = TensorHandle.__post_init__

    def round_when_made(self):
        if _is_bf16(self.dtype) and self.data.dtype.kind == "f":  # excludes the booleans of a comparison
            self.data = rounded(self.data)
        made(self)

    monkeypatch.setattr(TensorHandle, "__post_init__", round_when_made)
    monkeypatch.setattr(interpreter, "_validate_np_data_size", lambda data, dtype: _is_bf16(dtype) or fits(data, dtype))
    monkeypatch.setattr(
        interpreter, "_get_np_dtype", lambda dtype: np.dtype(np.float32) if _is_bf16(dtype) else numpy_dtype(dtype)
    )

    load, store, bitcast = builder.create_masked_load, builder.create_masked_store, builder.create_bitcast
    cast = builder.cast_impl

    def as_uint16(pointers):
        return TensorHandle(pointers.data, tl.pointer_type(tl.uint16))

    def load_bf16(self, pointers, mask, other, *rest):
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *rest)
        return _widen(load(self, as_uint16(pointers), mask, other if other is None else _narrow(other), *rest))

    def store_bf16(self, pointers, value, mask, *rest):
        if pointers.get_element_ty() != tl.bfloat16:
            return store(self, pointers, value, mask, *rest)
        return store(self, as_uint16(pointers), _narrow(value), mask, *rest)

    def cast_bf16(self, value, dtype):
        if not (_is_bf16(value.dtype) or _is_bf16(dtype)):
            return cast(self, value, dtype)
        return TensorHandle(value.data.astype(interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)

    def bitcast_bf16(self, value, dtype):
        value = _narrow(value) if _is_bf16(value.dtype) else value
        return _widen(bitcast(self, value, tl.uint16)) if _is_bf16(dtype) else bitcast(self, value, dtype)

    def bf16_constant(self, value):
        return TensorHandle(np.array([value], dtype=np.float32), tl.bfloat16)

    monkeypatch.setattr(builder, "create_masked_load", load_bf16)
    monkeypatch.setattr(builder, "create_masked_store", store_bf16)
    monkeypatch.setattr(builder, "cast_impl", cast_bf16)
    monkeypatch.setattr(builder, "create_bitcast", bitcast_bf16)
    monkeypatch.setattr(builder, "get_bf16", bf16_constant, raising=False)
    for name in ("create_atomic_rmw", "create_atomic_cas", "create_fp_to_fp"):
        monkeypatch.setattr(builder, name, _rejecting(name, getattr(builder, name)))


def _rejecting(name, operation):
    def reject_bf16(self, *args):
        types = [each.get_element_ty() if isinstance(each, TensorHandle) else each for each in args]
        if any(_is_bf16(each) for each in types if isinstance(each, tl.dtype)):
            raise NotImplementedError(f"{name} of bf16 is not interpreted")
        return operation(self, *args)

    return reject_bf16
