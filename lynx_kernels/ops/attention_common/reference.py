"""The equation that the references of the three attention operations share, in plain PyTorch.

    S = scale * Q K^T where the query sees the key, -inf elsewhere
    LSE = log sum_k exp(S)        P = exp(S - LSE)        out = P V

Everything is computed in at least fp32 (fp64 for fp64). A query that sees no key has output 0, LSE -inf and gradient 0.
Blocks of equal shape are computed together. The loops over shapes read the layout's table on the host, which
synchronises a GPU; the kernels do not.
Shapes: H query heads share Hkv key heads in groups of H / Hkv; D is the head dimension.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype

_MAX_CELLS = 2**18  # pairs of query and key per head and batch; limits the memory


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(..., Q, H, D) -> (..., Q, Hkv, H / Hkv, D) in the accumulation dtype."""
    return tensor.to(acc_dtype(tensor.dtype)).unflatten(-2, (num_kv_heads, -1))


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """S of the module docstring, (..., Hkv, H / Hkv, Q, K)."""
    scores = scale * torch.einsum("...qhgd,...khd->...hgqk", _grouped(q, k.shape[-2]), k.to(acc_dtype(k.dtype)))
    return scores.masked_fill(~visible[..., None, None, :, :], float("-inf"))


def attend(
    q: Tensor,  # (..., Q, H, D)
    k: Tensor,  # (..., K, Hkv, D)
    v: Tensor,  # (..., K, Hkv, D)
    visible: Tensor,  # (..., Q, K) bool
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (..., Q, H, D) in the dtype of q, and the LSE (..., Q, H) in the accumulation dtype."""
    scores = _scores(q, k, visible, scale)
    lse = scores.logsumexp(-1)  # (..., Hkv, H / Hkv, Q)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None])
    out = torch.einsum("...hgqk,...khd->...qhgd", weights, v.to(weights.dtype))
    return out.flatten(-3, -2).to(q.dtype).contiguous(), lse.movedim(-1, -3).flatten(-2).contiguous()


def attend_backward(
    grad: Tensor | None,  # (..., Q, H, D)
    grad_lse: Tensor | None,  # (..., Q, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in the accumulation dtype.

    dV = P^T dO        dS = P * (dO V^T - (rowsum(dO * O) - dLSE))        dQ = scale dS K        dK = scale dS^T Q
    """
    num_kv_heads = k.shape[-2]
    grad = torch.zeros_like(out) if grad is None else grad
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (..., Q, H)
    if grad_lse is not None:
        delta = delta - grad_lse.to(lse.dtype)
    lse, delta = (x.unflatten(-1, (num_kv_heads, -1)).movedim(-3, -1)[..., None] for x in (lse, delta))
    grad = _grouped(grad, num_kv_heads)
    weights = torch.exp(_scores(q, k, visible, scale) - lse.masked_fill(lse.isneginf(), 0))  # (..., Hkv, H/Hkv, Q, K)
    grad_v = torch.einsum("...hgqk,...qhgd->...khd", weights, grad)
    grad_weights = torch.einsum("...qhgd,...khd->...hgqk", grad, v.to(grad.dtype))
    grad_scores = scale * weights * (grad_weights - delta)
    grad_q = torch.einsum("...hgqk,...khd->...qhgd", grad_scores, k.to(grad.dtype)).flatten(-3, -2)
    grad_k = torch.einsum("...hgqk,...qhgd->...khd", grad_scores, _grouped(q, num_kv_heads))
    return grad_q, grad_k, grad_v


def take_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def batches_of_shape(
    starts_by_shape: Mapping[tuple[int, int], list], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (queries, keys, starts) for batches of blocks of equal shape, each batch as large as memory allows."""
    for (queries, keys), starts in starts_by_shape.items():
        for batch in torch.tensor(starts, device=device).split(max(1, _MAX_CELLS // max(1, queries * keys))):
            yield queries, keys, batch
