import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from benchmarks import linear_cross_entropy as loss
from benchmarks.harness import Case, measure


def tiny(mode="train", dtype=torch.float32, device="cpu"):
    return loss.setup(mode, 40, 30, 8, 50, dtype, device)


@pytest.mark.parametrize("mode", ["frozen", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(mode, dtype):
    case = tiny(mode, dtype)
    assert {"plain", "plain rows", "lynx chunked", "lynx reference"} <= set(case.providers)
    for name in case.providers:
        if name != "compile":
            case.check(name)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_loss_or_gradient_is_found(wrong, monkeypatch):
    def spoiled(hidden, weight, labels):
        factors = [1.5 if i == wrong else 1.0 for i in range(3)]
        hidden = hidden * factors[1] + (hidden * (1 - factors[1])).detach()
        weight = weight * factors[2] + (weight * (1 - factors[2])).detach()
        output = loss.plain(hidden, weight, labels)
        return output + (factors[0] - 1) * output.detach()

    monkeypatch.setattr(loss, "MAKERS", {"plain": lambda: loss.plain, "spoiled": lambda: spoiled})
    case = tiny()
    case.check("plain")
    with pytest.raises(AssertionError, match=["output", "gradient 0", "gradient 1"][wrong]):
        case.check("spoiled")


def test_work_is_that_of_the_supervised_rows():
    for mode, products in (("frozen", 2), ("train", 3)):
        case = tiny(mode)
        assert case.flops == products * 2 * 20 * 30 * 8
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            case.providers["matmuls"](None)
        assert counter.get_total_flops() == case.flops
    _, _, labels = loss.make(4096, 30, 8, 5, torch.float32, "cpu")
    assert (labels != loss.IGNORED).sum() == 204


def test_who_cannot_run_is_left_out(monkeypatch):
    assert tiny().left_out["liger"] == "runs on GPUs only"
    assert loss.missing("liger", "cuda") in (None, "liger_kernel is not installed")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "has no linear_cross_entropy in chunks" in tiny().left_out["torch"]
    monkeypatch.setattr(loss, "_MOST_SECONDS", 0)
    case = tiny()
    assert "a call would take about" in case.left_out["plain"]
    assert "plain rows" in case.providers


def test_liger_is_called_rightly(monkeypatch):
    class Fused:
        def __init__(self, ignore_index):
            self.ignore_index = ignore_index

        def __call__(self, weight, hidden, labels):
            return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=self.ignore_index)

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers"].LigerFusedLinearCrossEntropyLoss = Fused
    monkeypatch.setattr(loss, "missing", lambda name, device: None if name == "liger" else "not now")
    tiny().check("liger")


def test_cases(monkeypatch):
    monkeypatch.setattr(loss, "matmul_rate", lambda device, dtype: 1e12)
    for device in ("cpu", "cuda"):
        asked = list(loss.cases(quick=False, device=device))
        assert len({str(case) for case in asked}) == len(asked) == (10 if device == "cpu" else 12)
        assert {case.mode for case in asked} == {"frozen", "train"}
        quick = [str(case) for case in loss.cases(quick=True, device=device)]
        assert len(quick) == 4
        assert all("T=256" in name for name in quick)
    rows = measure(Case("linear_cross_entropy", "frozen", "fp32 d=8 supervised=50", partial(tiny, "frozen")), rounds=2)
    saved = {row.provider: row.p50 * 2**20 for row in rows if row.metric == "saved memory"}
    assert saved["lynx chunked"] == 40 * 8 * 4 + 8  # the gradient of hidden, and the number of rows
