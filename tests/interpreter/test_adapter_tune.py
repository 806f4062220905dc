"""The search for launches, with a fake clock."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from lynx_kernels.ops.adapter import triton as implementation
from lynx_kernels.ops.adapter.triton import launches, tune
from lynx_kernels.ops.adapter.triton.launches import Launch, Plan

START = Plan("fused", Launch(16, 32, 16, 4, 2), Launch(16, 32, 16, 4, 2))


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock for which four stages are fastest, two steps from START. The search starts there, without tuned plans."""
    monkeypatch.setattr(launches, "TUNED", tmp_path / "tuned.json")
    monkeypatch.setattr(launches, "plan_by_rule", lambda call: START)
    monkeypatch.setattr(tune, "initial_plans", lambda call: [START])
    current = []
    use = launches.use_plan
    monkeypatch.setattr(launches, "use_plan", lambda call, plan: (current.append(plan), use(call, plan)))
    _forget()
    yield lambda run: 1 + abs(current[-1].down.num_stages - 4)
    _forget()


def _forget():
    launches.tuned_plans.cache_clear()
    launches.choose_plan.cache_clear()


def inputs(tokens=20, width=64, bottleneck=32, dtype=torch.float16):
    return tune.make_inputs(tokens, width, bottleneck, dtype, dtype, "cpu")


def test_fastest_plan_is_used_and_stored(clock, tmp_path):
    results = tune.tune(inputs(), clock)
    forward, backward = results
    assert (forward.direction, backward.direction) == ("forward", "backward")
    best = min(results[forward], key=results[forward].get)
    assert best == Plan("fused", Launch(16, 32, 16, 4, 4), Launch(16, 32, 16, 4, 4))
    assert math.inf not in results[forward].values()
    assert launches.choose_plan(forward) == best

    tune.store(results, tmp_path / "tuned.json")
    assert set(json.loads((tmp_path / "tuned.json").read_text())) == {forward.key(), backward.key()}
    _forget()
    assert launches.choose_plan(forward) == best
    assert launches.choose_plan(implementation.describe("forward", *(inputs(30)[i] for i in (0, 3, 5)))) == best
    for other in (inputs(33), inputs(20, 32), inputs(dtype=torch.float32)):  # another bucket, shape, dtype
        call = implementation.describe("forward", *(other[i] for i in (0, 3, 5)))
        assert launches.choose_plan(call) == launches.plan_by_rule(call)
    assert "by rule" in tune.table(results)

    tune.store({}, tmp_path / "tuned.json")
    assert len(json.loads((tmp_path / "tuned.json").read_text())) == 2


def test_wrong_or_failing_plans_never_win(clock, monkeypatch):
    def broken(call, forward=implementation.forward):
        plan = launches.choose_plan(implementation.describe("forward", call.x, call.down_weight, call.up_weight))
        down = plan.down
        if down.num_stages == 3:
            raise OutOfResources(1, 2, "shared memory")
        out, *saved = forward(call)
        return (out + 0.1 if down.num_warps == 8 else out), *saved

    monkeypatch.setattr(implementation, "forward", broken)
    forward, _ = results = tune.tune(inputs(), lambda run: 1.0)
    times = results[forward]
    assert launches.choose_plan(forward) == START
    failed = {(plan.down.num_warps, plan.down.num_stages) for plan, time in times.items() if time == math.inf}
    assert failed == {(8, 2), (4, 3)}


def test_unaligned_shapes_raise(clock):
    with pytest.raises(ValueError, match="d=40, r=32 and all row strides must be multiples of 16"):
        tune.tune(inputs(width=40), clock)


def test_neighbours():
    fused = Plan("fused", Launch(32, 64, 16, 4, 1), Launch(32, 64, 16, 4, 1))
    near = list(tune.neighbours(fused, torch.float32))
    assert all(each.down.block_n == 64 and each.down.num_splits == 1 for each in near)
    assert max(each.down.block_m for each in near) == 32  # 64 would compile to TF32
    assert max(each.down.block_m for each in tune.neighbours(fused, torch.float16)) == 64
    assert min(each.down.num_stages for each in near) == 1
    assert len(near) == len(set(near)) == 5


def test_every_supported_form_is_tried():
    def forms(direction, bottleneck):
        call = implementation.describe(direction, *(inputs(bottleneck=bottleneck)[i] for i in (0, 3, 5)))
        return {plan.form for plan in tune.initial_plans(call)}

    assert forms("forward", 256) == {"tiled", "small_m", "fused"}
    assert forms("forward", 272) == {"tiled", "small_m"}
    assert forms("backward", 256) == {"tiled", "fused"}


def test_without_a_gpu():
    command = [sys.executable, "-m", "lynx_kernels.ops.adapter.triton.tune", "8x64x32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PyTorch finds no GPU on this machine" in done.stderr


def test_plans_are_kept_in_the_cache_folder():
    """Not in the installed package, which may belong to another user."""
    code = "from lynx_kernels.ops.adapter.triton import launches; print(launches.TUNED)"
    environment = {**os.environ, "LYNX_CACHE": "/somewhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "/somewhere/adapter-tuned.json"


def test_interrupted_store_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new/tuned.json"
    tune.store({}, path)
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune.store({}, path)
    assert json.loads(path.read_text()) == {}
