"""The adapter on CPUs: PyTorch's own fused operators, put together as measured best; few tokens forward in C++.

The C++ of csrc/adapter reads each weight once, as fast as memory is. Elsewhere LayerNorm is ATen's kernel, the products
are oneDNN's, and the up-projection adds bias and residual before it writes: with scale * (a Wu^T + bu) = (scale * a)
Wu^T + scale * bu the scale costs a pass over the bottleneck, not over the full width. Backward recomputes the LayerNorm
and the activation, both cheap beside a product. The gradient of the scale is sum(grad * (a Wu^T)) = sum((grad Wu) * a).
Contracts as in reference.py, whose products run in the dtype of the weights too. Shapes: T tokens, width d, bottleneck
r.

The oneDNN call can also apply the activation, which would save the inference path a pass. Measured (Zen 4, d=1024,
r=512, T=64, 512, 2048) that is 1.01, 1.00, 1.00 times as fast in fp32 and 1.07, 1.01, 1.01 in bf16: no second operator
for that.
"""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels import host
from lynx_kernels.adapter.activations import ACTIVATION_GRADIENTS, ACTIVATIONS

# Asked once: torch.compile cannot trace the questions.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_BF16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_DTYPES = (torch.float32, torch.bfloat16)
# Preparing a oneDNN call costs about 10 us. On Zen 4 in fp32, F.linear takes 0.3-0.9 of oneDNN's time below both bounds
# (d=1024, r=64, T=1: 0.3-0.4) and 1.1-3.9 above either; in bf16 it calls oneDNN itself and never wins.
_FEW_TOKENS = 64
_SMALL_WEIGHT = 2**17
# LayerNorm's own backward sums the gradients of its weight n and bias m up in the dtype of x: quick, but in bf16 they
# were seen to be wrong by a fifth over 8192 tokens. Beyond so many tokens the sums are left to products: with
# G = dh^T s, s the standardised input and dh the gradient of the pre-activation, dWd = G * n + (sum dh) m^T,
# dn = colsum(G * Wd), dm = (sum dh) Wd. That takes passes over the weights, as long as 512 tokens where r = 512.
_SUMMED_TOKENS = 256

# Up to here the C++ form wins. On Zen 4 with two threads and cold weights, d=1024, r=512, T = 1, 16, 64, eager takes
# 1.9, 2.7, 1.25 times its time in fp32 and 2.1, 1.7, 1.05 times in bf16; the form below 0.8-1.1 times everywhere.
_COMPILED_TOKENS = 64

_T = TypeVar("_T", Tensor, Tensor | None)


def refusal(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, down_weight: Tensor, *rest) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if x.device.type != "cpu":
        return f"runs on CPUs, x is on {x.device}"
    if not _HAS_ONEDNN:
        return "this PyTorch is built without oneDNN's fused linear"
    if 0 in down_weight.shape:
        return f"down_weight is empty: {tuple(down_weight.shape)}"
    compute = down_weight.dtype
    if torch.is_autocast_enabled("cpu") and compute != torch.float64:
        compute = torch.get_autocast_dtype("cpu")
    for name, dtype in (("x", x.dtype), ("the products", compute)):
        if dtype not in _DTYPES:
            return f"computes in fp32 and bf16, {name} would be {dtype}"
    if compute == torch.bfloat16 and not _HAS_BF16:
        return "oneDNN has no bf16 on this processor"
    return None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32 and x.shape[0] < _FEW_TOKENS and weight.numel() <= _SMALL_WEIGHT:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, summand: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")


def _cast(tensor: _T, dtype: torch.dtype) -> _T:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # asking first spares 1 us


def forward(
    x: Tensor,  # (T, d)
    norm_weight: Tensor | None,  # (d,)
    norm_bias: Tensor | None,  # (d,)
    down_weight: Tensor,  # (r, d)
    down_bias: Tensor | None,  # (r,)
    up_weight: Tensor,  # (d, r)
    up_bias: Tensor | None,  # (d,)
    scale: Tensor,  # ()
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d) and what backward needs: mean (T,), rstd (T,) and the pre-activation (T, r)."""
    compute = down_weight.dtype
    is_few = x.shape[0] <= _COMPILED_TOKENS
    if is_few and host.module is not None and down_weight.is_contiguous() and up_weight.is_contiguous():
        return _compiled_forward(
            x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation
        )
    stream = _cast(x, torch.promote_types(x.dtype, compute)).contiguous()
    scale = scale.reshape(())  # without dimensions it multiplies a tensor of any dtype unrounded
    if norm_weight is None:
        normalized, mean, rstd = stream, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    else:
        # Its weights in fp32 make LayerNorm keep its statistics in fp32.
        normalized, mean, rstd = torch.native_layer_norm(
            stream, stream.shape[1:], _cast(norm_weight, torch.float32), _cast(norm_bias, torch.float32), eps
        )  # (T, d), (T, 1), (T, 1)
    up_bias = _cast(up_bias, compute)
    preactivation = _linear(_cast(normalized, compute), down_weight, _cast(down_bias, compute))  # (T, r)
    activated = ACTIVATIONS[activation](preactivation)  # (T, r)
    if stream.dtype == compute and x.shape[0] >= _FEW_TOKENS:
        up_bias = None if up_bias is None else scale * up_bias
        out = _linear_add(activated.mul_(scale), up_weight, up_bias, stream)
    else:  # few tokens: one pass over the output is quicker than the two small operations before the product
        up = _cast(_linear(activated, up_weight, up_bias), stream.dtype)  # (T, d)
        out = torch.addcmul(stream, up, scale, out=up)
    return _cast(out, x.dtype), mean.view(-1), rstd.view(-1), preactivation


def _numbers(tensor: Tensor | None) -> tuple[int, bool]:
    """A contiguous tensor as the compiled module takes it."""
    return (0, False) if tensor is None else (tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def _readable(tensor: _T) -> _T:
    """As the compiled module can read it."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)).contiguous()


