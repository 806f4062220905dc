"""``attn_implementation="lynx"`` for the models of transformers: a layout, not a mask, says who sees whom.

A layer runs in one of six ways. Each gives what the model's own eager attention gives.

- Packed: one batch row and ``attention_mask=packed_mask(layout)``. The model's own pattern stays: its windows, chunks
  and blocks of image tokens are added to the layout. Or, as everywhere in transformers, one row without a mask whose
  ``position_ids`` start again at each sample. Encoders without masks take ``encoder_layout=`` among their keyword
  arguments. Runs ``prefix_attention``.
- Padded: causal rows, or full rows of a decoder with ``is_causal=False`` in its configuration, with padding on either
  side or none, and again with the model's pattern. The mask function builds their layout from the 2-D mask, once for
  all layers of a kind. Runs ``prefix_attention``. Outputs at padding are meaningless.
- Cut by ``cu_seq_lens_q``: one row of samples, as FlashAttention takes it. Runs ``prefix_attention``.
- Cross-attention of the layers that ``apply`` chose, whose dense mask is one of spans. Runs ``cross_attention``.
- Decoding over a cache in which rows share roots, given by ``shared_roots=`` in the model's keyword arguments. Runs
  ``prefix_attention_decode``.
- Everything else runs PyTorch's scaled_dot_product_attention, with transformers' own dense mask where there is one, or
  plain products where there are soft caps or sinks: decoding over another cache, masks with a pattern that is none of
  ours, 4-D masks of the caller, padded encoders (their mask could be that of a cross-attention, whose queries are other
  tokens than its keys), layers without a mask. So do rows with padding between their tokens, values wider than keys,
  and heads too wide for the kernels. The logger ``lynx_kernels`` says once per kind of layer what runs and why: a
  warning for the last three, INFO for the others.

What no way supports is refused by name: position biases, sparse attention. A model that does not call transformers'
AttentionInterface is refused too: when it is built, if its source shows it, and otherwise when it computes with our
mask.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lynx_kernels.integrations import plain
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.integrations.logs import model_name, note, say
from lynx_kernels.integrations.mask_function import mask
from lynx_kernels.integrations.outsiders import refuse_outsiders
from lynx_kernels.integrations.samples import layout_of_samples
from lynx_kernels.integrations.spans import read_spans
from lynx_kernels.layout import PackedLayout
from lynx_kernels.ops.cross_attention import cross_attention
from lynx_kernels.ops.prefix_attention import prefix_attention
from lynx_kernels.ops.prefix_attention_decode import prefix_attention_decode

NAME = "lynx"
# Vision towers that cut their row at cu_seqlens call an attention function once for all frames if its name has "flash"
# in it, and once a frame otherwise. ``apply`` sets it.
VARLEN_NAME = "lynx_flash"
CROSS_NAME = "lynx_cross"  # of layers whose keys are other tokens than their queries. ``apply`` sets it.
MAX_HEAD_DIM = 512  # of the kernels for GPUs
UNSUPPORTED = {  # argument of the attention function -> the feature that a layer asks for with it
    "position_bias": "position biases",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
_SOUNDS_UNSUPPORTED = re.compile(r"(^|_)(bias|soft_?cap|sinks?|alibi|block_mask|head_mask|topk_indices)$")
# Models that drop what attention returns for queries that see no key.
_DROPS_BLIND = {"idefics"}
# Values of layer_types in configurations. Other kinds of layers, such as linear attention and convolutions, do not read
# a layout: they would mix the samples of a packed row.
KEEP_SAMPLES_APART = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "mlp", "moe"}


@dataclass(frozen=True)
class SharedRoots:
    """What all layers of a decoder need beside its cache's branches, which are the keys and values of a layer's rows.

    Attributes:
        keys, values: (layers, K, Hkv, D), the shared ones; a layer's are at its ``layer_idx``.
        ranges, branch_lengths: as ``prefix_attention_decode`` wants them, the new tokens counted.
    """

    keys: Tensor
    values: Tensor
    ranges: Tensor
    branch_lengths: Tensor


def register() -> None:
    """Make ``attn_implementation="lynx"`` known to transformers. Calling it again changes nothing."""
    for name in (NAME, VARLEN_NAME):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(CROSS_NAME, attention_to_others)
    refuse_outsiders(NAME)


def packed_mask(layout: PackedLayout) -> AttentionMask:
    """The ``attention_mask`` to pass to a decoder for a packed row.

    transformers passes it to ``mask``, which adds the model's own windows, chunks and blocks. So no mask is built, and
    ``position_ids`` are not searched for packed sequences, which would read a device tensor on the host. Pass
    ``position_ids=layout.position_ids[None]`` beside it.
    """
    return AttentionMask("this model", torch.Size((1, 1, 0, 0)), layout.runs.device, layout=layout, is_packed=True)


def padded_mask(layout: PackedLayout) -> AttentionMask:
    """The ``attention_mask`` of a padded batch (B, L) whose layout ``PackedLayout.from_padding_mask`` built."""
    length = layout.max_length
    shape = torch.Size((layout.num_tokens // length if length else 0, 1, length, length))
    return AttentionMask("this model", shape, layout.runs.device, layout=layout)


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hkv, K, D)
    value: Tensor,  # (B, Hkv, K, Dv)
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    encoder_layout: PackedLayout | None = None,
    shared_roots: SharedRoots | None = None,
    cu_seq_lens_q: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface; returns (B, L, H, Dv) and no weights.

    Windows and chunks are those of the mask, as in eager attention, whatever else a layer says of them. An encoder
    whose layers take no mask gets its packed row by ``encoder_layout=``. A ``layout=`` among the model's keyword
    arguments is not needed beside ``packed_mask`` and does nothing: models pass it to layers that it is not meant for,
    such as those of their vision tower.

    Raises:
        ValueError: ``packed_mask`` with more than one batch row or for other tokens; a layout without
            ``packed_mask``; a mask for other queries and keys; dropout in ``prefix_attention``; an unsupported feature.
    """
    _refuse_unsupported(module, kwargs)
    sinks = s_aux if sinks is None else sinks
    rows, _, length, _ = query.shape
    if shared_roots is not None:
        _refuse_dropout(dropout)
        given = attention_mask.layout if isinstance(attention_mask, AttentionMask) else None
        local = {} if given is None else {"window": given.window, "chunk": given.chunk}
        scores = {"scale": scaling, "softcap": softcap, "sinks": sinks}
        return _decode(module, query, key, value, shared_roots, **local, **scores), None
    if encoder_layout is not None and attention_mask is None:
        attention_mask = packed_mask(encoder_layout)
    if cu_seq_lens_q is not None and (rows, key.shape[2]) == (1, length):
        attention_mask = _in_samples(module, attention_mask, cu_seq_lens_q, length, kwargs)
    if layout is not None and (rows, length) == (1, layout.num_tokens) and _mixes_samples(attention_mask):
        raise ValueError(
            "beside a layout stands attention_mask=packed_mask(layout), not another mask, which says who sees whom a "
            "second time"
        )
    if isinstance(attention_mask, AttentionMask):
        attention_mask.check()
    if isinstance(attention_mask, AttentionMask) and attention_mask.layout is not None:
        attention_mask = _fit(attention_mask, attention_mask.layout, module, (rows, 1, length, key.shape[2]))
    reason, is_expected = _why_not_kernels(query, value, attention_mask)
    if reason is not None:
        runs = "PyTorch's scaled_dot_product_attention" if softcap is None and sinks is None else "plain products"
        level = logging.INFO if is_expected else logging.WARNING
        say(level, type(module).__name__, f"runs {runs}, since {reason}")
        note(module, "its own", f"{runs}, since {reason}")
        if softcap is None and sinks is None:
            return plain.sdpa(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
        return plain.products(module, query, key, value, attention_mask, dropout, scaling, softcap, sinks, kwargs), None
    _refuse_dropout(dropout)
    assert isinstance(attention_mask, AttentionMask)
    assert attention_mask.layout is not None
    note(module, "lynx", "prefix_attention")
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * L, heads, D)
    out = prefix_attention(q, k, v, attention_mask.layout, scale=scaling, softcap=softcap, sinks=sinks)
    return out.unflatten(0, (rows, length)), None


