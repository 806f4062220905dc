"""The arguments of the adapter's operators and implementations. T tokens, width d, bottleneck r."""

from typing import NamedTuple

import torch
from torch import Tensor


class AdapterCall(NamedTuple):
    """The forward call. Omitted tensors are None."""

    x: Tensor  # (T, d); from the public function (..., d)
    norm_weight: Tensor | None  # (d,); None: no LayerNorm
    norm_bias: Tensor | None  # (d,)
    down_weight: Tensor  # (r, d)
    down_bias: Tensor | None  # (r,)
    up_weight: Tensor  # (d, r)
    up_bias: Tensor | None  # (d,)
    scale: Tensor  # one element
    eps: float
    activation: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in order."""
        return self[:8]

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.x.device


class AdapterBackwardCall(NamedTuple):
    """The backward call: the gradient of the output, the inputs, and what forward saved."""

    grad: Tensor  # (T, d)
    x: Tensor  # (T, d)
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    scale: Tensor
    mean: Tensor  # (T,), empty without a LayerNorm
    rstd: Tensor  # (T,)
    preactivation: Tensor  # (T, r)
    activation: str
    needs: list[bool]  # which of forward's eight tensors need a gradient

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Forward's eight tensors, in order."""
        return self[1:9]

    def wanted(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Select the gradients listed in ``needs``, in order, each in the dtype of its input."""
        return [
            gradients[name].to(tensor.dtype).contiguous()
            for name, tensor, needed in zip(self._fields[1:9], self.inputs, self.needs, strict=True)
            if needed and tensor is not None
        ]
