"""Decoding in the CUDA C++ of csrc/prefix_attention_decode, in two launches.

The first computes splits of the keys of ranges and branches. The second combines the splits.

A row is one query and one of the heads that share a key head. A tile has 1, 4 or 8 rows, depending on how many
may share a range. A range is read once per tile for the branches that read it in the same place, so the beams of one
image read it once. Launches depend on the shapes of the caches, and ranges and lengths stay on the device, so calls can
be captured into CUDA graphs. Scores, softmax
and accumulation are in fp32. No atomics: two runs agree bit by bit. The device asserts that indices are in range.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall

_MAX_DIM, _DIM_MULTIPLE = 128, 8
# The most rows sharing keys for which it is preferred. Each value is multiplied once per row, in fp32, without tensor
# cores. An H200 computes 12 products in the time it reads a value of 2 bytes (adapter/cuda.py has the numbers), and
# other instructions take a third of that time. 8 rows are a tile; more rows would read a range once per tile. With
# more rows Triton's tensor cores are faster. This is an estimate: neither form has run on a GPU.
PREFERRED_ROWS = 8


def unsupported_reason(call: DecodeCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    q, *caches = call.floats
    given = {name: getattr(call, name) for name in ("window", "chunk", "softcap", "sinks")}
    if options := [name for name, value in given.items() if value is not None]:
        return f"the CUDA kernels for decoding have no {' and no '.join(options)}"
    if why := dispatch.gradient_unsupported_reason("the CUDA kernels for decoding", q, *caches):
        return why
    if q.dtype == torch.float64:
        return "the CUDA kernels accumulate in fp32, and an argument is fp64"
    dtypes = {each.dtype for each in caches}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(q.device.type):  # autocast makes them equal
        return f"the CUDA kernels need caches of one dtype, and these are {', '.join(sorted(map(str, dtypes)))}"
    if q.shape[-1] > _MAX_DIM or q.shape[-1] % _DIM_MULTIPLE:
        return (
            f"the CUDA kernels for decoding need a head_dim that is a multiple of {_DIM_MULTIPLE}, up to {_MAX_DIM}, "
            f"and it is {q.shape[-1]}"
        )
    if (value_dim := call.shared_v.shape[-1]) != q.shape[-1]:
        return f"the CUDA kernels for decoding need values as wide as keys, and they are {value_dim} and {q.shape[-1]}"
    return cuda_backend.MISSING


def not_preferred_reason(call: DecodeCall) -> str | None:
    """Why it runs only when named by ``impl=``, or None."""
    branches, queries, heads, _ = call.q.shape
    rows = branches * queries * (heads // call.shared_k.shape[1])
    if rows > PREFERRED_ROWS:
        return (
            f"{rows} rows may share a range of keys, and above {PREFERRED_ROWS} tensor cores are expected to be faster"
        )
    return None


def _readable(cache: Tensor) -> Tensor:
    # The kernels load 16 bytes at a time. The caches of transformers and ours are aligned for this; others are copied.
    items = 16 // cache.element_size()
    in_place = all(stride % items == 0 for stride in cache.stride()[:-1]) and cache.data_ptr() % 16 == 0
    return cache if in_place and cache.stride(-1) == 1 else cache.clone(memory_format=torch.contiguous_format)


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    q = call.q
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    return cuda_backend.kernels().prefix_attention_decode(
        q.contiguous(), *map(_readable, call.caches.values()), *(each.contiguous() for each in call.indices.values()),
        float(call.scale),
    )  # fmt: skip
