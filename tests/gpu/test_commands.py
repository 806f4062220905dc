"""What measures on a GPU runs there: the benchmarks, and the tuner of the adapter's launches."""

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


@pytest.mark.parametrize(
    ("what", "only"),
    [
        ("adapter", "forward"),
        # Its peers compile for minutes on a CPU.
        pytest.param("attention", "prefix_attention forward", marks=pytest.mark.usefixtures("cuda")),
        ("attention", "cross_attention forward"),
        ("attention", "prefix_attention_decode"),
    ],
)
def test_benchmarks_run(what, only, tmp_path):
    """The same commands as for results, with few rounds: ours are right in every case, and timed."""
    run("benchmarks", what, "--quick", "--rounds=2", "--only", only, "--results", tmp_path)
    ours = [row for row in read(tmp_path) if row.provider.startswith(OURS)]
    assert {row.metric for row in ours} >= {"time", "peak memory"}
    assert not [row for row in ours if row.metric in ("wrong", "failed")]
    if bench.DEVICE == "cuda":
        assert any(row.provider.endswith("triton") for row in ours if row.metric == "time")


@pytest.mark.usefixtures("cuda")
def test_the_tuner_runs(tmp_path):
    path = tmp_path / "tuned.json"
    run("lynx_kernels.adapter.tune", "16x128x64", "--output", path)
    assert len(json.loads(path.read_text())) == 2  # forward and backward
