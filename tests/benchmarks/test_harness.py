"""The frame, on invented providers, clocks and rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, memory, timing
from benchmarks.__main__ import OPERATIONS, main
from benchmarks.harness import Case, Setup, measure
from benchmarks.rows import Row, _commit, append, newest, read


class Machine:
    """A clock that providers move; ``slow`` multiplies everything in some rounds."""

    def __init__(self):
        self.now, self.order, self.slow = 0.0, [], 1.0

    def provider(self, name, seconds):
        def call():
            self.order.append(name)
            self.now += seconds * self.slow

        return call


def case(providers, **changed):
    calls = {name: (lambda inputs, call=call: call()) for name, call in providers.items()}
    return Case("k", "m", "fp32 T=1", lambda: Setup(calls, **changed))


def run(machine, providers, rounds=6, **changed):
    def timer(call, repeats):
        start = machine.now
        for _ in range(repeats):
            call()
        return (machine.now - start) / repeats

    return measure(case(providers, **changed), rounds=rounds, timer=timer)


def found(rows):
    return {(each.provider, each.metric): each for each in rows}


def test_ratio_is_taken_within_rounds_of_interleaved_providers():
    machine = Machine()
    fast = machine.provider("base", 0.1)

    def base():
        machine.slow = 1 + machine.order.count("base") % 3  # each round another speed, the same for both
        fast()

    rows = found(run(machine, {"base": base, "lynx slow": machine.provider("lynx slow", 0.2)}))
    ratio = rows["lynx slow", "ratio to base"]
    assert [ratio.p20, ratio.p80] == pytest.approx([0.5, 0.5])
    assert rows["base", "time"].p80 > rows["base", "time"].p20


def test_providers_take_turns():
    machine = Machine()
    times = harness._time(
        {name: timing.Batch(machine.provider(name, 0.1)) for name in "ab"}, 4, lambda call, repeats: call() or 1.0
    )
    assert machine.order[-8:] == ["a", "b"] * 4
    assert times == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_a_batch_of_several_calls_counts_as_many_and_says_how(monkeypatch):
    machine = Machine()
    whole = timing.Batch(machine.provider("graph", 0.8), calls=8, note="CUDA graph")
    monkeypatch.setattr(harness, "batches", lambda entrants, captured: {"eager": whole})
    [time] = [each for each in run(machine, {"eager": list}) if each.metric == "time"]
    assert (time.p50, time.note) == (pytest.approx(1e5), "CUDA graph")


def test_rounds_are_fewer_where_they_take_long():
    for seconds, expected in ((0.1, 20), (1.0, 10), (50.0, 5)):
        machine = Machine()
        run(machine, {"only": machine.provider("only", seconds)}, rounds=20)
        assert len(machine.order) - 3 - 2 == expected  # warm-up and estimate, then two calls for the peak memory


def test_percentiles_and_units():
    machine, durations = Machine(), iter([1, 1, 1, *range(1, 12), 1, 1])

    def call():
        machine.now += next(durations) * 0.01

    time = found(run(machine, {"only": call}, rounds=11))["only", "time"]
    assert (time.p20, time.p50, time.p80) == pytest.approx((3e4, 6e4, 9e4))


def test_rates_and_shares_of_floors(monkeypatch):
    machine = Machine()
    copy = machine.provider("copy", 0.05)
    monkeypatch.setattr(harness, "copying", lambda traffic, device: (lambda _: copy(), [None]))
    providers = {name: machine.provider(name, s) for name, s in {"eager": 0.4, "lynx a": 0.2, "matmuls": 0.1}.items()}
    rows = found(run(machine, providers, floors=("matmuls",), flops=4e11, traffic=2e9, items=6e5, frames=8, tokens=3))
    value = {key: each.p50 for key, each in rows.items()}
    assert value["lynx a", "TFLOP/s"] == pytest.approx(2)
    assert value["lynx a", "GB/s"] == pytest.approx(10)
    assert value["lynx a", "M items/s"] == pytest.approx(3)
    assert value["lynx a", "frames/s"] == pytest.approx(40)
    assert value["lynx a", "tokens/s"] == pytest.approx(15)
    assert value["lynx a", "share of matmuls"] == pytest.approx(0.5)
    assert value["lynx a", "share of copy"] == pytest.approx(0.25)
    assert value["lynx a", "ratio to eager"] == pytest.approx(2)
    assert value["matmuls", "ratio to eager"] == pytest.approx(4)
    assert ("lynx a", "ratio to matmuls") not in rows  # a floor is no peer
    assert ("copy", "peak memory") not in rows
    assert ("lynx a", "saved memory") not in rows  # nothing said to be trained


def test_ours_is_compared_with_every_peer_and_a_peer_with_the_baseline():
    machine = Machine()
    providers = {n: machine.provider(n, s) for n, s in {"eager": 0.4, "compile": 0.1, "lynx a": 0.2}.items()}
    ratios = {key: each.p50 for key, each in found(run(machine, providers)).items() if key[1].startswith("ratio")}
    assert ratios == pytest.approx(
        {
            ("eager", "ratio to eager"): 1, ("compile", "ratio to eager"): 4,
            ("lynx a", "ratio to eager"): 2, ("lynx a", "ratio to compile"): 0.5,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "metric", "note"),
    [
        (AssertionError("off by one\nand more"), "wrong", "off by one"),
        (AssertionError(), "wrong", "no message"),
        (RuntimeError("no compiler"), "failed", "RuntimeError: no compiler"),
    ],
)
def test_a_wrong_or_failing_provider_is_not_timed(error, metric, note):
    machine = Machine()

    def check(name):
        if name == "bad":
            raise error

    rows = run(machine, {name: machine.provider(name, 0.1) for name in ("base", "bad")}, check=check)
    assert "bad" not in machine.order
    [bad] = [each for each in rows if each.provider == "bad"]
    assert (bad.metric, bad.note) == (metric, note)


def test_without_its_baseline_a_case_has_no_ratios():
    def check(name):
        assert name != "base"

    rows = measure(case({"base": list, "other": list}, check=check), rounds=2)
    assert not [each for each in rows if each.metric.startswith("ratio")]


def test_copies_are_cold_and_providers_share_their_turn(monkeypatch):
    monkeypatch.setattr(timing, "cache_size", lambda device: 1000)
    copies = timing.cold_copies([torch.ones(100, requires_grad=True), torch.ones(25)], "cpu")
    assert len(copies) == 8  # of 500 bytes: four caches
    assert len({each[0].data_ptr() for each in copies}) == 8
    assert [each.requires_grad for each in copies[-1]] == [True, False]
    call, pairs = timing.copying(800, "cpu")
    assert sum(each.nbytes for each in pairs[0]) == 800
    assert sum(source.nbytes + target.nbytes for source, target in pairs) >= 4000
    pairs[0][0].fill_(7)
    call(pairs[0])
    assert pairs[0][1].eq(7).all()
    seen = []
    made = timing.batches({name: (seen.append, numbers) for numbers in [[1, 2, 3]] for name in "ab"}, captured=False)
    for name in "abba":
        made[name].run()
    assert seen == [1, 2, 3, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here capturing works")
def test_what_cannot_be_captured_is_launched_and_says_so():
    seen = []
    batch = timing.batches({"a": (seen.append, [1])}, captured=True)["a"]
    batch.run()
    assert seen[-1] == 1
    assert batch.calls == 1
    assert batch.note.startswith("launched from Python: ")


def test_peak_memory_counts_what_lives_at_one_time():
    x = torch.ones(256, 1024)  # 1 MiB

    def call():
        y = x + 1
        z = y * y
        del y
        return z - 1

    assert memory.peak(call, "cpu") / 2**20 == pytest.approx(2, abs=0.01)
    assert memory.peak(lambda: x.view(-1), "cpu") == 0


def test_saved_memory_counts_storages_once_and_no_parameters():
    x, weight = torch.ones(256, 1024, requires_grad=True), torch.ones(1024, 1024, requires_grad=True)

    def call():
        hidden = x @ weight
        torch.autograd.grad((hidden * hidden * hidden[:128].repeat(2, 1)).sum(), [x, weight])

    # x, hidden, its square and the repeated half; each once, however often it is saved.
    assert memory.saved(call, [weight]) / 2**20 == 4
    assert memory.saved(call, [weight, x]) / 2**20 == 3


def test_rows_survive_the_file_and_the_newest_run_counts(tmp_path):
    old = Row("adapter", "eager", "forward", "time", "fp32 T=1", 1, 2, 3, "A", "torch 1", "abc", "2026-01-01")
    rows = [old, replace(old, metric="wrong", note='a "quoted", note', time="2026-01-02"), replace(old, device="B")]
    for each in rows:
        append([each], tmp_path / "adapter.csv")
    assert sorted(read(tmp_path), key=str) == sorted(rows, key=str)
    assert newest(read(tmp_path)) == [rows[2], rows[1]]
    assert (old.group, old.grows) == ("fp32", ("T", 1))


def test_a_changed_tree_marks_its_commit(monkeypatch):
    for changed, expected in (("", "abc1234"), (" M x.py", "abc1234-dirty")):
        monkeypatch.setattr(
            "subprocess.run",
            lambda command, changed=changed, **_: SimpleNamespace(
                stdout=changed if command[1] == "status" else "abc1234\n"
            ),
        )
        assert _commit() == expected


def test_one_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["adapter", "--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_command_line_keeps_what_was_measured_and_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    build = case({"eager": list, "lynx a": list}).build
    found = [
        Case("k", "forward", "fp32 T=1", build),
        Case("k", "forward", "fp32 T=9", build, seconds=3.0),
        Case("k", "train", "fp32 T=1", stop),
        Case("k", "forward", "fp32 T=2", build),
    ]
    monkeypatch.setitem(OPERATIONS, "adapter", lambda quick, device: iter(found))
    with pytest.raises(SystemExit, match="Stopped; the cases"):
        main(["adapter", "--rounds", "2", "--results", str(tmp_path / "results")])
    assert {each.shape for each in read(tmp_path / "results")} == {"fp32 T=1"}
    assert "k forward fp32 T=9: left out: a call would take about 3.0 s, more than 2" in capsys.readouterr().out
    main(["adapter", "--rounds", "2", "--only", "forward fp32 T=2", "--results", str(tmp_path / "only")])
    assert {each.shape for each in read(tmp_path / "only")} == {"fp32 T=2"}
