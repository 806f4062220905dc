"""The compiled kernels of attention."""

import re

import pytest
import torch

from lynx_kernels.ops.attention_common.triton import launches
from tests.compilation import table
from tests.compilation.cases import ATTENTION_CASES, FP32
from tests.compilation.offline import GFX942, SHARED_MEMORY, TENSOR_CORES

WITHOUT_PRODUCTS = {"attention_bwd_preprocess_kernel", "attention_combine_kernel"}
HALF = [case for case in ATTENTION_CASES if case.compute != FP32]
# The allowed spilled bytes in half precision, by kernel, GPU and head_dim. For all others 0, or WIDE_SPILLS.
SPILLS = {
    ("prefix_attention_fwd_kernel", 80, 128): 76,
    ("cross_attention_fwd_kernel", 80, 128): 28,
    ("prefix_attention_bwd_dq_kernel", GFX942, 128): 52,
    ("prefix_attention_bwd_dkdv_kernel", 80, 88): 60,
    ("prefix_attention_bwd_dkdv_kernel", 100, 88): 16,
    ("prefix_attention_bwd_dkdv_kernel", 100, 64): 8,
    ("prefix_attention_bwd_dkdv_kernel", GFX942, 88): 8,
    ("cross_attention_bwd_dkdv_kernel", 80, 88): 96,
    ("cross_attention_bwd_dkdv_kernel", GFX942, 88): 16,
    # ptxas leaves most registers unused here. Two stages mend it, but spill on sm_100; 32 keys spill nowhere, but use
    # older tensor cores on sm_90.
    ("prefix_attention_bwd_dkdv_kernel", 80, 192): 21660,
    ("prefix_attention_bwd_dq_kernel", GFX942, 512): 1648,
    ("prefix_attention_bwd_dkdv_kernel", GFX942, 512): 2172,
}
# With a head_dim above 128 accumulators take twice the registers. In fp32 operands are in registers too.
WIDE_SPILLS, SINGLE_SPILLS, WIDE_SINGLE_SPILLS = 1300, 1300, 12000


def test_cases_cover_every_launch():
    shipped = {each for each in vars(launches).values() if isinstance(each, launches.Launch)}
    compiled = {row.launch for case in ATTENTION_CASES for row in table.results(case, 90)}
    for launch in shipped:
        cut = f"BLOCK_M={launch.block_m}, BLOCK_N={launch.block_n}, "
        cut += f"num_warps={launch.num_warps}, num_stages={launch.num_stages}"
        assert any(cut in each for each in compiled), launch


def test_small_m_has_its_own_launches():
    small_m = launches.SMALL_M_FWD, launches.SMALL_M_BWD_DQ
    for queries, spans, expected in [(32, True, True), (33, True, False), (32, False, False)]:
        chosen = launches.choose_launches(128, torch.bfloat16, queries, 1, spans)
        assert (chosen[:2] == small_m) == expected


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision(case, arch):
    for row in table.results(case, arch):
        if row.kernel in WITHOUT_PRODUCTS:
            continue
        assert {"mma.sync", TENSOR_CORES[arch]} & {*row.instructions}, row
        assert table.SERIALIZED not in row.instructions, row


@pytest.mark.parametrize("arch", table.ARCHS)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_spills(case, arch):
    for row in table.results(case, arch):
        head_dim = int(re.findall(r"\bD=(\d+)", row.launch)[0])
        if case.compute == FP32:
            most = SINGLE_SPILLS if head_dim <= 128 else WIDE_SINGLE_SPILLS
        else:
            most = SPILLS.get((row.kernel, arch, head_dim), 0 if head_dim <= 128 else WIDE_SPILLS)
        assert row.spilled <= most, row


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", [case for case in HALF if case.operation != "prefix_attention_decode"], ids=str)
def test_tiles_of_64_rows_use_the_newest_tensor_cores(case, arch):
    """Except where rows are not aligned for vector loads."""
    for row in table.results(case, arch):
        if row.kernel not in WITHOUT_PRODUCTS and "UNIT=8" in row.launch and "BLOCK_M=32, BLOCK_N=32" not in row.launch:
            assert TENSOR_CORES[arch] in row.instructions, row


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", [case for case in HALF if case.operation == "prefix_attention_decode"], ids=str)
def test_decoding_loads_keys_asynchronously(case, arch):
    """Asynchronous copies of 16 bytes, because Triton knows the alignment of the cache's strides."""
    decode, _ = table.results(case, arch)
    assert ("cp.async.cg" in decode.instructions) == ("num_stages=1" not in decode.launch)
