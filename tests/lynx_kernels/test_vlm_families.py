"""Families of vision-language models under ``apply``: everything of vlm_checks.py on the first of them.

``make test-families`` tries all of them.
"""

import pytest
import torch
import transformers as hf

from tests.lynx_kernels import vlm_checks, vlms


@pytest.mark.parametrize("check", vlm_checks.CHECKS)
@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_families_equal_themselves_before(family, check):
    found = vlm_checks.outcome(vlm_checks.CHECKS[check], vlms.FAMILIES[family])
    assert found.verdict == "right", found.why


def test_checks_see_faults():
    """What is wrong, opaque or not there is not called right, or refused."""
    family = vlms.FAMILIES["Qwen3VL"]

    def check(error):
        def raising(family):
            raise error

        return vlm_checks.outcome(raising, family)

    assert check(AssertionError("3e-2\nmore")) == vlm_checks.Outcome("wrong", "3e-2")
    assert check(ValueError("opaque")) == vlm_checks.Outcome("failed", "ValueError: opaque")
    assert check(vlm_checks.NotThereError("no")) == vlm_checks.Outcome("not there", "no")


def test_families_that_a_release_lacks_are_named():
    class New(vlms.Family):
        def model(self):
            return hf.Qwen9Config()

    assert vlm_checks.why_not_there(New()) == f"transformers {hf.__version__} has no Qwen9Config"
    assert vlm_checks.why_not_there(vlms.FAMILIES["Qwen3VL"]) is None


def test_closeness_sees_small_errors():
    one = vlms.Ran(torch.ones(3), None, {"w": torch.ones(2)})
    for other in (
        vlms.Ran(torch.ones(3) + 3e-5, None, one.gradients),
        vlms.Ran(one.logits, None, {"w": torch.ones(2) + 3e-5}),
    ):
        with pytest.raises(AssertionError):
            vlms.assert_close(other, one)
