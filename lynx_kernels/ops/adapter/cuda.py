"""The adapter for small M in the CUDA C++ of csrc/adapter: two launches, forward only.

Tokens are processed 8 at a time. The first 8 read each byte of the weights from memory once; the next 8 find it in L2.
Loads are 16 bytes wide (one value each where rows do not start and end at multiples of 16 bytes). Every block computes
the statistics of its tokens while its first weights are being loaded. Products are of fp32 values: LayerNorm's output
is not rounded. No atomics: two runs agree bit by bit. x, weights, norms, biases and scale may each be fp32, fp16 or
bf16, as under autocast.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.adapter.activations import ACTIVATIONS
from lynx_kernels.ops.adapter.call import AdapterCall

_ACTIVATIONS = tuple(ACTIVATIONS)  # in the order of csrc/adapter/activations.h
MAX_TOKENS = 64
# Bytes of a weight value -> the most tokens for which it is preferred. Each weight value is multiplied once per token,
# in fp32, without tensor cores. An H200 has 132 multiprocessors with 128 products per clock: 30 T products/s at 1.75
# GHz. It reads 4.8 TB/s, or 2.4 T values/s of 2 bytes. So 12 products take as long as reading their value. Loads,
# conversions and additions take a third more instructions, so 8 tokens fill the time. Values of 4 bytes arrive at half
# the rate. With more tokens Triton's tensor cores are faster. This is an estimate: neither form has run on a GPU.
PREFERRED_TOKENS = {2: 8, 4: 16}


def unsupported_reason(call: AdapterCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if why := dispatch.gradient_unsupported_reason("the CUDA kernels of the adapter", *call.tensors):
        return why
    if any(each is not None and each.dtype == torch.float64 for each in call.tensors):
        return "the CUDA kernels accumulate in fp32, and an argument is fp64"
    if 0 in call.down_weight.shape:
        return f"down_weight is empty: {tuple(call.down_weight.shape)}"
    if (tokens := _tokens(call.x)) > MAX_TOKENS:
        return f"the CUDA kernels take at most {MAX_TOKENS} tokens, and x has {tokens}"
    return cuda_backend.MISSING


def not_preferred_reason(call: AdapterCall) -> str | None:
    """Why it runs only when named by ``impl=``, or None."""
    compute, device_type = call.down_weight.dtype, call.x.device.type
    if torch.is_autocast_enabled(device_type):
        compute = torch.get_autocast_dtype(device_type)
    most, tokens = PREFERRED_TOKENS[compute.itemsize], _tokens(call.x)
    if tokens > most:
        return f"x has {tokens} tokens, and above {most} tensor cores are expected to be faster"
    return None


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(call: AdapterCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d), mean (T,), rstd (T,) and the pre-activation (T, r)."""
    return cuda_backend.kernels().adapter_small_m(
        _with_dense_rows(call.x), _dense(call.norm_weight), _dense(call.norm_bias),
        _with_dense_rows(call.down_weight), _dense(call.down_bias),
        _with_dense_rows(call.up_weight), _dense(call.up_bias), call.scale,
        float(call.eps), _ACTIVATIONS.index(call.activation),
    )  # fmt: skip
