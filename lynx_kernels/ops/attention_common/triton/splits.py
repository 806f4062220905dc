"""Splitting the keys, where query tiles alone are too few to fill a GPU; and the kernel that combines the splits."""

import triton
import triton.language as tl
from torch import Tensor

# Two programs per multiprocessor of an H100 or H200 (132), so that each hides the other's loads. Not measured.
_PROGRAMS = 264
_COMBINED_ROWS = 4


def choose_num_splits(programs: int, keys: int, block_n: int) -> int:
    """The number of splits for ``keys`` (an upper bound), given the number of programs that run per split."""
    return max(1, min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(keys, block_n)))


def combine(split_out: Tensor, split_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Combine fp32 split_out (num_splits, ..., D) and split_lse (num_splits, ...) into out (..., D) and lse (...)."""
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
    """Combine the results over splits of the keys: out = sum over splits of exp(split LSE - LSE) * split out."""
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
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BD], dtype=tl.float32)
    o_split = o_row
    for _ in range(n_splits):
        b_factor = tl.exp(tl.load(p_split_lse + o_split, mask=m_row, other=float("-inf")) - b_max)
        b_sum += b_factor
        b_out += b_factor[:, None] * tl.load(p_split_out + o_split[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        o_split += n_rows
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_row, b_max + tl.log(b_sum), mask=m_row)
