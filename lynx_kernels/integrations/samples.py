"""Layouts from the ``cu_seq_lens_q`` that transformers passes to attention functions, one for all layers."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lynx_kernels.layout import PackedLayout

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # offsets -> {(version, tokens, is_causal): layout}


def layout_of_samples(offsets: Tensor, num_tokens: int, *, is_causal: bool) -> PackedLayout:
    """``PackedLayout.from_offsets``, made once for a tensor of offsets (N + 1,), which all layers of a model share."""
    if torch.compiler.is_compiling():
        return PackedLayout.from_offsets(offsets, num_tokens, is_causal=is_causal)
    layouts = _made.setdefault(offsets, {})
    key = (offsets._version, num_tokens, is_causal)
    if key not in layouts:
        layouts.clear()  # what was written into the tensor since is of other samples
        layouts[key] = PackedLayout.from_offsets(offsets, num_tokens, is_causal=is_causal)
    found: PackedLayout = layouts[key]
    return found
