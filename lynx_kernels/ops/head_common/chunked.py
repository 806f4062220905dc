"""The loop of "chunked" and "triton": logits, scores and gradients of one chunk of rows at a time.

Given the factor of every loss in the result, the gradient follows from logits that are there already. So one pass over
the chunks computes both. ``score`` does what lies between the products: "chunked" does it in PyTorch (``plain.py``),
"triton" in one kernel. A row that predicts several tokens is multiplied by the head once, and its gradient is that of
the sum over its tokens: nothing is added up afterwards. Shapes: T rows, N entries, width d, vocabulary V, n rows in a
chunk.

On CPUs, bf16 products use oneDNN, which rounds the logits to bf16 like a plain head. Converted to fp32 they took 2.5 to
3 times as long (Zen 4, one thread, V=32000, d=512 and 1024, 128 to 1024 rows).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.backends import onednn
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.head_common.entries import Chunk, chunks, counted_labels
from lynx_kernels.ops.head_common.head import HeadCall, product

CHUNK = 512  # rows; 65 MB of logits in fp32 with 32000 tokens


class Scoring(NamedTuple):
    """What is asked of every chunk.

    Attributes:
        call: the head and its options.
        labels: (N,) from ``counted_labels``.
        losses: (N,) in the accumulation dtype; a chunk adds to its entries.
        entropies: the same; None if not wanted.
        factors: (N,) contiguous in the accumulation dtype, of the losses in the sum that is differentiated; None: 1.
        grad_dtype: the dtype of the gradient of the products; None if not wanted.
    """

    call: HeadCall
    labels: Tensor
    losses: Tensor
    entropies: Tensor | None
    factors: Tensor | None
    grad_dtype: torch.dtype | None


# Takes hidden W^T (n, V), which it may overwrite, and returns its gradient (n, V) if wanted.
Score = Callable[[Scoring, Tensor, Chunk], Tensor | None]


class Scores(NamedTuple):
    """The results of ``run``. What is not wanted is (0,), in hidden's dtype."""

    losses: Tensor  # (N,) in the accumulation dtype, 0 where not counted
    entropies: Tensor  # the same
    grad_hidden: Tensor  # (T, d), or (N, d) by entry, in hidden's dtype
    grad_weight: Tensor  # (V, d) in ``summed_dtype``
    grad_bias: Tensor  # (V,) in ``summed_dtype``


def run(
    call: HeadCall,
    score: Score,
    *,
    needs: Sequence[bool] = (False, False, False),
    factors: Tensor | None = None,
    by_entry: bool = False,
    with_entropies: bool = False,
) -> Scores:
    """Score all entries, and differentiate the sum of ``factors * losses``.

    Args:
        needs: whether hidden, weight and bias need a gradient.
        factors: (N,); None stands for 1.
        by_entry: the gradient of hidden is (N, d): one row for each loss, not their sums in each row of hidden.
        with_entropies: whether the entropies are wanted.
    """
    hidden, labels = call.hidden, counted_labels(call)
    compute, acc = call.compute_dtype, call.acc_dtype
    needs_hidden, needs_weight, needs_bias = needs
    losses = hidden.new_zeros(labels.shape, dtype=acc)
    entropies = torch.zeros_like(losses) if with_entropies else None
    if factors is not None:
        factors = factors.to(acc).contiguous()
    grad_dtype = (acc if needs_bias else compute) if any(needs) else None
    scoring = Scoring(call, labels, losses, entropies, factors, grad_dtype)
    num_rows = labels.shape[0] if by_entry else hidden.shape[0]
    grad_hidden = hidden.new_zeros((num_rows, hidden.shape[1])) if needs_hidden else None
    grad_bias = hidden.new_zeros(call.weight.shape[0], dtype=acc) if needs_bias else None
    grad_weight = None
    weight = call.weight.to(compute)
    for chunk in chunks(call, labels, CHUNK, by_entry=by_entry):
        x = torch.where(chunk.is_counted[:, None], hidden[chunk.rows], 0).to(compute)  # (n, d)
        grad = score(scoring, _times_weight(x, weight.t()), chunk)  # (n, V)
        if grad is None:
            continue
        if grad_bias is not None:
            grad_bias += grad.sum(0)
            grad = grad.to(compute)
        if grad_hidden is not None:
            grad_hidden[chunk.entries if by_entry else chunk.rows] = _times_weight(grad, weight).to(hidden.dtype)
        if needs_weight:
            grad_weight = _add_product(grad_weight, grad.t(), x)
        del grad  # makes room for the next logits
    if needs_weight:
        grad_weight = weight.new_zeros(weight.shape) if grad_weight is None else grad_weight
        grad_weight = grad_weight.to(summed_dtype(call.weight))
    if grad_bias is not None and call.bias is not None:
        grad_bias = grad_bias.to(summed_dtype(call.bias))
    others = (
        hidden.new_zeros(0) if each is None else each for each in (entropies, grad_hidden, grad_weight, grad_bias)
    )
    return Scores(losses, *others)


def gradients(call: HeadCall, score: Score, grad: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of hidden, weight and bias listed in ``needs``, of losses with the gradient ``grad`` (N,). Each has
    the dtype of its input."""
    inputs, found = (call.hidden, call.weight, call.bias), run(call, score, needs=needs, factors=grad)[2:]
    return [
        gradient.to(each.dtype)
        for each, gradient, needed in zip(inputs, found, needs, strict=True)
        if each is not None and needed
    ]


def summed_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's summed gradient: the parameter's, but fp32 for fp16, which a sum may overflow."""
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


def _times_weight(left: Tensor, right: Tensor) -> Tensor:
    # Like _product, but right must be the weight or its transpose. In fp32 on CPUs oneDNN is faster then (Zen 4, 52 and
    # 512 rows, V=32000, d=512: logits 2.8 and 1.2 times as fast, hidden's gradient 1.2 and 1.1 times). It is not faster
    # for the weight's gradient.
    if onednn.is_quicker(left, right):
        return onednn.linear(left, right.t())
    return _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.bfloat16 and left.is_cpu and onednn.HAS_BF16:
        return left @ right
    return product(left, right)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    # The first product becomes the total. So with one chunk, no tensor of the weight's size is zeroed, added or cast.
    if total is None:
        return _product(left, right)
    total = total.to(acc_dtype(total.dtype))
    if left.dtype == total.dtype:
        return total.addmm_(left, right)  # needs no second tensor of the weight's size
    return total.add_(_product(left, right))
