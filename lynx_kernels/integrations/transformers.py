"""``attn_implementation="lynx"`` for the models of transformers: a layout, not a mask, says who sees whom.

A layer runs in one of four ways. Each gives what the model's own eager attention gives.

- Packed: one batch row with its ``PackedLayout`` in the model's keyword arguments, ``layout=``, and
  ``attention_mask=packed_mask(layout)``. Runs ``prefix_attention``.
- Padded: causal rows, or full rows of a decoder with ``is_causal=False`` in its configuration, with padding on either
  side or none. The mask function builds their layout from the 2-D mask, once for all layers. Runs
  ``prefix_attention``. Outputs at padding are meaningless.
- Decoding over a cache in which rows share roots, given by ``shared_roots=`` in the model's keyword arguments. Runs
  ``prefix_attention_decode``.
- Everything else runs PyTorch's scaled_dot_product_attention, with transformers' own dense mask where there is one:
  decoding over another cache, masks with a pattern of the model (PaliGemma's full prefix), 4-D masks of the caller,
  padded encoders (their mask could be that of a cross-attention, whose queries are other tokens than its keys), layers
  without a mask. So do rows with padding between their tokens, values and keys of different widths (MLA), and heads
  too wide for the kernels. The logger ``lynx_kernels`` says once per kind of layer what runs and why: a warning for the
  last three, INFO for the others.

What no way supports is refused by name: sliding windows, chunked masks, soft caps, sinks, biases, sparse attention. A
model that does not call transformers' AttentionInterface is refused too: when it is built, if its source shows it, and
otherwise when it computes with our mask.
"""

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.integrations.outsiders import refuse_outsiders
from lynx_kernels.layout import PackedLayout
from lynx_kernels.ops.prefix_attention import prefix_attention
from lynx_kernels.ops.prefix_attention_decode import prefix_attention_decode

logger = logging.getLogger("lynx_kernels")

NAME = "lynx"
MAX_HEAD_DIM = 256  # of the kernels for GPUs
_UNSUPPORTED = {  # argument of the attention function -> the feature that a layer asks for with it
    "sliding_window": "sliding windows",
    "attention_chunk_size": "chunked masks",  # from the configuration
    "softcap": "soft caps",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "position biases",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
_SOUNDS_UNSUPPORTED = re.compile(r"(^|_)(bias|sinks?|soft_?cap|alibi|block_mask|head_mask|topk_indices)$")
# Values of layer_types in configurations. Other kinds of layers, such as linear attention and convolutions, do not read
# a layout: they would mix the samples of a packed row.
_KEEP_SAMPLES_APART = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "mlp", "moe"}
_said: set[tuple[str, str]] = set()  # (kind of layer, message) that were logged


@dataclass(frozen=True)
class SharedRoots:
    """What all layers of a decoder need beside its cache's branches, which are the keys and values of a layer's rows.

    Attributes:
        keys, values: (layers, R, Lr, Hkv, D), the roots'; a layer's are at its ``layer_idx``.
        branch_to_root, root_lengths, branch_lengths: as ``prefix_attention_decode`` wants them, the new tokens counted.
    """

    keys: Tensor
    values: Tensor
    branch_to_root: Tensor
    root_lengths: Tensor
    branch_lengths: Tensor


