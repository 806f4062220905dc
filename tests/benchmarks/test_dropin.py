"""The benchmark of other people's models, at small sizes: all ways agree, and a wrong one is not timed."""

from functools import partial

import pytest
import torch

from benchmarks import dropin
from benchmarks.harness import Case, measure
from lynx_kernels.integrations.collator import PackedCollator


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    text = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 1, "num_key_value_heads": 1}
    for name, value in text.items():
        monkeypatch.setitem(dropin._TEXT, name, value)
    for name, value in {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 1}.items():
        monkeypatch.setitem(dropin._VISION, name, value)


@pytest.mark.parametrize("family", ["Gemma-3", "SmolVLM"])
def test_the_three_ways_agree(family):
    rows = measure(
        Case("dropin", "train", f"{family} B=2", partial(dropin.setup, family, 2, torch.float32, "cpu")), rounds=2
    )
    assert {row.provider for row in rows} == set(dropin.NAMES)
    assert [(row.provider, row.note) for row in rows if row.metric in ("wrong", "failed")] == []
    assert {"time", "tokens/s", "peak memory", "ratio to transformers"} <= {row.metric for row in rows}


def test_a_wrong_way_is_found(monkeypatch):
    right = PackedCollator.__call__

    def wrong(self, samples):
        batch = right(self, samples)
        return {**batch, "position_ids": batch["position_ids"] * 2}

    monkeypatch.setattr(PackedCollator, "__call__", wrong)
    setup = dropin.setup("SmolVLM", 2, torch.float32, "cpu")
    setup.check(dropin.NAMES[1])
    with pytest.raises(AssertionError, match="error"):
        setup.check(dropin.NAMES[2])


def test_samples_are_those_of_a_batch():
    family = dropin.FAMILIES["Qwen2.5-VL"]
    chosen = dropin.samples(family, 3)
    batch = dropin.padded(chosen)
    lengths = [each["input_ids"].shape[1] for each in chosen]
    assert len(set(lengths)) == 3
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["pixel_values"].shape[0] == int(batch["image_grid_thw"].prod(1).sum())


def test_cases_by_device(monkeypatch):
    monkeypatch.setattr(dropin, "matmul_rate", lambda device, dtype: 1e12)
    assert len(list(dropin.cases(quick=False, device="cpu"))) == 6
    assert str(next(dropin.cases(quick=True, device="cuda"))) == "dropin train bf16 Qwen3-VL B=8"
