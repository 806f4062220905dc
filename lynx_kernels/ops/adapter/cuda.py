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

_ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")  # in the order of lynx::Activation
FEW_TOKENS = 64
# Up to here it runs unasked, by bytes of a weight. A weight is multiplied once for every token, in fp32, by the plain
# units of a multiprocessor. An H200 has 132 of them with 128 products a clock, 30 T a second at 1.75 GHz, and reads 4.8
# TB/s, 2.4 T weights of 2 bytes: 12 products a weight take as long as reading it. A third more instructions load,
# convert and add up, so 8 tokens fill that time. Weights of 4 bytes come half as fast. Beyond, Triton's tensor cores
# keep up. A guess, as is that this form is the faster one below: no GPU has run either.
PREFERRED_TOKENS = {2: 8, 4: 16}


def unsupported_reason(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, down_weight: Tensor, *rest
) -> str | None:
    """Why this implementation cannot run the call, or None. Builds the kernels where that is all that lacks."""
    tensors = (x, norm_weight, norm_bias, down_weight, *rest)
    if why := cuda_backend.device_unsupported_reason(x) or dispatch.gradient_unsupported_reason(
        "the CUDA kernels of the adapter", *tensors
    ):
        return why
    if any(each is not None and each.dtype == torch.float64 for each in tensors):
        return "the CUDA kernels add up in fp32, and an argument is fp64"
    if 0 in down_weight.shape:
        return f"down_weight is empty: {tuple(down_weight.shape)}"
    if _tokens(x) > FEW_TOKENS:
        return f"the CUDA kernels take up to {FEW_TOKENS} tokens, x has {_tokens(x)}"
    return cuda_backend.library_missing_reason()


def not_preferred_reason(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, down_weight: Tensor, *rest
) -> str | None:
    """Why it runs only when named, or None."""
    compute, device_type = down_weight.dtype, x.device.type
    if torch.is_autocast_enabled(device_type):
        compute = torch.get_autocast_dtype(device_type)
    most = PREFERRED_TOKENS[compute.itemsize]
    if _tokens(x) > most:
        return f"beyond {most} tokens, and x has {_tokens(x)}, plain products are taken to be slower than tensor cores"
    return None


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor,  # (T, d)
    norm_weight: Tensor | None,  # (d,)
    norm_bias: Tensor | None,  # (d,)
    down_weight: Tensor,  # (r, d)
    down_bias: Tensor | None,  # (r,)
    up_weight: Tensor,  # (d, r)
    up_bias: Tensor | None,  # (d,)
    scale: Tensor,  # one element
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d), mean (T,), rstd (T,) and the pre-activation (T, r)."""
    return cuda_backend.kernels().adapter_few(
        _with_dense_rows(x), _dense(norm_weight), _dense(norm_bias), _with_dense_rows(down_weight), _dense(down_bias),
        _with_dense_rows(up_weight), _dense(up_bias), scale, float(eps), _ACTIVATIONS.index(activation),
    )  # fmt: skip