def register() -> None:
    """Make ``attn_implementation="lynx"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    refuse_outsiders(NAME)


def packed_mask(layout: PackedLayout) -> AttentionMask:
    """The ``attention_mask`` to pass to a decoder together with ``layout``.

    transformers passes it to ``mask``, which returns it. So no mask is built, and ``position_ids`` are not searched for
    packed sequences, which would read a device tensor on the host.
    """
    return AttentionMask("this model", torch.Size((1, 1, 0, 0)), layout.runs.device, is_packed=True)


def padded_mask(layout: PackedLayout) -> AttentionMask:
    """The ``attention_mask`` of a padded batch (B, L) whose layout ``PackedLayout.from_padding_mask`` built."""
    length = layout.max_length
    shape = torch.Size((layout.num_tokens // length if length else 0, 1, length, length))
    return AttentionMask("this model", shape, layout.runs.device, layout=layout)


def mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> AttentionMask:
    """A mask function of transformers' AttentionMaskInterface.

    It reads a 2-D mask on the host, as ``sdpa_mask`` does: one synchronisation per forward pass. Compiled code cannot,
    and a row with padding between its tokens is an error there.

    Args:
        batch_size, kv_length: B, and K, the number of keys.
        mask_function: the pattern, without the padding.
        attention_mask: (B, K) bool, false at padding; or the result of ``packed_mask`` or ``padded_mask``.
        local_size: the size of the window or chunk, if the pattern has one.
        config: of the model.
        kwargs: the number of queries, and other arguments of ``sdpa_mask`` in this release of transformers.

    Returns:
        A mask with a layout, if the pattern is causal or full and queries and keys are the same tokens. Otherwise a
        mask with the result of ``sdpa_mask``. For a window or chunk, a mask that ``attention`` refuses: some models
        build masks that none of their layers use.

    Raises:
        ValueError: the model adds a pattern to the result of ``packed_mask`` or ``padded_mask``.
    """
    name = _name(config)
    position = kwargs.get("cache_position")  # older releases pass the positions of the queries, not their number
    q_length, device = (kwargs["q_length"], kwargs["device"]) if position is None else (len(position), position.device)
    device = torch.device(device)
    if local_size is not None:
        is_chunked = getattr(config, "attention_chunk_size", None) == local_size
        feature = f"chunked masks (of {local_size})" if is_chunked else f"sliding windows (of {local_size})"
        return AttentionMask(name, torch.Size((batch_size, 1, q_length, kv_length)), device, unsupported=feature)
    if isinstance(attention_mask, AttentionMask):
        if mask_function not in (causal_mask_function, bidirectional_mask_function):
            raise ValueError(
                f"{name} adds a pattern of its own to the attention mask, which the layout of packed_mask or "
                f"padded_mask does not have; pass a 2-D attention_mask, or leave out the inputs for the pattern"
            )
        return replace(attention_mask, model=name)
    made = AttentionMask(name, torch.Size((batch_size, 1, q_length, kv_length)), device)
    is_causal = mask_function is causal_mask_function
    if (
        _is_plain(mask_function, config, **kwargs)
        and q_length == kv_length
        and (attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length))
    ):
        has_padding, has_gaps = _read(attention_mask)
        if not has_gaps:
            if attention_mask is None:
                attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
            layout = PackedLayout.from_padding_mask(attention_mask, is_causal=is_causal)
            return replace(made, layout=layout, has_padding=has_padding, is_causal=is_causal)
        _say(
            logging.WARNING,
            name,
            "attention runs PyTorch's scaled_dot_product_attention with a dense mask, since a row has padding between "
            "its tokens, which a layout cannot describe",
        )
    seen = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )
    return replace(made, seen=seen, is_causal=seen is None and is_causal)


def _read(attention_mask: Tensor | None) -> tuple[bool, bool]:
    """Whether a (B, L) mask has padding, and whether a row has padding between its tokens.

    A mask that cannot be read (while compiling or capturing) counts as one with padding at the ends.
    """
    if attention_mask is None:
        return False, False
    is_captured = attention_mask.is_cuda and torch.cuda.is_current_stream_capturing()
    has_no_values = isinstance(attention_mask, FakeTensor) or attention_mask.is_meta
    if torch.compiler.is_compiling() or has_no_values or is_captured:
        return True, False
    is_token = attention_mask != 0
    begins = is_token & ~is_token.roll(1, 1)  # of stretches of tokens
    begins[:, :1] = is_token[:, :1]
    has_padding, has_gaps = torch.stack([~is_token.all(), (begins.sum(1) > 1).any()]).tolist()
    return has_padding, has_gaps


def _is_plain(
    mask_function: Any,
    config: Any,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_kwargs: Any,
) -> bool:
    """Whether the pattern is just causal or full, and the model does not insist on a dense mask."""
    if mask_function is causal_mask_function:
        return allow_is_causal_skip
    is_full_decoder = getattr(config, "is_causal", True) is False and not getattr(config, "is_encoder_decoder", False)
    return mask_function is bidirectional_mask_function and is_full_decoder and allow_is_bidirectional_skip


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hkv, K, D)
    value: Tensor,  # (B, Hkv, K, Dv)
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    shared_roots: SharedRoots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface; returns (B, L, H, Dv) and no weights.

    Raises:
        ValueError: a layout with more than one batch row or with another mask; ``packed_mask`` without its layout; a
            mask for other queries and keys; dropout in ``prefix_attention``; an unsupported feature.
    """
    _refuse_unsupported(module, attention_mask, kwargs)
    rows, _, length, _ = query.shape
    if shared_roots is not None:
        _refuse_dropout(dropout)
        return _decode(module, query, key, value, shared_roots, scaling), None
    if layout is not None:
        if rows != 1:
            raise ValueError(f"a packed row is a batch of one, but the batch has {rows} rows beside a layout")
        if attention_mask is not None and not getattr(attention_mask, "is_packed", False):
            raise ValueError(
                f"beside a layout stands attention_mask=packed_mask(layout), not a mask of shape "
                f"{tuple(attention_mask.shape)}, which says who sees whom a second time"
            )
        _refuse_mixing_layers(getattr(module, "config", None))
        attention_mask = AttentionMask("", torch.Size((1, 1, length, length)), query.device, layout=layout)
    elif isinstance(attention_mask, AttentionMask):
        if attention_mask.is_packed:
            raise ValueError(
                f"attention_mask is packed_mask(layout), but no layout reached {type(module).__name__}: pass layout= "
                f"to the model; one that keeps keyword arguments from its layers cannot take packed rows"
            )
        if attention_mask.layout is not None and (rows, 1, length, key.shape[2]) != tuple(attention_mask.shape):
            raise ValueError(
                f"the attention mask is {tuple(attention_mask.shape)}, but {type(module).__name__} uses it for {rows} "
                f"rows of {length} queries and {key.shape[2]} keys; take another "
                f"attn_implementation for {_name(getattr(module, 'config', None))}"
            )
    reason, is_expected = _why_not_kernels(query, value, attention_mask)
    if reason is not None:
        level = logging.INFO if is_expected else logging.WARNING
        _say(level, type(module).__name__, f"runs PyTorch's scaled_dot_product_attention, since {reason}")
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    _refuse_dropout(dropout)
    assert isinstance(attention_mask, AttentionMask)
    assert attention_mask.layout is not None
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * L, heads, D)
    return prefix_attention(q, k, v, attention_mask.layout, scale=scaling).unflatten(0, (rows, length)), None


