"""Keys split in parts, where tiles of queries alone are too few to fill a GPU, and what puts the parts together."""

import triton
import triton.language as tl
from torch import Tensor

# Two programs for each of the 132 multiprocessors of an H100 or H200, to hide each other's loads. Not measured.
_PROGRAMS = 264
_MERGED_ROWS = 4


def count_parts(programs: int, keys: int, block_keys: int) -> int:
    """How many parts ``keys`` (an upper bound) are cut into, given the programs that run for each part."""
    return max(1, min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(keys, block_keys)))


def merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write to out (..., D) and lse (...) what parts (parts, ..., D) and part_lse (parts, ...), in fp32, amount to."""
    n_rows, head_dim = lse.numel(), out.shape[-1]
    merge_kernel[(triton.cdiv(n_rows, _MERGED_ROWS),)](
        parts, part_lse, out, lse, parts.shape[0], n_rows,
        D=head_dim, BD=triton.next_power_of_2(head_dim), BROWS=_MERGED_ROWS,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    p_parts,  # (parts, rows, D) fp32
    p_part_lse,  # (parts, rows)
    p_out,  # (rows, D)
    p_lse,  # (rows,)
    n_parts,
    n_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    BROWS: tl.constexpr,
):
    """The result over all keys from the results over parts of them: outputs weighted by exp(their LSE - the LSE)."""
    o_row = tl.program_id(0).to(tl.int64) * BROWS + tl.arange(0, BROWS)
    m_row = o_row < n_rows
    o_d = tl.arange(0, BD)
    m_tile = m_row[:, None] & (o_d[None, :] < D)
    b_max = tl.full([BROWS], float("-inf"), dtype=tl.float32)
    o_part = o_row
    for _ in range(n_parts):
        b_max = tl.maximum(b_max, tl.load(p_part_lse + o_part, mask=m_row, other=float("-inf")))
        o_part += n_rows
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # no part has a key
    b_weight = tl.zeros([BROWS], dtype=tl.float32)
    b_sum = tl.zeros([BROWS, BD], dtype=tl.float32)
    o_part = o_row
    for _ in range(n_parts):
        b_part = tl.exp(tl.load(p_part_lse + o_part, mask=m_row, other=float("-inf")) - b_max)
        b_weight += b_part
        b_sum += b_part[:, None] * tl.load(p_parts + o_part[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        o_part += n_rows
    b_sum = b_sum / tl.where(b_weight == 0, 1.0, b_weight)[:, None]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_row, b_max + tl.log(b_weight), mask=m_row)
