"""The same cases under pytest-benchmark: ``python -m pytest benchmarks --benchmark-enable -k "forward and T64"``.

Names are without "=", which ``-k`` does not know. Each provider is checked, then timed as a Python caller waits for it,
launches included. Providers do not take turns here: for ratios run ``python -m benchmarks``.
"""

from functools import lru_cache
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.__main__ import OPERATIONS, device
from benchmarks.harness import Case, Setup
from benchmarks.timing import running_on

CASES = [case for cases in OPERATIONS.values() for case in cases(quick=False, device=device())]


@lru_cache(maxsize=1)  # the providers of a case come one after another
def _built(case: Case) -> Setup:
    return case.build()


@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, name, id=f"{case} {name}".replace("=", "")) for case in CASES for name in case.providers],
)
def test_speed(case: Case, provider: str, benchmark: BenchmarkFixture) -> None:
    if benchmark.disabled:
        pytest.skip("timed only with --benchmark-enable")
    if case.left_out:
        pytest.skip(case.left_out)
    setup = _built(case)
    if provider not in setup.providers:
        pytest.skip(f"{provider} cannot run this case")
    call, copies = setup.providers[provider], cycle(setup.copies)

    def run() -> None:
        call(next(copies))
        if setup.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    with running_on(setup.threads):
        setup.check(provider)
        benchmark(run)
