"""The equation that the references of the three attention operations share, in plain PyTorch.

    S = scale * Q K^T, with a soft cap c: S = c * tanh(scale / c * Q K^T); where the query does not see the key, -inf
    LSE = log(sum_k exp(S) + exp(sink))        P = exp(S - LSE)        out = P V

The term of the sink is there only if there are sinks, one a head: keys without a value, in units of scores.
Everything is computed in at least fp32 (fp64 for fp64). A query that sees no key has output 0, LSE -inf (or the sink)
and gradient 0.
Blocks of equal shape are computed together. The loops over shapes read the layout's table on the host, which
synchronises a GPU; the kernels do not.
Shapes: H query heads share Hkv key heads in groups of H / Hkv; D is the head dimension, Dv that of the values.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype

_MAX_CELLS = 2**18  # pairs of query and key per head and batch; limits the memory


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(..., Q, H, D) -> (..., Q, Hkv, H / Hkv, D) in the accumulation dtype."""
    return tensor.to(acc_dtype(tensor.dtype)).unflatten(-2, (num_kv_heads, -1))


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """S of the module docstring, (..., Hkv, H / Hkv, Q, K)."""
    scores = scale * torch.einsum("...qhgd,...khd->...hgqk", _grouped(q, k.shape[-2]), k.to(acc_dtype(k.dtype)))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible[..., None, None, :, :], float("-inf"))


def attend(
    q: Tensor,  # (..., Q, H, D)
    k: Tensor,  # (..., K, Hkv, D)
    v: Tensor,  # (..., K, Hkv, Dv)
    visible: Tensor,  # (..., Q, K) bool
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> tuple[Tensor, Tensor]:
    """Return the output (..., Q, H, Dv) in the dtype of q, and the LSE (..., Q, H) in the accumulation dtype."""
    scores = _scores(q, k, visible, scale, softcap)
    lse = scores.logsumexp(-1)  # (..., Hkv, H / Hkv, Q)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).unflatten(0, (k.shape[-2], -1))[..., None])
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None])
    out = torch.einsum("...hgqk,...khd->...qhgd", weights, v.to(weights.dtype))
    return out.flatten(-3, -2).to(q.dtype).contiguous(), lse.movedim(-1, -3).flatten(-2).contiguous()


def attend_backward(
    grad: Tensor | None,  # (..., Q, H, Dv)
    grad_lse: Tensor | None,  # (..., Q, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in the accumulation dtype.

    dV = P^T dO        dS = P * (dO V^T - delta)        dQ = scale dS K        dK = scale dS^T Q

    With a soft cap c, dS is multiplied by 1 - (S / c)^2.
    """
    num_kv_heads = k.shape[-2]
    grad = torch.zeros_like(out) if grad is None else grad
    delta = delta_of(grad, grad_lse, out, lse)  # (..., Q, H)
    lse, delta = (x.unflatten(-1, (num_kv_heads, -1)).movedim(-3, -1)[..., None] for x in (lse, delta))
    grad = _grouped(grad, num_kv_heads)
    scores = _scores(q, k, visible, scale, softcap)  # (..., Hkv, H / Hkv, Q, K)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0))
    grad_v = torch.einsum("...hgqk,...qhgd->...khd", weights, grad)
    grad_weights = torch.einsum("...qhgd,...khd->...hgqk", grad, v.to(grad.dtype))
    grad_scores = scale * weights * (grad_weights - delta)
    if softcap is not None:
        grad_scores = grad_scores * (1 - (scores / softcap).masked_fill(scores.isneginf(), 0).square())
    grad_q = torch.einsum("...hgqk,...khd->...qhgd", grad_scores, k.to(grad.dtype)).flatten(-3, -2)
    grad_k = torch.einsum("...hgqk,...qhgd->...khd", grad_scores, _grouped(q, num_kv_heads))
    return grad_q, grad_k, grad_v


def delta_of(grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """rowsum(dO * O) - dLSE, (..., Q, H): what the gradient of every score of a query has in common."""
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse.to(lse.dtype)


def sinks_backward(
    grad: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> Tensor:
    """The gradient of the sinks (H,) from those of the results (..., Q, H, Dv); (0,) if there are no sinks.

    d sink = -sum_q exp(sink - LSE) * delta
    """
    if sinks is None:
        return lse.new_empty(0)
    if grad is None:
        grad = torch.zeros_like(out)
    delta = delta_of(grad, grad_lse, out, lse)
    grad_sinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).flatten(0, -2).sum(0)
    return grad_sinks.to(sinks.dtype)


def take_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def batches_of_shape(
    starts_by_shape: Mapping[tuple[int, int], list], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (queries, keys, starts) for batches of blocks of equal shape, each batch as large as memory allows."""
    for (queries, keys), starts in starts_by_shape.items():
        for batch in torch.tensor(starts, device=device).split(max(1, _MAX_CELLS // max(1, queries * keys))):
            yield queries, keys, batch
