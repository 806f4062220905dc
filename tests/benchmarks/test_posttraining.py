"""The benchmark of post-training: its three ways at tiny sizes."""

import functools

import pytest
import torch
from transformers import LlamaModel

from benchmarks import posttraining
from benchmarks.posttraining import NAMES, QUICK, Work


@pytest.mark.parametrize("work", QUICK, ids=lambda work: work.kind)
def test_every_way_is_right_and_shares_as_it_says(work, monkeypatch):
    seen = []
    forward = LlamaModel.forward

    @functools.wraps(forward)
    def watched(self, *args, **options):
        seen.append(options["inputs_embeds"].shape[:2].numel())
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    case = posttraining.setup(work, "cpu")
    assert tuple(case.providers) == NAMES
    ran = {}
    for name, call in case.providers.items():
        case.check(name)
        seen.clear()
        call(None)
        ran[name] = set(seen)
    repeated = work.branches * (work.image + posttraining.TEXT + work.tokens)
    assert ran == {NAMES[0]: {repeated}, NAMES[1]: {round(repeated / work.bound)}, NAMES[2]: {repeated}}


def test_a_wrong_way_is_not_timed(monkeypatch):
    monkeypatch.setattr("lynx_kernels.integrations.trl.head.token_log_probs", lambda *args, **options: _wrong(*args))
    case = posttraining.setup(Work("SFT", 2, 4, 16), "cpu")
    case.check("trl")
    with pytest.raises(AssertionError, match="loss: error"):
        case.check("lynx shared")


def _wrong(hidden, weight, labels):
    return hidden.mean(-1)[: len(labels)], torch.zeros(len(labels))


def test_cases_name_what_grows():
    found = list(posttraining.cases(quick=False, device="cpu"))
    assert [case.shape.split()[-1] for case in found if "GRPO" in case.shape] == ["C=64", "C=128", "C=256"]
    assert Work("GRPO", 8, 64).bound == pytest.approx(8 * 672 / (608 + 8 * 64))
