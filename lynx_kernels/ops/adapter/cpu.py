"""The adapter on CPUs: PyTorch's fused operators, in the combination measured fastest. Small M runs forward in C++.

The C++ of csrc/adapter (small M forward, LayerNorm backward) reads each weight once, at memory bandwidth, and computes
LayerNorm's backward in one pass. Otherwise LayerNorm is ATen's kernel and the products are oneDNN's. The up-projection
adds bias and residual before it writes: with scale * (a Wu^T + bu) = (scale * a) Wu^T + scale * bu, the scale costs one
pass over the bottleneck instead of one over the full width. Backward recomputes LayerNorm's output and the activation,
both cheap compared with a product. The gradient of the scale is sum(grad * (a Wu^T)) = sum((grad Wu) * a). Dtypes are
as in reference.py: products run in the dtype of the weights. Shapes: T tokens, width d, bottleneck r.

oneDNN can also fuse the activation, which would save one pass at inference. Measured on Zen 4 with d=1024, r=512,
T=64, 512, 2048, this is 1.01, 1.00, 1.00 times as fast in fp32 and 1.07, 1.01, 1.01 times in bf16. That is too little
for a second operator.
"""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends import onednn
from lynx_kernels.ops.adapter.activations import ACTIVATION_GRADIENTS, ACTIVATIONS
from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall

_DTYPES = (torch.float32, torch.bfloat16)
# Below this many tokens, fp32 products with a small weight use PyTorch's matmul (backends/onednn.py: SMALL_WEIGHT).
_SMALL_M = 64

# The C++ form runs up to this many tokens, because it is fastest there. Measured on Zen 4, two threads, cold weights,
# d=1024, r=512, T = 1, 16, 64: eager takes 1.9, 2.7, 1.25 times its time in fp32 and 2.1, 1.7, 1.05 times in bf16. The
# form below takes 0.8-1.1 times the time of eager.
_COMPILED_TOKENS = 64

_T = TypeVar("_T", Tensor, Tensor | None)


