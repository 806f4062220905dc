"""The two layouts that describe a batch to the attention kernels.

``PackedLayout`` is for self-attention over one packed row of tokens. ``SpanLayout`` is for cross-attention: queries
attend to other tokens. Both are small int32 tables on the device. What a launch needs beside them are shapes, so no
kernel reads a device tensor on the host.
"""

from lynx_kernels.layout.base import require
from lynx_kernels.layout.packed import PackedLayout
from lynx_kernels.layout.spans import KEY_TILE, SpanLayout

__all__ = ["KEY_TILE", "PackedLayout", "SpanLayout", "require"]
