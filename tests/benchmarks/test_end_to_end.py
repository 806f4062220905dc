from functools import partial

import pytest
import torch
from transformers import Blip2VisionConfig, LlamaConfig

from benchmarks import end_to_end
from benchmarks.harness import Case, measure
from lynx import LynxConfig


@pytest.fixture
def tiny(monkeypatch):
    """The small model of the benchmark, but tiny."""
    text = LlamaConfig(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tower = Blip2VisionConfig(
        image_size=28, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.1,
    )  # fmt: skip
    options = {"num_latents": 4, "resampler_heads": 2, "resampler_head_dim": 8, "adapter_size": 8}
    config = LynxConfig(text, tower, image_token_id=101, resampler_depth=2, initializer_range=0.2, **options)
    monkeypatch.setattr(end_to_end, "small", lambda: config)
    return config


def test_the_samples_are_fixed():
    chosen = end_to_end.samples(70, 1000)
    assert [sample.images for sample in chosen[:6]] == [sample.images for sample in chosen[64:70]]
    assert all(
        torch.equal(one.labels, two.labels) for one, two in zip(chosen, end_to_end.samples(70, 1000), strict=True)
    )
    supervised = sum(int((sample.labels != -100).sum()) for sample in chosen[:64])
    assert supervised == 1829
    assert any(sample.images == 0 for sample in chosen)


def test_batches_hold_every_sample_once(tiny):
    chosen = end_to_end.samples(40, 101)
    for batches in (end_to_end.near_lengths(chosen), end_to_end.packs(chosen, tiny)):
        assert sorted(index for batch in batches for index in batch) == list(range(40))
    lengths = [
        [32 * chosen[index].images + len(chosen[index].token_ids) for index in batch]
        for batch in end_to_end.near_lengths(chosen)
    ]
    assert sum(max(batch) * len(batch) for batch in lengths) < 1.4 * sum(map(sum, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_ways_agree(tiny, dtype):
    case = Case("end_to_end", "train", "tiny B=10", partial(end_to_end.setup, "small", 10, dtype, "cpu"))
    rows = measure(case, rounds=2)
    assert {row.provider for row in rows} == set(end_to_end.NAMES)
    assert [(row.provider, row.note) for row in rows if row.metric in ("wrong", "failed")] == []
    assert {"time", "tokens/s", "peak memory", "ratio to transformers"} <= {row.metric for row in rows}


def test_a_wrong_way_is_found(tiny, monkeypatch):
    right = end_to_end._adapter
    monkeypatch.setattr(end_to_end, "_adapter", lambda self, x: (x + right(self, x)) / 2)
    setup = end_to_end.setup("small", 6, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="error"):
        setup.check(end_to_end.NAMES[2])


def test_cases(tiny, monkeypatch):
    monkeypatch.setattr(end_to_end, "matmul_rate", lambda device, dtype: 1e12)
    assert [str(case) for case in end_to_end.cases(quick=True, device="cuda")] == ["end_to_end train bf16 lynx-7b B=32"]