def unsupported_reason(call: AdapterCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if not onednn.HAS_LINEAR:
        return "this PyTorch is built without oneDNN's fused linear"
    if 0 in call.down_weight.shape:
        return f"down_weight is empty: {tuple(call.down_weight.shape)}"
    compute = call.down_weight.dtype
    if torch.is_autocast_enabled("cpu") and compute != torch.float64:
        compute = torch.get_autocast_dtype("cpu")
    for name, dtype in (("x", call.x.dtype), ("the products", compute)):
        if dtype not in _DTYPES:
            return f"it computes in fp32 and bf16, and {name} would be {dtype}"
    if compute == torch.bfloat16 and not onednn.HAS_BF16:
        return "oneDNN does not support bf16 on this CPU"
    return None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32 and x.shape[0] < _SMALL_M and weight.numel() <= onednn.SMALL_WEIGHT:
        return F.linear(x, weight, bias)
    return onednn.linear(x, weight, bias)


def _cast(tensor: _T, dtype: torch.dtype) -> _T:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # this check saves 1 us


def forward(call: AdapterCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d) and what backward needs: mean (T,), rstd (T,) and the pre-activation (T, r)."""
    x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation = call
    compute = down_weight.dtype
    is_small_m = x.shape[0] <= _COMPILED_TOKENS
    if is_small_m and cpu_backend.module is not None and down_weight.is_contiguous() and up_weight.is_contiguous():
        return _compiled_forward(call)
    stream = _cast(x, torch.promote_types(x.dtype, compute)).contiguous()
    scale = scale.reshape(())  # a 0-dim tensor multiplies any dtype without being rounded to it
    if norm_weight is None:
        normalized, mean, rstd = stream, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    else:
        # With fp32 weights ATen keeps LayerNorm's statistics in fp32.
        normalized, mean, rstd = torch.native_layer_norm(
            stream, stream.shape[1:], _cast(norm_weight, torch.float32), _cast(norm_bias, torch.float32), eps
        )  # (T, d), (T, 1), (T, 1)
    up_bias = _cast(up_bias, compute)
    preactivation = _linear(_cast(normalized, compute), down_weight, _cast(down_bias, compute))  # (T, r)
    activated = ACTIVATIONS[activation](preactivation)  # (T, r)
    if stream.dtype == compute and x.shape[0] >= _SMALL_M:
        up_bias = None if up_bias is None else scale * up_bias
        out = onednn.linear_add(activated.mul_(scale), up_weight, up_bias, stream)
    else:  # small M: one pass over the output is faster than two small operations before the product
        up = _cast(_linear(activated, up_weight, up_bias), stream.dtype)  # (T, d)
        out = torch.addcmul(stream, up, scale, out=up)
    return _cast(out, x.dtype), mean.view(-1), rstd.view(-1), preactivation


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _numbers(tensor: Tensor | None) -> tuple[int, bool]:
    """Address of a contiguous tensor, and whether it is bf16: the form that the compiled module takes."""
    return (0, False) if tensor is None else (tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def _readable(tensor: _T) -> _T:
    """A contiguous tensor in fp32 or bf16, which the compiled module can read."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)).contiguous()


def _compiled_forward(call: AdapterCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward`` in C++. The weights must be contiguous."""
    x, down_weight = call.x, call.down_weight
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    statistics = 0 if call.norm_weight is None else tokens
    mean, rstd = x.new_empty(statistics, dtype=torch.float32), x.new_empty(statistics, dtype=torch.float32)
    out, preactivation = x.new_empty(tokens, width), down_weight.new_empty(tokens, bottleneck)
    # The list keeps the copies alive while their addresses are in use.
    readable = [_readable(each) for each in call.tensors]
    cpu_backend.module.adapter_forward(
        (tokens, width, bottleneck), call.eps, call.activation, *map(_numbers, readable),
        _numbers(out), mean.data_ptr(), rstd.data_ptr(), _numbers(preactivation), torch.get_num_threads(),
    )  # fmt: skip
    return out, mean, rstd, preactivation


def backward(call: AdapterBackwardCall) -> list[Tensor]:
    """Return the gradients listed in ``needs``, in order. The others are not computed."""
    grad, x, norm_weight, norm_bias, down_weight, _, up_weight, up_bias, scale = call[:9]
    mean, rstd, preactivation, activation = call.mean, call.rstd, call.preactivation, call.activation
    needs_x, needs_norm, needs_norm_bias, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale = call.needs
    needs_preactivation = needs_x or needs_norm or needs_norm_bias or needs_down or needs_down_bias
    compute = down_weight.dtype
    stream = x.to(torch.promote_types(x.dtype, compute)).contiguous()
    grad = grad.to(stream.dtype).contiguous()
    grad_compute, factor = grad.to(compute), scale.reshape(())
    gradients: dict[str, Tensor] = {}
    if needs_up_bias or (needs_scale and up_bias is not None):
        grad_sum = grad.sum(0)  # (d,), accumulated in fp32 like every sum
    if needs_up_bias:
        gradients["up_bias"] = factor * grad_sum
    if needs_scale or needs_up:
        activated = ACTIVATIONS[activation](preactivation)  # (T, r)
    if needs_scale or needs_preactivation:
        grad_activated = _linear(grad_compute, up_weight.t())  # (T, r), not yet scaled
    if needs_scale:
        gradients["scale"] = (grad_activated.float() * activated).sum().reshape(scale.shape)
        if up_bias is not None:
            gradients["scale"] += grad_sum.float() @ up_bias.float()
    if needs_up:
        gradients["up_weight"] = grad_compute.t() @ activated.mul_(factor)
    if needs_preactivation:
        grad_preactivation = ACTIVATION_GRADIENTS[activation](grad_activated.mul_(factor), preactivation)  # (T, r)
    if needs_down_bias:
        gradients["down_bias"] = grad_preactivation.sum(0)
    if needs_down:
        normalized = stream if norm_weight is None else _normalize(stream, mean, rstd, norm_weight, norm_bias, compute)
        gradients["down_weight"] = grad_preactivation.t() @ _cast(normalized, compute)  # (r, d)
    if needs_x or needs_norm or needs_norm_bias:
        grad_normalized = _linear(grad_preactivation, down_weight.t())  # (T, d)
        if norm_weight is None:
            gradients["x"] = grad_normalized.to(stream.dtype).add_(grad)
        else:
            needs_norms = (needs_x, needs_norm, needs_norm_bias)
            gradients |= _norm_backward(grad_normalized, grad, stream, mean, rstd, norm_weight, norm_bias, needs_norms)
    return call.wanted(gradients)


def _normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Recompute LayerNorm's output (T, d)."""
    if cpu_backend.module is None:
        normalized = (x - mean[:, None]).mul_(rstd[:, None]).mul_(weight)
        return (normalized if bias is None else normalized.add_(bias)).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    floats = [None if each is None else each.float().contiguous() for each in (mean, rstd, weight, bias)]
    cpu_backend.module.adapter_renormalize(
        *x.shape, _numbers(x), *map(_address, floats), _numbers(out), torch.get_num_threads()
    )
    return out


def _norm_backward(
    grad_normalized: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None,
    needs: tuple[bool, ...],
) -> dict[str, Tensor]:  # fmt: skip
    """LayerNorm's gradients of x, weight and bias, as listed in ``needs``. That of x includes the residual's gradient.

    ATen's backward accumulates the gradients of weight and bias in the dtype of x. In bf16 over 8192 tokens they were
    seen to be wrong by a fifth. It also takes two more passes.
    """
    if cpu_backend.module is None:
        grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
            grad_normalized.float(), x.float(), x.shape[1:], mean[:, None], rstd[:, None], weight.float(),
            None if bias is None else bias.float(), list(needs),
        )  # fmt: skip
        found = (grad_x + grad if needs[0] else None, *grads)
    else:
        grad_x = torch.empty_like(x) if needs[0] else None
        grads = [weight.new_empty(x.shape[1], dtype=torch.float32) if needed else None for needed in needs[1:]]
        floats = [each.float().contiguous() for each in (mean, rstd, weight)]
        cpu_backend.module.adapter_norm_backward(
            *x.shape, _numbers(x), *map(_address, floats), _numbers(grad_normalized), _numbers(grad), _numbers(grad_x),
            *map(_address, grads), torch.get_num_threads(),
        )  # fmt: skip
        found = (grad_x, *grads)
    return dict(zip(("x", "norm_weight", "norm_bias"), found, strict=True))
