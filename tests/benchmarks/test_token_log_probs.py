from functools import partial

import pytest
import torch

from benchmarks import token_log_probs as bench
from benchmarks.harness import Case, measure


def tiny(mode="train", dtype=torch.float32):
    return bench.setup(mode, 40, 30, 8, 50, dtype, "cpu")


@pytest.mark.parametrize("mode", bench.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(mode, dtype):
    case = tiny(mode, dtype)
    assert {"plain", "plain rows", "lynx chunked", "lynx reference"} <= set(case.providers)
    assert "written for" in case.left_out["lynx triton"]
    for name in case.providers:
        if name != "compile":
            case.check(name)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_numbers_are_found(wrong, monkeypatch):
    def spoiled(hidden, weight, labels, predictors):
        factors = [1.5 if i == wrong else 1.0 for i in range(3)]
        hidden = hidden * factors[1] + (hidden * (1 - factors[1])).detach()
        weight = weight * factors[2] + (weight * (1 - factors[2])).detach()
        output = bench.plain(hidden, weight, labels, predictors)
        return output + (factors[0] - 1) * output.detach()

    monkeypatch.setattr(bench, "MAKERS", {"plain": lambda: bench.plain, "spoiled": lambda: spoiled})
    case = tiny()
    case.check("plain")
    with pytest.raises(AssertionError, match=["output", "gradient 0", "gradient 1"][wrong]):
        case.check("spoiled")


def test_work_is_that_of_the_rows_that_predict():
    for products, mode in enumerate(bench.MODES, 1):
        case = tiny(mode)
        assert case.flops == products * 2 * 20 * 30 * 8
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            case.providers["matmuls"](None)
        assert counter.get_total_flops() == case.flops


def test_cases(monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e12)
    for device in ("cpu", "cuda"):
        asked = list(bench.cases(quick=False, device=device))
        assert len({str(case) for case in asked}) == len(asked) == 12
        assert len(list(bench.cases(quick=True, device=device))) == 6
    rows = measure(Case("token_log_probs", "frozen", "fp32 d=8 tokens=50", partial(tiny, "frozen")), rounds=2)
    saved = {row.provider: row.p50 * 2**20 for row in rows if row.metric == "saved memory"}
    assert saved["lynx chunked"] == 20 * 8 * 4 + 2 * 20 * 8  # d log_prob / d hidden, labels and predictors
