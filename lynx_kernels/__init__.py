"""Kernels for multimodal language models: one import, one call, the same numbers out."""

from lynx_kernels.adapter import adapter
from lynx_kernels.attention import cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.dispatch import which
from lynx_kernels.layout import PackedLayout, SpanLayout

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "SpanLayout",
    "adapter",
    "cross_attention",
    "prefix_attention",
    "prefix_attention_decode",
    "which",
]
