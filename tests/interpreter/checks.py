"""Checks for faults that the interpreter does not notice, and that may or may not show on a GPU.

- An access outside the tensors given to the launch.
- Two programs that store to one address. On a GPU the last one wins, and the order is undefined.
- Operands of a product with a side under 16, which do not compile.
- Sums of half-precision values, which a GPU rounds to half precision at every step.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Launch:
    """The memory that one launch may access, and the addresses its programs have stored to."""

    def __init__(self, arguments):
        self.extents = sorted({_extent(each) for each in arguments if hasattr(each, "data_ptr") and each.numel()})
        self.stored: dict[tuple, list[np.ndarray]] = {}
        self.patched: set[int] = set()

    def check_bounds(self, addresses, size, what, program):
        if addresses.size == 0:
            return
        first, last = addresses.min(), addresses.max() + size
        if any(start <= first and last <= end for start, end in self.extents):  # the common case, and much faster
            return
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in self.extents:
            inside |= (addresses >= start) & (addresses + size <= end)
        if not inside.all():
            raise IndexError(
                f"{what} of program {program}: {int((~inside).sum())} of {inside.size} lanes out of bounds"
            )

    def check_races(self):
        # One program may store to an address twice. Two programs must not.
        stores = [np.unique(np.concatenate(each)) for each in self.stored.values()]
        addresses = np.concatenate(stores) if stores else np.empty(0)
        shared = len(addresses) - len(np.unique(addresses))
        if shared:
            raise RuntimeError(f"{shared} addresses are stored to by more than one program")


def _extent(tensor):
    """The addresses from the first to the last element. For a view, this is not all of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def install(monkeypatch):
    """Check every launch until ``monkeypatch`` is undone."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[_Launch] = []

    run = executor.__call__

    def checked_run(self, *args, **kwargs):
        launches.append(_Launch([*args, *kwargs.values()]))
        run(self, *args, **kwargs)
        launches.pop().check_races()

    monkeypatch.setattr(executor, "__call__", checked_run)

    patch_lang = interpreter._patch_lang

    def patch_lang_once(function):
        # Every call of a function inside a kernel patches triton.language again, which takes a third of the time.
        module = id(function.__globals__)
        if module in launches[-1].patched:
            return None
        launches[-1].patched.add(module)
        return patch_lang(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang_once)

    def active(pointers, mask):
        return np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel().astype(np.uint64)

    def check(builder_self, pointers, mask, what):
        addresses = active(pointers, mask)
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        launches[-1].check_bounds(addresses, size, what, builder_self.grid_idx)
        return addresses

    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, dot = builder.create_atomic_rmw, builder.create_dot

    def checked_load(self, pointers, mask, *rest):
        check(self, pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        addresses = check(self, pointers, mask, "store")
        launches[-1].stored.setdefault(tuple(self.grid_idx), []).append(addresses)
        return store(self, pointers, value, mask, *rest)

    def checked_rmw(self, operation, pointers, value, mask, *rest):
        check(self, pointers, mask, "atomic")
        return rmw(self, operation, pointers, value, mask, *rest)

    def checked_dot(self, left, right, *rest):
        sides = (*left.data.shape[-2:], right.data.shape[-1])
        if min(sides) < 16:
            raise ValueError(f"a product of sides {sides}: each must be at least 16")
        return dot(self, left, right, *rest)

    def checked(add):
        def checked_sum(self, values):
            if values.dtype in (tl.float16, tl.bfloat16):
                raise TypeError(f"a sum of {values.dtype} values: convert them to fp32 first")
            return add(self, values)

        return checked_sum

    monkeypatch.setattr(interpreter.ReduceOps, "sum", checked(interpreter.ReduceOps.sum))
    monkeypatch.setattr(interpreter.ScanOps, "cumsum", checked(interpreter.ScanOps.cumsum))
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", checked_rmw)
    monkeypatch.setattr(builder, "create_dot", checked_dot)
