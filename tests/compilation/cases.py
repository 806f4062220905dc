"""What is compiled without a GPU: every launch that an operation ships, at the sizes it ships it for.

An operation contributes a function that drives its launchers on meta tensors, and its cases to ``CASES``. Tests and
docs/kernels.md take them from here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lynx_kernels.adapter import triton as adapter_launchers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """Launches of one operation: ``launch()`` makes them on meta tensors."""

    operation: str
    shape: str
    dtype: str
    launch: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.operation} {self.shape}, {self.dtype}"


def adapter(tokens, stream, weights=None, *, width=4096, bottleneck=2048, activation="silu"):
    """The adapter and all its gradients; ``weights`` is their dtype where it is not that of the stream."""

    def meta(*shape, dtype=weights or stream):
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = [
        meta(tokens, width, dtype=stream), meta(width), meta(width), meta(bottleneck, width), meta(bottleneck),
        meta(width, bottleneck), meta(width), meta(dtype=FP32),
    ]  # fmt: skip
    out, *saved = adapter_launchers.forward(*inputs, 1e-5, activation)
    gradients = adapter_launchers.backward(out, *inputs, *saved, activation, [True] * 8)
    assert [each.shape for each in gradients] == [each.shape for each in inputs]
    assert [each.dtype for each in gradients] == [each.dtype for each in inputs]


def _adapter_case(tokens, bottleneck, dtype, stream, weights=None):
    launch = partial(adapter, tokens, stream, weights, bottleneck=bottleneck)
    return Case("adapter", f"T={tokens} d=4096 r={bottleneck}", dtype, launch)


CASES = [
    *(_adapter_case(tokens, 2048, "bf16", BF16) for tokens in (8192, 512, 64)),
    *(_adapter_case(8192, bottleneck, "bf16", BF16) for bottleneck in (256, 64)),
    _adapter_case(8192, 2048, "fp16", FP16),
    _adapter_case(8192, 2048, "fp32", FP32),
    _adapter_case(8192, 2048, "fp32 through bf16", FP32, BF16),  # autocast: the stream stays wide
    _adapter_case(8192, 2048, "bf16 through fp32", BF16, FP32),  # trainable weights wider than the stream
]
