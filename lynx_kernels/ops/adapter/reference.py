"""The reference implementation of the adapter, in plain PyTorch.

    y = x + scale * (act(LayerNorm(x) Wd^T + bd) Wu^T + bu)

Products run in the dtype of the weights. Statistics and the residual sum are in fp32 (fp64 for fp64 inputs). The output
has the dtype of x. Shapes: T tokens, width d, bottleneck r.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.adapter.activations import ACTIVATION_GRADIENTS, ACTIVATIONS
from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def forward(call: AdapterCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d) and what backward needs: mean (T,), rstd (T,) and the pre-activation (T, r)."""
    x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation = call
    compute = down_weight.dtype
    x_acc = x.to(acc_dtype(x.dtype))
    mean, rstd = _statistics(x_acc, eps, norm_weight is not None)
    normalized = _normalize(x_acc, mean, rstd, norm_weight, norm_bias).to(compute)  # (T, d)
    preactivation = F.linear(normalized, down_weight, _cast(down_bias, compute))  # (T, r)
    up = F.linear(ACTIVATIONS[activation](preactivation), up_weight, _cast(up_bias, compute))  # (T, d)
    out = x_acc + scale.to(x_acc.dtype) * up.to(x_acc.dtype)
    return out.to(x.dtype).contiguous(), mean, rstd, preactivation


def _statistics(x: Tensor, eps: float, has_norm: bool) -> tuple[Tensor, Tensor]:
    if not has_norm:
        return x.new_empty(0), x.new_empty(0)
    mean = x.mean(-1)  # (T,)
    mean = mean + (x - mean[:, None]).mean(-1)  # where |mean| >> std, the first mean is not exact enough
    variance = (x - mean[:, None]).square().mean(-1)  # E[x^2] - mean^2 would cancel where |mean| >> std
    return mean, torch.rsqrt(variance + eps)


def _normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    normalized = (x - mean[:, None]) * rstd[:, None] * weight.to(x.dtype)
    return normalized if bias is None else normalized + bias.to(x.dtype)


def backward(call: AdapterBackwardCall) -> list[Tensor]:
    """Return the gradients listed in ``needs``, in order. The others are not computed."""
    grad, x, norm_weight, norm_bias, down_weight, _, up_weight, up_bias, scale = call[:9]
    mean, rstd, preactivation = call.mean, call.rstd, call.preactivation
    needs_x, needs_norm, needs_norm_bias, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale = call.needs
    compute = down_weight.dtype
    x = x.to(acc_dtype(x.dtype))
    grad = grad.to(x.dtype)
    activated = ACTIVATIONS[call.activation](preactivation)  # (T, r)
    grad_up = (scale.to(grad.dtype) * grad).to(compute)  # (T, d), the gradient of the up-projection's output
    grad_preactivation = ACTIVATION_GRADIENTS[call.activation](grad_up @ up_weight, preactivation)  # (T, r)
    gradients = {}
    if needs_scale:
        up = F.linear(activated, up_weight, _cast(up_bias, compute))
        gradients["scale"] = (grad * up.to(grad.dtype)).sum().reshape(scale.shape)
    if needs_up:
        gradients["up_weight"] = grad_up.t() @ activated
    if needs_up_bias:
        gradients["up_bias"] = grad_up.to(grad.dtype).sum(0)
    if needs_down:
        normalized = _normalize(x, mean, rstd, norm_weight, norm_bias).to(compute)
        gradients["down_weight"] = grad_preactivation.t() @ normalized
    if needs_down_bias:
        gradients["down_bias"] = grad_preactivation.to(grad.dtype).sum(0)
    if needs_x or needs_norm or needs_norm_bias:
        grad_normalized = (grad_preactivation @ down_weight).to(grad.dtype)  # (T, d)
        if norm_weight is None:
            gradients["x"] = grad + grad_normalized
        else:
            standardized = (x - mean[:, None]) * rstd[:, None]  # (T, d)
            if needs_norm:
                gradients["norm_weight"] = (grad_normalized * standardized).sum(0)
            if needs_norm_bias:
                gradients["norm_bias"] = grad_normalized.sum(0)
            if needs_x:
                grad_standardized = grad_normalized * norm_weight.to(grad.dtype)
                along = (grad_standardized * standardized).mean(-1, keepdim=True)
                centred = grad_standardized - grad_standardized.mean(-1, keepdim=True) - standardized * along
                gradients["x"] = grad + rstd[:, None] * centred
    return call.wanted(gradients)
