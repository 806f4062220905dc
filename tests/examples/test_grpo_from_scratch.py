"""The example learns, and is as short as it says."""

from pathlib import Path

from examples import grpo_from_scratch


def test_it_learns_to_count_from_rewards():
    assert len(Path(grpo_from_scratch.__file__).read_text().splitlines()) < 120
    before, after = grpo_from_scratch.main(steps=30)
    assert before < 0.4
    assert after > 0.7


def test_rewards():
    number, end = grpo_from_scratch.ZERO + 2, grpo_from_scratch.END
    assert grpo_from_scratch.reward([number, end], 2) == 1
    assert grpo_from_scratch.reward([number, number], 2) == 0.5
    assert grpo_from_scratch.reward([end], 2) == 0
