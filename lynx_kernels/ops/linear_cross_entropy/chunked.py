"""linear_cross_entropy by chunks of rows, for "chunked" and "triton", which differ in ``score``.

Once the losses are known, the gradient of their sum is known up to a factor. So forward computes it from the logits it
already has, one chunk of rows at a time, and backward only multiplies by the factor. This takes two products with a
frozen head and three with a trained one. Recomputing the logits in backward would take three and four. From forward to
backward the gradients are kept instead of the arguments, or nothing if no gradient is needed. Only losses that are not
summed are computed again in backward.
"""

from torch import Tensor

from lynx_kernels.ops.head_common.chunked import Score, gradients, run
from lynx_kernels.ops.linear_cross_entropy.call import (
    LinearCrossEntropyBackwardCall,
    LinearCrossEntropyCall,
    head_call,
    weighted,
)


def forward(score: Score, call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of each entry (N,), or their sum () and its gradients as in ``Scores``."""
    scores = run(head_call(call), score, needs=call.needs, factors=call.weights)
    losses = weighted(scores.losses, call.weights)
    return losses.sum() if call.sums else losses, scores.grad_hidden, scores.grad_weight, scores.grad_bias


def backward(score: Score, call: LinearCrossEntropyBackwardCall) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias listed in ``needs``. The others are not computed."""
    return gradients(head_call(call), score, call.factors, call.needs)
