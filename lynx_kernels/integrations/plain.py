"""PyTorch's attention, for layers of transformers' models that cannot run ours."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.integrations.logs import model_name


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a layer without a mask is causal: it sees all keys, as in eager attention, unless it says so."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)


def sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    seen, is_causal = mask_for_sdpa(module, attention_mask, kwargs)
    options = {**kwargs, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, seen, dropout=dropout, scaling=scaling, **options)[0]


def mask_for_sdpa(
    module: torch.nn.Module, attention_mask: AttentionMask | Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` of scaled_dot_product_attention."""
    if isinstance(attention_mask, AttentionMask):
        return attention_mask.for_sdpa()
    if attention_mask is not None and not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        raise ValueError(
            f"the attention mask that {type(module).__name__} passes is {attention_mask.dtype} of shape "
            f"{tuple(attention_mask.shape)}, neither bool nor floating point; take another "
            f"attn_implementation for {model_name(getattr(module, 'config', None))}"
        )
    return attention_mask, is_causal(module, kwargs)


def products(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention by its definition, for soft caps and sinks, which scaled_dot_product_attention does not have."""
    seen, is_causal = mask_for_sdpa(module, attention_mask, kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # (B, H, L, K)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length, keys = scores.shape[2:]
    if seen is None and is_causal and length > 1:  # query i sees the keys up to i
        seen = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    if seen is not None and seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    elif seen is not None:
        scores = scores + seen
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = torch.nn.functional.dropout(weights[..., :keys], dropout, module.training)
    return (weights @ value).transpose(1, 2)
