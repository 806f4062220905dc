"""Split keys: where tiles of queries alone are too few to fill a GPU. And the kernel that combines the splits."""

import triton
import triton.language as tl
from torch import Tensor

# Two programs for each of the 132 multiprocessors of an H100 or H200, to hide each other's loads. Not measured.
_PROGRAMS = 264
_COMBINED_ROWS = 4


def choose_num_splits(programs: int, keys: int, block_n: int) -> int:
    """How many splits ``keys`` (an upper bound) are cut into, given the programs that run for each split."""
    return max(1, min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(keys, block_n)))


def combine(split_out: Tensor, split_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write to out (..., D) and lse (...) what split_out (num_splits, ..., D) and split_lse, in fp32, amount to."""
    n_rows, head_dim = lse.numel(), out.shape[-1]
    attention_combine_kernel[(triton.cdiv(n_rows, _COMBINED_ROWS),)](
        split_out, split_lse, out, lse, split_out.shape[0], n_rows,
        D=head_dim, BD=triton.next_power_of_2(head_dim), BLOCK_M=_COMBINED_ROWS,
    )  # fmt: skip


@triton.jit
def attention_combine_kernel(
    p_split_out,  # (num_splits, rows, D) fp32
    p_split_lse,  # (num_splits, rows)
    p_out,  # (rows, D)
    p_lse,  # (rows,)
    n_splits,
    n_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The result over all keys from the results over splits of them: outputs weighted by exp(their LSE - the LSE)."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < n_rows
    o_d = tl.arange(0, BD)
    m_tile = m_row[:, None] & (o_d[None, :] < D)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    o_split = o_row
    for _ in range(n_splits):
        b_max = tl.maximum(b_max, tl.load(p_split_lse + o_split, mask=m_row, other=float("-inf")))
        o_split += n_rows
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # no split has a key
    b_weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, BD], dtype=tl.float32)
    o_split = o_row
    for _ in range(n_splits):
        b_split = tl.exp(tl.load(p_split_lse + o_split, mask=m_row, other=float("-inf")) - b_max)
        b_weight += b_split
        b_sum += b_split[:, None] * tl.load(p_split_out + o_split[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        o_split += n_rows
    b_sum = b_sum / tl.where(b_weight == 0, 1.0, b_weight)[:, None]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_row, b_max + tl.log(b_weight), mask=m_row)
