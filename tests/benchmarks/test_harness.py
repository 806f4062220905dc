"""The frame, on invented providers, clocks and rows."""

from dataclasses import replace

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.adapter import _case, _inputs
from benchmarks.harness import Case, Row, append, measure, read, table
from lynx_kernels import adapter


class Machine:
    """A clock that providers move; ``slow`` multiplies everything in some rounds."""

    def __init__(self):
        self.now, self.order, self.slow = 0.0, [], 1.0

    def provider(self, name, seconds):
        def call():
            self.order.append(name)
            self.now += seconds * self.slow

        return call


def row(**changed):
    return replace(
        Row("adapter", "eager", "forward", "ratio", "fp32 T=1", 1, 1, 1, "A", "torch 1", "abc", "2026-01-01"), **changed
    )


def timed(provider, microseconds, ratio, **changed):
    return [
        row(provider=provider, metric="time", p20=microseconds, p50=microseconds, p80=microseconds, **changed),
        row(provider=provider, p20=ratio, p50=ratio, p80=ratio, **changed),
    ]


def test_ratio_is_taken_within_rounds_of_interleaved_providers():
    machine = Machine()
    slow = machine.provider("slow", 0.2)

    def base():
        machine.slow = 1 + machine.order.count("base") % 3  # each round another speed, the same for both
        slow_before()

    slow_before = machine.provider("base", 0.1)
    rows = measure(Case("k", "m", "s", {"base": base, "slow": slow}), rounds=6, clock=lambda: machine.now)
    found = {(each.provider, each.metric): each for each in rows}
    assert [found["slow", "ratio"].p20, found["slow", "ratio"].p80] == pytest.approx([0.5, 0.5])
    assert found["base", "time"].p80 > found["base", "time"].p20
    assert machine.order[-12:] == ["base", "slow"] * 6


def test_percentiles_and_units():
    machine, durations = Machine(), iter([1, 1, 1, *range(1, 12)])

    def call():
        machine.now += next(durations)

    time, _ = measure(Case("k", "m", "s", {"only": call}), rounds=11, clock=lambda: machine.now)
    assert (time.p20, time.p50, time.p80) == pytest.approx((3e6, 6e6, 9e6))


def test_a_wrong_provider_is_not_timed():
    machine = Machine()

    def check(name):
        assert name != "bad", "off by one"

    providers = {name: machine.provider(name, 0.1) for name in ("base", "bad")}
    rows = measure(Case("k", "m", "s", providers, check), rounds=3, clock=lambda: machine.now)
    assert "bad" not in machine.order
    assert [(each.provider, each.metric) for each in rows] == [("base", "time"), ("base", "ratio"), ("bad", "wrong")]
    assert "WRONG  bad: off by one" in table(rows)
    assert rows[-1].note == "off by one"


def test_without_its_baseline_a_case_has_no_ratios():
    def check(name):
        assert name != "base"

    rows = measure(Case("k", "m", "s", {"base": list, "other": list}, check), rounds=2)
    assert [(each.provider, each.metric) for each in rows] == [("base", "wrong"), ("other", "time")]


def test_rows_survive_the_file(tmp_path):
    rows = [row(), row(metric="wrong", note='a "quoted", note', time="2026-01-02")]
    for each in rows:
        append([each], tmp_path / "adapter.csv")
    assert read(tmp_path) == rows


def test_report_keeps_machines_apart_and_shows_losses(tmp_path):
    results = tmp_path / "results"
    old, new = {"time": "2026-01-01"}, {"time": "2026-01-02"}
    append(timed("eager", 10, 1, **old) + timed("stale", 2, 5, **old), results / "a.csv")
    append(
        timed("eager", 10, 1, **new) + timed("cpu", 20, 0.5, **new) + timed("matmuls", 1, 10, **new), results / "a.csv"
    )
    append(timed("eager", 7, 1, device="B") + timed("cpu", 1, 7, device="B"), results / "a.csv")
    append([row(provider="cpu", metric="wrong", note="nonsense", device="C")], results / "a.csv")
    text = report.write(results).read_text()
    on_a, on_b, on_c = text.split("\n## ")[1:]
    assert "| fp32 T=1 | 10 | **0.50 (0.50-0.50)** | 10.00 (10.00-10.00) |" in on_a
    assert "stale" not in text  # the older run
    assert "cpu takes 2.00 times the time of eager" in on_a
    assert "| fp32 T=1 | 7 | 7.00 (7.00-7.00) |" in on_b
    assert "None: in every case" in on_b
    assert "cpu is WRONG: nonsense" in on_c
    assert (tmp_path / "plots" / "adapter-forward-0.png").stat().st_size > 1000


def test_one_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["adapter", "--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_case_checks_its_providers(mode, dtype, monkeypatch):
    case = _case(mode, "tiny", _inputs(70, 64, 32, dtype, "cpu"), max_autotune=False)
    assert list(case.providers) == ["eager", "compile", "cpu", "reference", "matmuls"]
    for name in ("eager", "cpu", "reference", "matmuls"):  # not compile: it takes seconds
        case.check(name)
        case.providers[name]()

    def doubled(*inputs, impl=None):
        return 2 * adapter(*inputs, impl=impl)

    monkeypatch.setattr("benchmarks.adapter.adapter", doubled)
    case = _case(mode, "tiny", _inputs(70, 64, 32, dtype, "cpu"), max_autotune=False)
    with pytest.raises(AssertionError, match="output: error"):
        case.check("cpu")