def _compiled_forward(
    x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """forward in C++; the weights are contiguous."""
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    statistics = 0 if norm_weight is None else tokens
    mean, rstd = x.new_empty(statistics, dtype=torch.float32), x.new_empty(statistics, dtype=torch.float32)
    out, preactivation = x.new_empty(tokens, width), down_weight.new_empty(tokens, bottleneck)
    # The list keeps copies alive while their addresses are in use.
    readable = [
        _readable(each) for each in (x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale)
    ]
    host.module.adapter_forward(
        (tokens, width, bottleneck), eps, activation, *map(_numbers, readable),
        _numbers(out), mean.data_ptr(), rstd.data_ptr(), _numbers(preactivation), torch.get_num_threads(),
    )  # fmt: skip
    return out, mean, rstd, preactivation


def backward(
    grad: Tensor,  # (T, d)
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    preactivation: Tensor,  # (T, r)
    activation: str,
    needs: list[bool],  # which of the eight tensor arguments of forward want a gradient
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in the order of forward's arguments; the rest is not computed."""
    needs_x, needs_norm, needs_norm_bias, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale = needs
    needs_preactivation = needs_x or needs_norm or needs_norm_bias or needs_down or needs_down_bias
    compute = down_weight.dtype
    stream = x.to(torch.promote_types(x.dtype, compute)).contiguous()
    grad = grad.to(stream.dtype).contiguous()
    grad_compute, factor = grad.to(compute), scale.reshape(())
    gradients: dict[str, Tensor] = {}
    if needs_up_bias or (needs_scale and up_bias is not None):
        grad_sum = grad.sum(0)  # (d,), like every sum added up in fp32
    if needs_up_bias:
        gradients["up_bias"] = factor * grad_sum
    if needs_scale or needs_up:
        activated = ACTIVATIONS[activation](preactivation)  # (T, r)
    if needs_scale or needs_preactivation:
        grad_activated = _linear(grad_compute, up_weight.t())  # (T, r), the scale not yet in it
    if needs_scale:
        gradients["scale"] = (grad_activated.float() * activated).sum().reshape(scale.shape)
        if up_bias is not None:
            gradients["scale"] += grad_sum.float() @ up_bias.float()
    if needs_up:
        gradients["up_weight"] = grad_compute.t() @ activated.mul_(factor)
    if needs_preactivation:
        grad_preactivation = ACTIVATION_GRADIENTS[activation](grad_activated.mul_(factor), preactivation)  # (T, r)
    if needs_down_bias or needs_down or needs_norm_bias:
        grad_preactivation_sum = grad_preactivation.sum(0).float()  # (r,)
    if needs_down_bias:
        gradients["down_bias"] = grad_preactivation_sum
    by_products = norm_weight is not None and x.shape[0] > _SUMMED_TOKENS
    sums_norm, sums_norm_bias = needs_norm and not by_products, needs_norm_bias and not by_products
    if needs_down or (needs_norm and by_products):
        affine = (None, None) if by_products else (norm_weight, norm_bias)
        normalized = _normalize(stream, mean, rstd, *affine).to(compute)  # (T, d)
        gradients["down_weight"] = grad_preactivation.t() @ normalized  # (r, d)
    if by_products and norm_weight is not None:
        if needs_norm:
            gradients["norm_weight"] = (gradients["down_weight"] * down_weight).sum(0, dtype=torch.float32)
        if needs_norm_bias:
            gradients["norm_bias"] = grad_preactivation_sum @ down_weight.float()
        if needs_down:
            gradients["down_weight"] = gradients["down_weight"] * norm_weight.float()
            if norm_bias is not None:
                gradients["down_weight"].addr_(grad_preactivation_sum, norm_bias.float())
    if needs_x or sums_norm or sums_norm_bias:
        grad_normalized = _linear(grad_preactivation, down_weight.t()).to(stream.dtype)  # (T, d)
        if norm_weight is not None:
            grad_normalized, grad_norm, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad_normalized, stream, stream.shape[1:], mean[:, None], rstd[:, None],
                _cast(norm_weight, torch.float32), _cast(norm_bias, torch.float32),
                [needs_x, sums_norm, sums_norm_bias],
            )  # fmt: skip
            gradients = {"norm_weight": grad_norm, "norm_bias": grad_norm_bias} | gradients
        if needs_x:
            gradients["x"] = grad_normalized.add_(grad)
    inputs = {
        "x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "down_weight": down_weight,
        "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias, "scale": scale,
    }  # fmt: skip
    return [
        gradients[name].to(tensor.dtype)
        for (name, tensor), needed in zip(inputs.items(), needs, strict=True)
        if needed and tensor is not None
    ]


def _normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if mean.numel() == 0:  # there is no LayerNorm
        return x
    normalized = (x - mean[:, None]).mul_(rstd[:, None])
    if weight is not None:
        normalized.mul_(weight)
    return normalized if bias is None else normalized.add_(bias)
