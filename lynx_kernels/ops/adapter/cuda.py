"""The adapter for a few tokens in the CUDA C++ of csrc/adapter: two launches, forward only.

Each byte of the weights is read from memory once, in loads of 16 bytes (one number after another where rows do not
start and end at multiples of 16 bytes), for 8 tokens at a time; further 8 tokens find them in L2. Every block computes
the statistics of its tokens while its first weights are on their way. Products are of fp32 values: what LayerNorm gives
is not rounded. No atomics: two runs agree bit by bit. x, weights, norms, biases and scale may be of any of fp32, fp16
and bf16, as under autocast.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.adapter.activations import ACTIVATIONS
from lynx_kernels.ops.adapter.call import AdapterCall

_ACTIVATIONS = tuple(ACTIVATIONS)  # in the order of csrc/adapter/activations.h
MAX_TOKENS = 64
# Up to here it runs unasked, by bytes of a weight. A weight is multiplied once for every token, in fp32, by the plain
# units of a multiprocessor. An H200 has 132 of them with 128 products a clock, 30 T a second at 1.75 GHz, and reads 4.8
# TB/s, 2.4 T weights of 2 bytes: 12 products a weight take as long as reading it. A third more instructions load,
# convert and add up, so 8 tokens fill that time. Weights of 4 bytes come half as fast. Beyond, Triton's tensor cores
# keep up. A guess, as is that this form is the faster one below: no GPU has run either.
PREFERRED_TOKENS = {2: 8, 4: 16}


def unsupported_reason(call: AdapterCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if why := dispatch.gradient_unsupported_reason("the CUDA kernels of the adapter", *call.tensors):
        return why
    if any(each is not None and each.dtype == torch.float64 for each in call.tensors):
        return "the CUDA kernels add up in fp32, and an argument is fp64"
    if 0 in call.down_weight.shape:
        return f"down_weight is empty: {tuple(call.down_weight.shape)}"
    if (tokens := _tokens(call.x)) > MAX_TOKENS:
        return f"the CUDA kernels take up to {MAX_TOKENS} tokens, x has {tokens}"
    return cuda_backend.MISSING


def not_preferred_reason(call: AdapterCall) -> str | None:
    """Why it runs only when named, or None."""
    compute, device_type = call.down_weight.dtype, call.x.device.type
    if torch.is_autocast_enabled(device_type):
        compute = torch.get_autocast_dtype(device_type)
    most, tokens = PREFERRED_TOKENS[compute.itemsize], _tokens(call.x)
    if tokens > most:
        return f"beyond {most} tokens, and x has {tokens}, plain products are taken to be slower than tensor cores"
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
