"""The benchmark of image processors, at small sizes: what is timed, and what is refused."""

import pytest

from benchmarks import processors as benchmark
from benchmarks.processors import FAMILIES, cases, setup
from lynx_kernels.backends import cpu as cpu_backend

pytestmark = pytest.mark.skipif(bool(cpu_backend.MISSING), reason="not built")

SHAPES = ((60, 80), (90, 40))


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.cache_size", lambda device: 2**13)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "SigLIP-384", "LLaVA-Next", "Mllama", "CLIP-336"])
def test_every_provider_is_right(family):
    case = setup(family, SHAPES, 1)
    assert {"transformers pillow", "lynx cpu"} <= set(case.providers)
    assert len(case.copies) > 1
    for name, run in case.providers.items():
        case.check(name)
        run(case.copies[-1])


def test_names_of_cases_are_those_of_their_setups():
    found = list(cases(quick=False, device="cpu"))
    assert len(found) == len({str(case) for case in found}) == 2 * len(FAMILIES)
    assert len(list(cases(quick=True, device="cpu"))) < len(found)
    for case in found[:2]:
        family, shapes, threads = case.build.args
        assert (len(shapes), f"threads={threads}" in case.shape) == (4, True)
        built = setup(family, SHAPES, threads)
        assert set(case.providers) == set(built.providers) | set(built.left_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": 2}, "pixel_values: differs by"),
        ({"image_mean": [0.5, 0.5, 0.500001]}, "pixel_values: differs by"),
        ({"size": {"height": 42, "width": 42}}, "pixel_values: "),
    ],
)
def test_a_wrong_provider_is_refused(options, message, monkeypatch):
    made = []

    def pillow_class(model):
        own = real(model)
        made.append(model)
        return own if len(made) == 1 else lambda **given: own(**(given | options))

    real = benchmark.pillow_class
    monkeypatch.setattr(benchmark, "pillow_class", pillow_class)
    case = setup("SigLIP-384", SHAPES, 1)
    case.check("transformers pillow")
    with pytest.raises(AssertionError, match=message):
        case.check("lynx cpu")
