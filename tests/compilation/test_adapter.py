"""The compiled kernels of the adapter, and the launches that the rules choose."""

import pytest
import torch

from lynx_kernels.ops.adapter import triton as implementation
from lynx_kernels.ops.adapter.triton import launches
from lynx_kernels.ops.adapter.triton.launches import Call, Launch, plan_by_rule
from tests.compilation import table
from tests.compilation.cases import ADAPTER_CASES, FP32
from tests.compilation.offline import GFX942, SHARED_MEMORY, TENSOR_CORES

BF16 = torch.bfloat16
WITHOUT_PRODUCTS = {"adapter_fwd_stats_kernel", "adapter_fwd_small_m_combine_kernel", "adapter_bwd_weight_rows_kernel"}
FOR_SM_86 = 99 << 10  # code for sm_80 also runs on sm_86, sm_89 and sm_120, which have less shared memory
# Spilled bytes. 0 for all other kernels, and on NVIDIA's GPUs, for which the launches were chosen.
GFX942_SPILLS = {"adapter_fwd_down_kernel": 48, "adapter_fwd_fused_kernel": 540, "adapter_bwd_fused_kernel": 136}
every_case = pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)


def test_cases_cover_every_launch():
    tables = [each for each in vars(launches).values() if isinstance(each, dict)]
    shipped = {each for found in (vars(launches), *tables) for each in found.values() if isinstance(each, Launch)}
    compiled = {row.launch for case in ADAPTER_CASES for row in table.results(case, 90)}
    for launch in shipped:
        cut = ", ".join(f"{name}={value}" for name, value in implementation._tile(launch).items())
        assert any(cut in each for each in compiled), launch


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
@pytest.mark.parametrize(("width", "bottleneck"), [(4096, 2048), (4096, 256), (1024, 512), (8192, 4096)])
def test_small_m_occupies_the_gpu(width, bottleneck, tokens, multiprocessors):
    """Up to 32 tokens: every weight is in one tile of one split, and nearly every multiprocessor has a program."""
    call = Call("forward", tokens, width, bottleneck, BF16, BF16, True, multiprocessors=multiprocessors)
    plan = plan_by_rule(call)
    assert plan.form == "small_m"
    assert plan.down.block_m >= min(tokens, 32)
    assert plan.up.block_m >= tokens
    steps = width // plan.down.block_k
    tiles = bottleneck // plan.down.block_n
    assert plan.down.programs(tokens, bottleneck) >= min(2 * multiprocessors, tiles * steps)
    assert plan.down.num_splits <= steps


@pytest.mark.parametrize("arch", table.ARCHS)
@every_case
def test_nothing_spills(case, arch):
    for row in table.results(case, arch):
        assert row.spilled <= (GFX942_SPILLS.get(row.kernel, 0) if arch == GFX942 else 0), row


@every_case
def test_fits_smaller_gpus(case):
    assert all(row.shared <= FOR_SM_86 for row in table.results(case, 80))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", [case for case in ADAPTER_CASES if case.compute != FP32], ids=str)
def test_half_precision(case, arch):
    """Every product is on tensor cores and none is serialised. From tiles of 64 rows on, products use the newest
    instructions of the architecture."""
    for row in table.results(case, arch):
        if row.kernel in WITHOUT_PRODUCTS:
            continue
        assert {"mma.sync", TENSOR_CORES[arch]} & {*row.instructions}, row
        assert table.SERIALIZED not in row.instructions, row
        if "BLOCK_M=64" in row.launch or "BLOCK_M=128" in row.launch:
            assert TENSOR_CORES[arch] in row.instructions, row
