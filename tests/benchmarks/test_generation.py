import pytest
import torch

from benchmarks import generation
from benchmarks.harness import measure

TINY = {"tiny": (32, 48, 2, 4, 2, 64, 8)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generation, "SHAPES", TINY)
    monkeypatch.setattr(generation, "VISION", 20)
    monkeypatch.setattr(generation, "TEXT", 5)


def tiny(beams=1, questions=1, new=4, dtype=torch.float32):
    return generation.setup("tiny", dtype, beams, questions, 2, new, "cpu")


@pytest.mark.parametrize(("beams", "questions"), [(1, 1), (5, 1), (1, 3), (2, 3)])
def test_all_say_the_same(beams, questions):
    case = tiny(beams, questions)
    assert set(case.providers) == {"plain", "lynx shared"}
    assert case.tokens == 2 * questions * 4
    for name in case.providers:
        case.check(name)
    assert case.providers["plain"](None).shape == (2 * questions, 4)


def test_half_precision_is_near():
    case = tiny(dtype=torch.bfloat16)
    for name in case.providers:
        case.check(name)


def test_a_wrong_answer_is_found(monkeypatch):
    monkeypatch.setattr(generation, "shared", lambda *args, **wanted: generation.plain(*spoiled(args), **wanted))

    def spoiled(args):
        model, prefix, *rest = args
        return model, prefix * 1.5, *rest

    with pytest.raises(AssertionError, match="first scores"):
        tiny().check("lynx shared")


def test_roots_are_shared(monkeypatch):
    read = []
    case = tiny(beams=2, questions=3)
    model = case.providers["plain"].args[0]
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[:2]))
    case.providers["lynx shared"](None)
    assert read[:2] == [(1, 2 * (20 + 3 * 5)), (12, 1)]
    read.clear()
    case.providers["plain"](None)
    assert read[:2] == [(12, 25), (12, 1)]
    assert model.get_decoder().config._attn_implementation == "lynx"


def test_cases(monkeypatch):
    cpu = list(generation.cases(quick=False, device="cpu"))
    cuda = list(generation.cases(quick=False, device="cuda"))
    assert len(cpu) == 2 * (6 + 4)
    assert len(cuda) == 2 * 7
    assert len({each.shape for each in cpu}) == len(cpu) // 2, "a shape has a time to the first token and an answer"
    assert len(list(generation.cases(quick=True, device="cpu"))) == 6
    assert "bf16 Vicuna-7B beams=5 questions=8 new=64 images=1" in {each.shape for each in cuda}
    monkeypatch.setattr(generation, "CPU", (("tiny", "fp32", 3, ((2, 2, 1),)),))
    first, answer = generation.cases(quick=True, device="cpu")
    rows = {(row.provider, row.metric) for row in measure(answer, rounds=2)}
    assert {("plain", "tokens/s"), ("lynx shared", "ratio to plain"), ("lynx static", "left out")} <= rows
    assert ("plain", "tokens/s") not in {(row.provider, row.metric) for row in measure(first, rounds=2)}
