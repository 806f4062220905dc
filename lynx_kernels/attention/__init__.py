"""Attention over packed rows, over spans of other tokens, and over a cache whose roots are shared."""

from lynx_kernels.attention.cross import cross_attention
from lynx_kernels.attention.decode import prefix_attention_decode
from lynx_kernels.attention.prefix import prefix_attention

__all__ = ["cross_attention", "prefix_attention", "prefix_attention_decode"]
