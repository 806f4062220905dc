"""Runs that should stop do, in a sentence, and leave what was good as it was."""

from dataclasses import fields

import pytest

from lynx.train import recipe

MINIMAL = {
    "model": "tiny", "output": "out", "data": "data.jsonl", "precision": "fp32", "token_budget": 130,
    "stages": [{"name": "train", "trainable": ["adapters"], "steps": 3, "learning_rate": 1e-3}],
}  # fmt: skip
FLOATS = [each.name for each in fields(recipe.Stage) if each.type is float]
INTEGERS = [each.name for kind in (recipe.Stage, recipe.Recipe) for each in fields(kind) if "int" in str(each.type)]

# Numbers in recipes


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", FLOATS)
def test_numbers_that_are_not_finite(key, value):
    with pytest.raises(recipe.RecipeError, match=f"stage train: {key} is .*, expected a finite number"):
        recipe.load(MINIMAL, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["[.nan, 0.9]", "[0.9, .inf]", f"[0.9, 1{'0' * 400}]"])
def test_a_list_of_numbers_that_are_not_finite(value):
    with pytest.raises(recipe.RecipeError, match="betas is .*, expected a list of a finite number"):
        recipe.load(MINIMAL, [f"betas={value}"])


@pytest.mark.parametrize("value", [".inf", ".nan", "9" * 30, "-" + "9" * 30])
@pytest.mark.parametrize("key", INTEGERS)
def test_integers_out_of_range(key, value):
    with pytest.raises(recipe.RecipeError, match=f"{key} is "):
        recipe.load(MINIMAL, [f"{key}={value}"])


def test_every_kind_of_number_was_tried():
    assert {"learning_rate", "warmup_from", "weight_decay", "epsilon", "max_grad_norm"} <= set(FLOATS)
    assert {"steps", "resolution", "tokens_per_step", "workers", "seed", "max_skipped"} <= set(INTEGERS)
