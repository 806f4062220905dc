"""Mutants are still faults: their text is there, once, and so are their tests."""

from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.old.strip().partition("\n")[0][:60])
def test_the_text_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert all((ROOT / each).is_file() for each in mutant.tests.split())


def test_there_are_enough():
    assert len(MUTANTS) >= 40
