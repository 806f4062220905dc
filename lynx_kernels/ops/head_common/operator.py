"""Checks and parts of the registration that linear_cross_entropy and token_log_probs share."""

import math
from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.registration import autocast_to
from lynx_kernels.ops.head_common.head import HeadCall

# Scores a chunk in one kernel. Triton is imported when it first runs.
triton_score = triton_backend.lazy("lynx_kernels.ops.head_common.triton", "score")


def triton_unsupported_reason(call: Any) -> str | None:
    """Why "triton" cannot run the call, or None."""
    return triton_backend.unsupported_reason(call.hidden, call.weight, call.bias)


def check(call: HeadCall) -> None:
    """Raise TypeError or ValueError for an argument that is invalid on the face of it. No value of a tensor is read."""
    operation, hidden, weight, labels, predictors, bias = call[:6]
    tensors = {"hidden": hidden, "weight": weight, "labels": labels, "predictors": predictors, "bias": bias}
    dispatch.refuse_dtensors(operation, **tensors)
    dispatch.require_floating(operation, hidden=hidden, weight=weight, bias=bias)
    dispatch.require_same_device(operation, hidden.device, **tensors)
    if labels.dtype != torch.int64:
        raise TypeError(f"{operation}: labels is {labels.dtype}, expected torch.int64")
    if predictors is not None and predictors.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{operation}: predictors is {predictors.dtype}, expected torch.int64 or torch.int32")
    if hidden.dim() != 2:
        raise ValueError(f"{operation}: hidden has shape {tuple(hidden.shape)}, expected (T, d)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{operation}: weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[1]}), as wide as hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{operation}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), one number per row of "
            "weight"
        )
    check_entries(operation, labels=labels, predictors=predictors)
    if predictors is None and labels.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{operation}: labels has shape {tuple(labels.shape)}, expected ({hidden.shape[0]},), one label per row of "
            "hidden; pass predictors to say which row predicts which label"
        )
    for name, value, is_positive in (
        ("softcap", call.softcap, True),
        ("logit_scale", call.logit_scale, False),
        ("temperature", call.temperature, True),
    ):
        expected = "a finite number above 0" if is_positive else "a finite number"
        if value is None and name == "softcap":
            continue
        if not isinstance(value, int | float):
            raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected {expected}")
        if not -math.inf < value < math.inf or (is_positive and value <= 0):  # isfinite cannot be compiled
            raise ValueError(f"{operation}: {name}={value}, expected {expected}")


def check_entries(operation: str, labels: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are (N,) like labels."""
    if labels.dim() != 1:
        raise ValueError(f"{operation}: labels has shape {tuple(labels.shape)}, expected (N,)")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != labels.shape:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {tuple(labels.shape)} like labels"
            )


def needs_of(call: Any) -> list[bool]:
    """Which of hidden, weight and bias need a gradient."""
    inputs = call.hidden, call.weight, call.bias
    return [torch.is_grad_enabled() and each is not None and each.requires_grad for each in inputs]


def autocast(dtype: torch.dtype, call: Any) -> Any:
    """The call in an autocast region: the factors of the products are cast, the bias is added in fp32."""
    return call._replace(hidden=autocast_to(call.hidden, dtype), weight=autocast_to(call.weight, dtype))


def backward_fake(call: Any) -> list[Tensor]:
    """The gradients of hidden, weight and bias listed in ``needs``, without values."""
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each, needed in zip((call.hidden, call.weight, call.bias), call.needs, strict=True)
        if each is not None and needed
    ]
