"""Decoding in the CUDA C++ of csrc/prefix_attention_decode, in two launches.

The first goes over splits of the roots' keys and of the branches' own, the second combines them.

A root's keys are read once for as many of its branches as fill a tile of rows (queries times the heads that share a
head of keys): beams of one image read it once. A tile has 1, 4 or 8, by how many a root has on average. Launches
follow from the shapes of the caches, lengths stay on the device, so calls capture into CUDA graphs. Scores, weights and
sums are fp32 throughout. No atomics: two runs agree bit by bit. The device asserts that indices are in range.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall

_MOST_DIM, _DIM_MULTIPLE = 128, 8
# Rows that share keys, up to which it runs unasked: a number of 2 bytes is multiplied once for every row, in fp32, by
# the plain units of a multiprocessor. An H200 makes 12 such products in the time that reads it (adapter/cuda.py has the
# numbers), and other instructions need a third of that time; 8 rows are a tile, and more would read the root once for
# each 8. Beyond, Triton's tensor cores keep up. A guess, as is that this form is the faster one below: no GPU has run
# either.
PREFERRED_ROWS = 8


def unsupported_reason(call: DecodeCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    q, *caches = call.floats
    if why := dispatch.gradient_unsupported_reason("the CUDA kernels of decoding", q, *caches):
        return why
    if q.dtype == torch.float64:
        return "the CUDA kernels add up in fp32, and an argument is fp64"
    dtypes = {each.dtype for each in caches}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(q.device.type):  # which makes them one
        return f"the CUDA kernels take caches of one dtype, these are {', '.join(sorted(map(str, dtypes)))}"
    if q.shape[-1] > _MOST_DIM or q.shape[-1] % _DIM_MULTIPLE:
        return (
            f"the CUDA kernels of decoding take a head_dim that is a multiple of {_DIM_MULTIPLE}, up to {_MOST_DIM}, "
            f"and it is {q.shape[-1]}"
        )
    return cuda_backend.MISSING


def not_preferred_reason(call: DecodeCall) -> str | None:
    """Why it runs only when named, or None."""
    branches, queries, heads, _ = call.q.shape
    rows = -(-branches // max(1, call.root_k.shape[0])) * queries * (heads // call.root_k.shape[2])
    if rows > PREFERRED_ROWS:
        return (
            f"where more than {PREFERRED_ROWS} rows share a root's keys, here {rows}, plain products are taken to be "
            "slower than tensor cores"
        )
    return None


def _readable(cache: Tensor) -> Tensor:
    # Rows of 16-byte loads; caches as transformers and we keep them have such rows, others are copied.
    items = 16 // cache.element_size()
    in_place = all(stride % items == 0 for stride in cache.stride()[:3]) and cache.data_ptr() % 16 == 0
    return cache if in_place and cache.stride(3) == 1 else cache.clone(memory_format=torch.contiguous_format)


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    q = call.q
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    return cuda_backend.kernels().prefix_attention_decode(
        q.contiguous(), *map(_readable, call.caches.values()), *(each.contiguous() for each in call.indices.values()),
        float(call.scale),
    )  # fmt: skip
