"""The benchmark of attention over trees: its peers at tiny sizes, and how work is counted."""

from dataclasses import replace

import pytest
import torch

from benchmarks import forest
from benchmarks.harness import measure
from benchmarks.tables import as_text

FORESTS = {
    "questions": forest.QUICK[0],
    "levels": forest.QUICK[1],
    "pattern": forest.Forest("pattern", (16, 24) * 2, (-1, 0, 1, 2), (True, False) * 2, (20, None)),
}
all_forests = pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(forest, "matmul_rate", lambda device, dtype: 1e11)


def tiny(tree, mode="forward", dtype=torch.float32):
    return forest.setup(tree, mode, dtype, "cpu", 4, 16, compiler=lambda function, **options: function)


@all_forests
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # FlexAttention asks to be compiled
def test_every_provider_is_right(tree, mode, dtype):
    case = tiny(tree, mode, dtype)
    assert {"sdpa dense mask", "sdpa per path", "lynx cpu", "matmuls"} <= set(case.providers)
    for name, call in case.providers.items():
        case.check(name)
        call(case.copies[0])


def test_a_wrong_provider_is_not_timed(monkeypatch):
    monkeypatch.setattr(forest, "_ours", lambda *_: lambda q, k, v: 1.01 * v)
    case = tiny(FORESTS["levels"])
    for name in ("lynx cpu", "repeated lynx cpu"):
        with pytest.raises(AssertionError):
            case.check(name)
    case.check("sdpa per path")


@all_forests
def test_pairs_are_those_that_are_visible(tree):
    assert tree.pairs == sum(int(layout.visible().sum()) for layout in tree.layouts("cpu"))


def test_the_repeated_form_has_each_path_alone():
    tree = FORESTS["levels"]
    repeated = tree.repeated()
    assert len(repeated.paths) == len(tree.paths) == 4
    for ours, theirs in zip(tree.rows(), repeated.rows(), strict=True):
        position = tree.layouts("cpu")[0].position_ids[ours]
        assert torch.equal(position, repeated.layouts("cpu")[0].position_ids[theirs])


def test_the_shapes_are_those_that_were_asked_for():
    found = {each.name: each for each in forest.forests()}
    assert found["prompt-16-completions"].lengths == (1100, *[1000] * 16)
    assert sum(found["gemma3-4k"].lengths) == 4096
    assert found["gemma3-4k"].windows == (1024,) * 5 + (None,)
    assert len(found["3-levels"].paths) == 16
    for device in ("cpu", "cuda"):
        cases = list(forest.cases(quick=False, device=device))
        assert len(cases) == 2 * 5 * len(forest.NAMES[device])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_measured_rows_make_a_table():
    tree = replace(FORESTS["levels"], name="tiny")
    case = forest.Case("forest", "forward", "fp32 tiny", lambda: tiny(tree), ("sdpa dense mask",))
    assert "lynx cpu" in as_text(measure(case, rounds=2))
