"""Kernels for multimodal language models: one import, one call, the same results."""

from lynx_kernels.backends.dispatch import explain
from lynx_kernels.layout import PackedLayout, SpanLayout
from lynx_kernels.ops.adapter import adapter
from lynx_kernels.ops.cross_attention import cross_attention
from lynx_kernels.ops.linear_cross_entropy import linear_cross_entropy
from lynx_kernels.ops.pack_embeddings import pack_embeddings
from lynx_kernels.ops.pack_frames import pack_frames
from lynx_kernels.ops.prefix_attention import prefix_attention
from lynx_kernels.ops.prefix_attention_decode import prefix_attention_decode
from lynx_kernels.ops.token_log_probs import token_log_probs
from lynx_kernels.packing import PackPlanner, plan_packs

__version__ = "0.1.0"

__all__ = [
    "PackPlanner",
    "PackedLayout",
    "SpanLayout",
    "adapter",
    "cross_attention",
    "explain",
    "linear_cross_entropy",
    "pack_embeddings",
    "pack_frames",
    "plan_packs",
    "prefix_attention",
    "prefix_attention_decode",
    "token_log_probs",
]