def attention_to_others(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B or 1, Hkv, K, D)
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_images: tuple[Tensor, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Like ``attention``, for layers whose keys are other tokens, such as vision tokens: runs ``cross_attention``.

    Where the dense mask is none of spans, or with dropout, values of another width than keys, and in compiled code, it
    is ``attention``, which runs what it runs for them.

    Args:
        packed_images: of a packed row: which images are of each token's sample, and how many images there are. The
            mask's own word on tokens that see none, all keys, means those of their sample.
    """
    rows, _, length, head_dim = query.shape
    dense, is_causal = plain.mask_for_sdpa(module, attention_mask, kwargs)
    reason = None
    if torch.compiler.is_compiling():
        reason = "compiled code cannot read its mask"
    elif dropout != 0.0:
        reason = f"its dropout is {dropout}"
    elif (dense is None and is_causal) or (
        isinstance(attention_mask, AttentionMask) and attention_mask.layout is not None
    ):
        reason = "its keys are its queries"
    elif value.shape[-1] != head_dim or head_dim > MAX_HEAD_DIM or key.shape[0] not in (1, rows):
        reason = "its shapes are not those of cross_attention"
    elif any(each is not None for each in map(kwargs.get, ("softcap", "s_aux", "sinks"))):
        reason = "it has a soft cap or sinks"
    spans = reason or read_spans(dense, rows, length, key.shape[0], key.shape[2], query.device, packed_images)
    may_be_blind = packed_images is not None or model_name(module.config) in _DROPS_BLIND
    if not isinstance(spans, str) and spans.has_blind and not may_be_blind:
        spans = "a query sees no key, of which eager attention makes a mean of all values"
    if isinstance(spans, str) and packed_images is not None:
        raise ValueError(f"{type(module).__name__} cannot run packed rows: {spans}; pass padded rows")
    if isinstance(spans, str):
        out = attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        note(module, "its own", f"PyTorch's attention, since {spans}")
        return out
    _refuse_unsupported(module, kwargs)
    note(module, "lynx", "cross_attention")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, L, heads, D)
    if spans.order is not None:
        index = spans.order[..., None, None].expand(rows, -1, *k.shape[2:])
        k, v = (tensor.expand_as(index).gather(1, index) for tensor in (k, v))
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    return cross_attention(q, k, v, spans.layout, scale=scaling).unflatten(0, (rows, length)), None


def _fit(given: AttentionMask, layout: PackedLayout, module: Any, shape: tuple[int, int, int, int]) -> AttentionMask:
    """A mask with a layout, for a layer with queries and keys of this shape."""
    rows, _, length, keys = shape
    if not given.is_packed:
        if shape != tuple(given.shape):
            raise ValueError(
                f"the attention mask is {tuple(given.shape)}, but {type(module).__name__} uses it for {rows} rows of "
                f"{length} queries and {keys} keys; take another attn_implementation for "
                f"{model_name(getattr(module, 'config', None))}"
            )
        if given.has_samples:
            _refuse_mixing_layers(getattr(module, "config", None))
        return given
    if (rows, length, keys) != (1, layout.num_tokens, layout.num_tokens):
        raise ValueError(
            f"packed_mask(layout) is for one row of {layout.num_tokens} tokens, but {type(module).__name__} uses it "
            f"for a batch of {rows} rows with {length} queries and {keys} keys"
        )
    if not given.is_split:
        _refuse_mixing_layers(getattr(module, "config", None))
    return AttentionMask("", torch.Size(shape), layout.runs.device, layout=layout)


def _in_samples(
    module: Any, attention_mask: AttentionMask | Tensor | None, offsets: Tensor, length: int, kwargs: dict[str, Any]
) -> AttentionMask | Tensor:
    """The mask of one row in which only tokens of a sample see each other, as FlashAttention would have it."""
    if attention_mask is None:
        is_causal = plain.is_causal(module, kwargs)
        return packed_mask(layout_of_samples(offsets, length, is_causal=is_causal))
    if not isinstance(attention_mask, AttentionMask) or attention_mask.is_packed or attention_mask.layout is None:
        return attention_mask
    given = attention_mask.layout
    if given.has_full:
        raise ValueError(
            f"{type(module).__name__}: blocks of tokens that see each other have no cu_seq_lens_q; pass "
            f"attention_mask=packed_mask(layout), or position_ids that start again at each sample, without "
            f"cu_seq_lens_q"
        )
    layout = layout_of_samples(offsets, length, is_causal=True)
    return packed_mask(layout.with_local(window=given.window, chunk=given.chunk))


def _mixes_samples(attention_mask: AttentionMask | Tensor | None) -> bool:
    """Whether a mask may say of a decoder's row that its samples see each other."""
    if isinstance(attention_mask, AttentionMask):
        return not attention_mask.is_packed and (attention_mask.is_causal or attention_mask.layout is not None)
    return attention_mask is not None


def _refuse_unsupported(module: Any, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is not None and (feature := _feature(name, isinstance(value, Tensor))) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} has no {feature}, but the layer asks for {name}; take another one for "
                f"{model_name(getattr(module, 'config', None))}"
            )


