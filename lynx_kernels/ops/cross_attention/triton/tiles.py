"""The queries of a program and the keys that they see, in cross_attention."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.tiles import find_block


@triton.jit
def tile_of_queries(p_segments, n_segments, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first query of this program, the end of its segment, and the first key and the end of its split of the span.

    The end is at most the first query if there is no work. The number of splits is the third dimension of the grid.
    """
    i_segment, i_block = find_block(p_segments, 3, n_segments, tl.program_id(0), BLOCK_M)
    p_row = p_segments + i_segment.to(tl.int64) * 3
    i_key = tl.load(p_row + 1)
    i_key_end = tl.load(p_row + 2)
    split_size = tl.cdiv(tl.cdiv(i_key_end - i_key, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    i_key = tl.minimum(i_key + tl.program_id(2) * split_size, i_key_end)
    return tl.load(p_row) + i_block * BLOCK_M, tl.load(p_row + 3), i_key, tl.minimum(i_key + split_size, i_key_end)
