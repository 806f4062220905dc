"""The commands that measure on a GPU run: the benchmarks, and the tuner of the adapter's launches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rows import OURS, read
from tests.gpu import bench

ROOT = Path(__file__).parents[2]


def run(*command):
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_benchmark(what, only, folder):
    """Run a benchmark with few rounds. Our implementations must be correct in every case, and have times."""
    run("benchmarks", what, "--quick", "--rounds=2", "--only", only, "--results", folder)
    ours = [row for row in read(folder) if row.provider.startswith(OURS)]
    assert {row.metric for row in ours} >= {"time", "peak memory"}
    assert not [row for row in ours if row.metric in ("wrong", "failed")]
    if bench.DEVICE == "cuda":
        assert any(row.provider.endswith("triton") for row in ours if row.metric == "time")


@pytest.mark.parametrize(
    ("what", "only"),
    [("adapter", "forward"), ("attention", "cross_attention forward"), ("attention", "prefix_attention_decode")],
)
def test_benchmarks_run(what, only, tmp_path):
    check_benchmark(what, only, tmp_path)


@pytest.mark.usefixtures("cuda")
def test_benchmark_of_prefix_attention_runs(tmp_path):
    """A separate test, because its peers compile for minutes on a CPU."""
    check_benchmark("attention", "prefix_attention forward", tmp_path)


@pytest.mark.usefixtures("cuda")
def test_tuner_runs(tmp_path):
    path = tmp_path / "tuned.json"
    run("lynx_kernels.ops.adapter.triton.tune", "16x128x64", "--output", path)
    assert len(json.loads(path.read_text())) == 2  # forward and backward