@torch.compiler.assume_constant_result
def _feature(name: str, is_tensor: bool) -> str | None:
    """The unsupported feature that a layer asks for with an argument of this name, or None."""
    sounds_unsupported = is_tensor and _SOUNDS_UNSUPPORTED.search(name) is not None
    return UNSUPPORTED.get(name, name if sounds_unsupported else None)


def _refuse_mixing_layers(config: Any) -> None:
    others = set(getattr(config, "layer_types", None) or ()) - KEEP_SAMPLES_APART
    if others:
        raise ValueError(
            f"{model_name(config)} has layers of the kind {', '.join(sorted(others))}, which do not read a layout and "
            f"would mix the samples of a packed row; pass padded rows, or after apply() packed_mask(layout)"
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
    if value.shape[-1] > head_dim:
        return (
            f"its values are {value.shape[-1]} wide and its keys {head_dim}; with padding or packed, the mask is dense",
            False,
        )
    if head_dim > MAX_HEAD_DIM and query.device.type != "cpu":
        return f"its heads are {head_dim} wide and the kernels take {MAX_HEAD_DIM}", False
    return None, True


def _refuse_dropout(dropout: float) -> None:
    if dropout != 0.0:
        raise ValueError(
            f"attn_implementation={NAME!r} has no dropout, but attention_dropout is {dropout}; set it to 0"
        )


def _decode(module: Any, query: Tensor, key: Tensor, value: Tensor, roots: SharedRoots, **options: Any) -> Tensor:
    q, branch_k, branch_v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, L, heads, D)
    out = prefix_attention_decode(
        q,
        roots.keys[module.layer_idx],
        roots.values[module.layer_idx],
        branch_k,
        branch_v,
        roots.ranges,
        roots.branch_lengths,
        **options,
    )
    assert isinstance(out, Tensor)
    return out
