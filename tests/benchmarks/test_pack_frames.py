"""The benchmark of pack_frames: its peers at tiny sizes, what is checked, and on how many threads it runs."""

from dataclasses import replace

import pytest
import torch

from benchmarks import pack_frames as benchmark
from benchmarks.harness import Case, measure
from benchmarks.pack_frames import cases, setup
from benchmarks.pack_frames_peers import FOLDER, Peer, Workload, workload
from lynx_kernels.ops.pack_frames import pack_frames

VIDEO = Workload("video", 28, 14, ((60, 80),) * 2)
PHOTOS = Workload("photos", 28, 14, ((40, 60), (90, 50), (20, 28)))
SIZED = Workload("sized", 28, 14, ((28, 28),) * 2)
all_workloads = pytest.mark.parametrize("asked", [VIDEO, PHOTOS, SIZED], ids=lambda each: each.name)


def plain(function, **options):
    """In place of torch.compile, which takes seconds."""
    return function


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.cache_size", lambda device: 2**13)


@all_workloads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(asked, dtype):
    case = setup(asked, dtype, "cpu", 1, plain)
    assert {"pillow + numpy", "transformers pillow"} < set(case.providers)
    for name, run in case.providers.items():
        case.check(name)
        run(case.copies[-1])


def test_names_of_cases_are_those_of_their_setups():
    for case in cases(quick=True, device="cpu"):
        asked, dtype, device, threads = case.build.args
        tiny = replace(
            asked, size=28, shapes=tuple((h * 28 // asked.size, w * 28 // asked.size) for h, w in asked.shapes)
        )
        built = setup(tiny, dtype, device, threads, plain)
        assert set(case.providers) == set(built.providers) | set(built.left_out)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda frames, **options: pack_frames(frames, **options).flip(1),
        lambda frames, **options: pack_frames(frames, **(options | {"crop_rounding": "round"})),
        lambda frames, **options: pack_frames(frames, **(options | {"resize": "exact"})),
        lambda frames, **options: pack_frames(frames, **(options | {"mean": (0.5, 0.5, 0.5)})),
    ],
    ids=["order", "crop", "resize", "mean"],
)
def test_a_wrong_provider_is_refused(wrong, monkeypatch):
    asked = replace(VIDEO, shapes=((56, 62),) * 2)  # 28 x 31: 1.5 columns too many on either side
    real = benchmark.peers
    options = {"size": 28, "patch_size": 14, "mean": benchmark.MEAN, "std": benchmark.STD, "crop_rounding": "floor"}

    def with_wrong(*arguments):
        run = wrong
        return real(*arguments) | {
            "wrong": Peer(lambda batch: run(batch.tensors, **options)),
            "wrong ~": Peer(lambda batch: run(batch.tensors, **options), tolerance=1.0),
        }

    monkeypatch.setattr(benchmark, "peers", with_wrong)
    case = setup(asked, torch.float32, "cpu", 1, plain)
    with pytest.raises(AssertionError, match="output: error"):
        case.check("wrong")
    with pytest.raises(AssertionError, match="levels on average"):
        case.check("wrong ~")
    case.check("lynx cpu" if "lynx cpu" in case.providers else "pillow + numpy")


def test_a_case_runs_on_the_threads_of_its_shape():
    before, seen = torch.get_num_threads(), []

    def build():
        built = setup(SIZED, torch.float32, "cpu", before + 1, plain)
        return replace(built, providers={"eager": lambda frames: seen.append(torch.get_num_threads())}, check=print)

    rows = measure(Case("pack_frames", "forward", f"fp32 sized threads={before + 1}", build), rounds=2)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    assert {f", {before} threads," in row.device for row in rows} == {True}
    assert ("eager", "frames/s") in {(row.provider, row.metric) for row in rows}


def test_workloads_are_all_measured():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(benchmark.WORKLOADS)
    for name in benchmark.WORKLOADS:
        asked = workload(name)
        assert asked.size % asked.patch_size == 0
        assert asked.is_sized == name.startswith("sized")
