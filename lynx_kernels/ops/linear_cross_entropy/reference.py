"""The reference of linear_cross_entropy, in plain PyTorch.

    loss[i] = weights[i] * cross_entropy(logits[i], labels[i]) where entry i is counted, else 0

Logits are defined in ``ops/head_common/reference.py``. Shapes: T rows, N entries, width d, vocabulary V.
"""

from torch import Tensor

from lynx_kernels.ops.head_common import reference
from lynx_kernels.ops.linear_cross_entropy.call import (
    LinearCrossEntropyBackwardCall,
    LinearCrossEntropyCall,
    head_call,
    weighted,
)


def forward(call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of each entry (N,), and no gradients."""
    losses, _ = reference.forward(head_call(call))
    hidden, weight, bias = (call.hidden.new_zeros(0) for _ in range(3))
    return weighted(losses, call.weights), hidden, weight, bias


def backward(call: LinearCrossEntropyBackwardCall) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias listed in ``needs``. The others are not computed."""
    return reference.backward(head_call(call), call.factors, call.needs)
