"""Checks and operator registration that the three attention operations share."""

import math
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.backends.registration import autocast_to, define


def define_attention(operation: dispatch.Operation, num_floats: int) -> Callable:
    """Register an attention operation, forward and backward. Return a function that runs the forward operator.

    Args:
        operation: its call starts with the differentiable tensors, queries first. Its backward call holds the gradients
            of both results, then both results, then all fields of the call.
        num_floats: the number of differentiable tensors. One may be None; the backward operator returns (0,) for it.

    Returns:
        A function of a call's fields and the name of the implementation; it returns the output and the LSE.
    """
    fields = operation.call._fields
    num_tensors = sum(each in (Tensor, Tensor | None) for each in get_type_hints(operation.call).values())

    def forward_fake(call: Any) -> tuple[Tensor, Tensor]:
        q, _, v = call[:3]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        return out, q.new_empty(q.shape[:-1], dtype=acc_dtype(q.dtype))

    def backward_fake(call: Any) -> tuple[Tensor, ...]:
        floats = call[4 : 4 + num_floats]
        return tuple(call.lse.new_empty(0) if each is None else each.new_empty(each.shape) for each in floats)

    def setup_context(ctx: Any, call: Any, impl: str, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *call[:num_tensors])
        ctx.options, ctx.impl = call[num_tensors:], impl
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks it
        gradients = backward(grad, grad_lse, *saved, *ctx.options, ctx.impl)
        floats = saved[2 : 2 + num_floats]
        gradients = [None if each is None else gradient for each, gradient in zip(floats, gradients, strict=True)]
        return (*gradients, *[None] * (len(fields) - num_floats))

    def autocast(dtype: torch.dtype, call: Any) -> Any:
        cast = {name: getattr(call, name) for name in fields[:num_floats] if name != "sinks"}  # sinks are scores
        return call._replace(**{name: autocast_to(each, dtype) for name, each in cast.items()})

    backward = define(
        f"{operation.name}_backward",
        operation.backward_call,
        f"({', '.join(['Tensor'] * num_floats)})",
        operation.backward,
        fake=backward_fake,
    )
    return define(
        operation.name,
        operation.call,
        "(Tensor, Tensor)",
        operation.forward,
        fake=forward_fake,
        autograd=(setup_context, autograd),
        autocast=autocast,
    )


def _fit(num_dimensions: int, q: Tensor, packed: tuple[str, ...], keys_and_values: dict[str, Tensor]) -> bool:
    """Whether everything is valid and all dtypes are equal. Takes a third of the time of the full checks."""
    shape, heads = q.shape, next(iter(keys_and_values.values())).shape[-2:]
    if type(q) not in dispatch.PLAIN_TENSORS or q.dtype not in dispatch.FLOATING or len(shape) != num_dimensions:
        return False
    for name, each in keys_and_values.items():
        if type(each) not in dispatch.PLAIN_TENSORS or each.dtype != q.dtype or each.device != q.device:
            return False
        if len(each.shape) != num_dimensions - (name in packed) or each.shape[-2:] != heads:
            return False
    return shape[-1] != 0 and heads[-1] == shape[-1] and heads[0] != 0 and shape[-2] % heads[0] == 0


def check_heads(
    operation: str,
    num_dimensions: int,
    q: Tensor,
    narrow: tuple[str, ...] = (),
    packed: tuple[str, ...] = (),
    /,
    **keys_and_values: Tensor,
) -> None:
    """Check that q (..., H, D) and every key or value (..., Hkv, D) are valid and match.

    ``narrow`` names those that may have a smaller head dimension than D, ``packed`` those with one dimension less.

    Raises:
        TypeError: a tensor is not floating point or is a DTensor, or fp64 is mixed with narrower dtypes.
        ValueError: dimensions, devices, head dimensions or numbers of heads do not match; the message names the
            argument.
    """
    if _fit(num_dimensions, q, packed, keys_and_values):
        return
    tensors = {"q": q, **keys_and_values}
    dispatch.refuse_dtensors(operation, **tensors)
    dispatch.require_floating(operation, **tensors)
    dispatch.require_same_device(operation, q.device, **keys_and_values)
    for name, tensor in keys_and_values.items():
        if (tensor.dtype == torch.float64) != (q.dtype == torch.float64):
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype} and q is {q.dtype}; fp64 cannot be mixed, use one dtype"
            )
    for name, tensor in tensors.items():
        expected = num_dimensions - (name in packed)
        if tensor.dim() != expected:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {expected} dimensions, the last two "
                "being heads and head dimension"
            )
    num_kv_heads = next(iter(keys_and_values.values())).shape[-2]
    for name, tensor in keys_and_values.items():
        if tensor.shape[-2] != num_kv_heads:
            raise ValueError(f"{operation}: {name} has {tensor.shape[-2]} heads, the other keys have {num_kv_heads}")
        if name in narrow and 0 < tensor.shape[-1] <= q.shape[-1]:
            continue
        if tensor.shape[-1] != q.shape[-1]:
            at_most = "; it may be from 1 to that" if name in narrow else ""
            raise ValueError(f"{operation}: {name} has head dimension {tensor.shape[-1]}, q has {q.shape[-1]}{at_most}")
    if q.shape[-1] == 0:
        raise ValueError(f"{operation}: q has head dimension 0")
    if num_kv_heads == 0 or q.shape[-2] % num_kv_heads != 0:
        raise ValueError(
            f"{operation}: q has {q.shape[-2]} heads, which is not a multiple of the {num_kv_heads} heads of the keys; "
            "use a number of query heads that the number of key heads divides"
        )


def check_rows(operation: str, layout: Tensor, **rows: tuple[Tensor, int]) -> None:
    """Raise ValueError unless the layout is on the tensors' device and each tensor has the expected number of rows."""
    for name, (tensor, expected) in rows.items():
        dispatch.require_same_device(operation, tensor.device, layout=layout)
        if tensor.shape[0] != expected:
            raise ValueError(f"{operation}: {name} has {tensor.shape[0]} rows, but the layout describes {expected}")


def check_scores(operation: str, q: Tensor, softcap: float | None, sinks: Tensor | None) -> None:
    """Check the options of the scores of q (..., H, D). Raises ValueError and TypeError as ``check_heads``."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{operation}: softcap is {softcap}, expected a positive number or None")
    if sinks is None:
        return
    dispatch.refuse_dtensors(operation, sinks=sinks)
    dispatch.require_floating(operation, sinks=sinks)
    dispatch.require_same_device(operation, q.device, sinks=sinks)
    if tuple(sinks.shape) != (q.shape[-2],):
        raise ValueError(f"{operation}: sinks has shape {tuple(sinks.shape)}, expected ({q.shape[-2]},), one a head")


def resolve_scale(operation: str, scale: float | None, q: Tensor) -> float:
    """``scale``, or 1 / sqrt(D) if it is None. Raises ValueError and TypeError unless it is a finite number."""
    if scale is None:
        return q.shape[-1] ** -0.5
    dispatch.require_finite(operation, scale=scale)
    return float(scale)


def triton_unsupported_reason(call: Any, max_head_dim: int = 256) -> str | None:
    """Why the Triton kernels cannot take the call, or None if they can."""
    if (head_dim := call.q.shape[-1]) > max_head_dim:
        return f"the Triton kernels support head_dim up to {max_head_dim}, and it is {head_dim}"
    return triton_backend.unsupported_reason(*call.floats)
