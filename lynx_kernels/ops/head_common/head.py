"""The call that both operations make of their arguments, and its logits.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

T rows, width d, vocabulary V, N entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype


class HeadCall(NamedTuple):
    """Entry i scores ``labels[i]`` with the logits of row ``predictors[i]``."""

    operation: str  # its name, for errors
    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    labels: Tensor  # (N,) int64
    predictors: Tensor | None = None  # (N,) int64 or int32; None: N = T, and row i predicts labels[i]
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    max_supervised: int | None = None  # upper bound of the number of counted entries

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.hidden.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the factors of every product. A bias is added afterwards, so only fp64 widens the product."""
        dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        return torch.float64 if self.bias is not None and self.bias.dtype == torch.float64 else dtype

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of logits, losses and sums."""
        return acc_dtype(self.compute_dtype)

    @property
    def factor(self) -> float:
        """The factor of the logits without a soft cap, and of their derivative with one."""
        return self.logit_scale / self.temperature


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with the result in at least fp32. Both factors have one dtype, which may be narrower."""
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(acc_dtype(left.dtype)) @ right.to(acc_dtype(right.dtype))


def logits_of(call: HeadCall, products: Tensor) -> Tensor:
    """The logits (n, V), given hidden W^T, which may be overwritten. Without options these are the logits."""
    if call.bias is None and call.softcap is None and call.factor == 1:
        return products
    logits = products.to(call.acc_dtype)
    if call.bias is not None:
        logits.add_(call.bias)
    if call.softcap is None:
        return logits.mul_(call.factor)
    return logits.mul_(call.logit_scale / call.softcap).tanh_().mul_(call.softcap / call.temperature)


def times_slope_(grad: Tensor, call: HeadCall, logits: Tensor) -> Tensor:
    """Multiply the gradient of the logits (n, V) by their derivative, but for ``call.factor``. Overwrites logits."""
    if call.softcap is None:
        return grad
    return grad.mul_(logits.mul_(call.temperature / call.softcap).square_().neg_().add_(1))
