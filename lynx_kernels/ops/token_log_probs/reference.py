"""The reference of token_log_probs, in plain PyTorch.

    log_prob[i] = log_softmax(logits[i])[labels[i]] where entry i is counted, else 0

Logits are defined in ``ops/head_common/reference.py``. Shapes: T rows, N entries, width d, vocabulary V.
"""

import torch
from torch import Tensor

from lynx_kernels.ops.head_common import reference
from lynx_kernels.ops.token_log_probs.call import TokenLogProbsBackwardCall, TokenLogProbsCall, head_call


def forward(call: TokenLogProbsCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability (N,) of each entry, its entropy (N,) or (0,) if not wanted, and no Jacobian (0,)."""
    losses, entropies = reference.forward(head_call(call))
    jacobian = call.hidden.new_zeros(0)
    return 0 - losses, entropies if call.with_entropy else torch.zeros_like(jacobian), jacobian


def backward(call: TokenLogProbsBackwardCall) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias listed in ``needs``. The others are not computed."""
    return reference.backward(head_call(call), -call.grad, call.needs)
