"""The demo of GRPO runs from training to the drawing; what it learns takes minutes."""

import pytest

from examples import grpo_demo


def test_it_trains_tests_and_draws(tmp_path):
    before, after = grpo_demo.main(2, 2, 20, tmp_path / "curve.svg", images=200)
    for rate, low, high in (before, after):
        assert 0 <= low <= rate <= high <= 1
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_held_out_scans_are_not_trained_on():
    trained, held_out = (grpo_demo.data(each, 300, seed=0)["image"] for each in (False, True))
    halves = [{side.crop((8 * half, 0, 8 * half + 8, 16)).tobytes() for side in images for half in (0, 1)}
              for images in (trained, held_out)]  # fmt: skip
    assert not halves[0] & halves[1]
    assert len(halves[1]) > 50


def test_rewards():
    said = [[{"role": "assistant", "content": each}] for each in ("3", "3 3", "4")]
    assert grpo_demo.right_sum(said, ["3", "3", "3"]) == [1, 0, 0]


def test_the_interval_is_wilsons():
    assert pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4) == grpo_demo.interval(50, 100)
