"""What both layouts share: moving between devices, and checks that do not wait for a device."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Self

import torch
from torch import Tensor


class Layout:
    """Moves a layout between devices: every tensor of it."""

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}  # type: ignore[arg-type]
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same layout with its tensors on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same layout in pinned memory, for an asynchronous copy."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError if the 0-dim ``condition`` is false. On a GPU, and when compiled, assert asynchronously."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def check_size(what: str, num_tokens: int) -> None:
    """Raise ValueError if int32 offsets cannot reach so many tokens."""
    if num_tokens >= 2**31:
        raise ValueError(f"{what} have {num_tokens} tokens in total, too many for int32 offsets; build smaller batches")


def segment_of_tokens(starts: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: the segment of each token, given the segments' first tokens, ascending, closed by ``num_tokens``."""
    token = torch.arange(num_tokens, dtype=starts.dtype, device=starts.device)
    # The last segment that starts at or before the token. Empty segments with the same start come before it.
    return torch.searchsorted(starts.contiguous(), token, right=True) - 1