def _refuse_unsupported(module: Any, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    if isinstance(attention_mask, AttentionMask) and attention_mask.unsupported is not None:
        raise ValueError(
            f"attn_implementation={NAME!r} has no {attention_mask.unsupported}; take another one for {_name(config)}"
        )
    asked = {**kwargs, "attention_chunk_size": getattr(config, "attention_chunk_size", None)}
    for name, value in asked.items():
        if value is not None and (feature := _feature(name, isinstance(value, Tensor))) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} has no {feature}, but the layer asks for {name}; take another one for "
                f"{_name(config)}"
            )


@torch.compiler.assume_constant_result
def _feature(name: str, is_tensor: bool) -> str | None:
    """The unsupported feature that a layer asks for with an argument of this name, or None."""
    sounds_unsupported = is_tensor and _SOUNDS_UNSUPPORTED.search(name) is not None
    return _UNSUPPORTED.get(name, name if sounds_unsupported else None)


def _refuse_mixing_layers(config: Any) -> None:
    others = set(getattr(config, "layer_types", None) or ()) - _KEEP_SAMPLES_APART
    if others:
        raise ValueError(
            f"{_name(config)} has layers of the kind {', '.join(sorted(others))}, which do not read a layout and would "
            f"mix the samples of a packed row; pass padded rows"
        )


def _why_not_kernels(query: Tensor, value: Tensor, attention_mask: Any) -> tuple[str | None, bool]:
    """Why a layer cannot run ``prefix_attention``, or None; and whether that is no more than its mask."""
    if attention_mask is None:
        return "it has no mask", True
    if not isinstance(attention_mask, AttentionMask):
        return "its mask does not come from our mask function", True
    if attention_mask.layout is None:
        return "its mask has no layout (a cache, a pattern of the model, a padded encoder)", True
    head_dim = query.shape[-1]
    if value.shape[-1] != head_dim:
        return (
            f"its values are {value.shape[-1]} wide and its keys {head_dim}; with padding or packed, the mask is dense",
            False,
        )
    if head_dim > MAX_HEAD_DIM and query.device.type != "cpu":
        return f"its heads are {head_dim} wide and the kernels take {MAX_HEAD_DIM}", False
    return None, True


def _sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    # Without a mask, all keys are seen, as in eager attention, unless the layer says that it is causal.
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if isinstance(attention_mask, AttentionMask):
        attention_mask, is_causal = attention_mask.for_sdpa()
    elif attention_mask is not None and not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        raise ValueError(
            f"the attention mask that {type(module).__name__} passes is {attention_mask.dtype} of shape "
            f"{tuple(attention_mask.shape)}, neither bool nor floating point; take another "
            f"attn_implementation for {_name(getattr(module, 'config', None))}"
        )
    options = {**kwargs, "is_causal": is_causal}
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )[0]


@torch.compiler.assume_constant_result
def _say(level: int, layer: str, what: str) -> None:
    """Log a message once for each kind of layer; from compiled code, while it is compiled."""
    if (layer, what) not in _said:
        _said.add((layer, what))
        logger.log(level, "%s: %s", layer, what)


def _refuse_dropout(dropout: float) -> None:
    if dropout != 0.0:
        raise ValueError(
            f"attn_implementation={NAME!r} has no dropout, but attention_dropout is {dropout}; set it to 0"
        )


def _decode(
    module: Any, query: Tensor, key: Tensor, value: Tensor, roots: SharedRoots, scaling: float | None
) -> Tensor:
    q, branch_k, branch_v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, L, heads, D)
    out = prefix_attention_decode(
        q,
        roots.keys[module.layer_idx],
        roots.values[module.layer_idx],
        branch_k,
        branch_v,
        roots.branch_to_root,
        roots.root_lengths,
        roots.branch_lengths,
        scale=scaling,
    )
    assert isinstance(out, Tensor)
    return out


def _name(config: Any) -> str:
    return getattr(config, "model_type", None) or "this model"
