"""The benchmark of pack_embeddings: its peers at tiny sizes, and what is counted as traffic."""

import pytest
import torch

from benchmarks import pack_embeddings as benchmark
from benchmarks.harness import measure
from benchmarks.pack_embeddings import cases, make_batch, setup
from benchmarks.rows import OURS
from lynx_kernels.backends import cpu as cpu_backend


def plain(function, **options):
    """In place of torch.compile, which takes seconds."""
    return function


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.cache_size", lambda device: 2**13)
    monkeypatch.setattr(benchmark, "_LENGTHS", (2, 9))
    monkeypatch.setattr(benchmark, "_VOCABULARY", 50)


def tiny(mode, dtype=torch.float32):
    return setup(mode, 3, 4, 16, dtype, "cpu", compiler=plain)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(mode, dtype):
    made = tiny(mode, dtype)
    [case, *_] = cases(quick=True, device="cpu")
    assert set(made.providers) <= set(case.providers)
    assert (OURS + "cpu" in made.providers) == (cpu_backend.MISSING is None)
    for name in made.providers:
        made.check(name)


@pytest.mark.parametrize("name", ["cat", "pad_sequence", "masked_scatter"])
def test_a_wrong_provider_is_found(name, monkeypatch):
    attribute = "padded" if name == "pad_sequence" else name
    right = getattr(benchmark, attribute)
    monkeypatch.setattr(benchmark, attribute, lambda *args: right(*args) * 1.01)
    for mode in ("forward", "train"):
        with pytest.raises(AssertionError, match="output: error"):
            tiny(mode).check(name)


def test_batches():
    batch = make_batch(3, 4, "cpu")
    assert batch.num_rows == len(batch.token_ids) == len(batch.vision_index) == 12 + len(batch.text_ids)
    starts = [0, 4 + batch.lengths[0], 8 + sum(batch.lengths[:2])]
    for sample, start in enumerate(starts):
        assert batch.vision_index[start : start + 4].tolist() == list(range(4 * sample, 4 * sample + 4))
    assert int((batch.vision_index < 0).sum()) == sum(batch.lengths)


def test_traffic_is_every_row_once():
    rows = make_batch(3, 4, "cpu").num_rows
    assert tiny("forward").traffic == 2 * rows * 16 * 4
    assert tiny("train").traffic == 2 * rows * 16 * 4 + 2 * 12 * 16 * 4


def test_cases_are_measured():
    [case, *rest] = cases(quick=True, device="cpu")
    assert len(rest) == 7
    assert str(case) == "pack_embeddings forward fp32 d=1024 nv=32 B=16"
    rows = measure(type(case)(case.kernel, "train", case.shape, lambda: tiny("train")), rounds=2)
    assert not [row for row in rows if row.metric in ("wrong", "failed")]
    assert {"pad_sequence", "cat", "masked_scatter", "where", "compile", "copy"} <= {row.provider for row in rows}
    assert "share of copy" in {row.metric for row in rows}
