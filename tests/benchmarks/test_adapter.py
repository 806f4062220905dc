"""The benchmark of the adapter: its peers at tiny sizes, and how work is counted."""

from functools import partial

import pytest
import torch

from benchmarks import memory
from benchmarks.adapter import _flops, cases, setup
from lynx_kernels import adapter
from lynx_kernels.backends import onednn


def test_cases_ask_what_fits():
    asked = list(cases(quick=False, device="cpu"))
    assert {each.mode for each in asked} == {"forward", "train"}
    assert {each.shape.split("T=")[1] for each in asked} == {"1", "4", "16", "64", "512", "2048", "8192", "65536"}
    assert any("max-autotune" in each.providers for each in asked)
    assert not any("max-autotune" in each.providers for each in cases(quick=True, device="cpu"))
    assert _flops("forward", 2, 3, 5) == 2 * (2 * 2 * 3 * 5)
    assert _flops("train", 2, 3, 5) == 3 * _flops("forward", 2, 3, 5)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_checks_its_providers(mode, dtype, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.cache_size", lambda device: 2**18)
    case = setup(mode, 70, 64, 32, dtype, "cpu", ("eager", "compile"))
    # Not every CPU has products in bf16: there the operation's own choice is the reference.
    ours = ["lynx cpu"] if dtype == torch.float32 or onednn.HAS_BF16 else []
    assert list(case.providers) == ["eager", "compile", *ours, "lynx reference", "matmuls"]
    assert (len(case.copies), case.traffic, case.floors) == (1, 0, ("matmuls",))
    for name in ("eager", *ours, "lynx reference", "matmuls"):  # not compile: it takes seconds
        case.check(name)
        case.providers[name](case.copies[0])
    few = setup(mode, 3, 64, 32, dtype, "cpu", ("eager",))
    assert len(few.copies) > 1
    assert few.flops == 0
    parameters = sum(each.numel() for each in few.copies[0][1:])
    numbers = parameters + 2 * 3 * 64 if mode == "forward" else 3 * parameters + 5 * 3 * 64 + 2 * 3 * 32
    assert few.traffic == numbers * dtype.itemsize
    if mode == "train":
        x, preactivation, statistics = 70 * 64 * dtype.itemsize, 70 * 32 * dtype.itemsize, 2 * 70 * 4
        call = partial(case.providers["lynx reference"], case.copies[0])
        assert memory.saved(call, case.parameters) == x + preactivation + statistics

    def doubled(*inputs, impl=None):
        return 2 * adapter(*inputs, impl=impl)

    monkeypatch.setattr("benchmarks.adapter.adapter", doubled)
    case = setup(mode, 70, 64, 32, dtype, "cpu", ("eager",))
    with pytest.raises(AssertionError, match="output: error"):
        case.check("lynx reference")
