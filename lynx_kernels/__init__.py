"""Kernels for multimodal language models: one import, one call, the same numbers out."""

from lynx_kernels.adapter import adapter
from lynx_kernels.attention import cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.dispatch import which
from lynx_kernels.embeddings import pack_embeddings
from lynx_kernels.frames import pack_frames
from lynx_kernels.layout import PackedLayout, SpanLayout
from lynx_kernels.loss import linear_cross_entropy
from lynx_kernels.packing import PackPlanner, plan_packs

__version__ = "0.1.0"

__all__ = [
    "PackPlanner",
    "PackedLayout",
    "SpanLayout",
    "adapter",
    "cross_attention",
    "linear_cross_entropy",
    "pack_embeddings",
    "pack_frames",
    "plan_packs",
    "prefix_attention",
    "prefix_attention_decode",
    "which",
]
