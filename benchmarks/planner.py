"""The planner against what people write themselves.

Online, samples come one after another: ``next-fit`` starts a new pack whenever the next sample does not fit. With all
costs known: ``first-fit-decreasing``, each sample from the longest to the first pack that has room, in numpy. Both fill
single packs; ours deals out steps of 8 and 256 ranks too, where patches are to be balanced, which no peer does.

Beside the times stand the packs' utilization, and how balanced the ranks are: the mean of a step's patches over its
maximum, weighted by the time the maximum takes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from lynx_kernels.packing import PackPlanner, Step, plan_packs

TOKEN_BUDGET = 4096
NUM_RANKS = (1, 8, 256)
NUM_SAMPLES = (10_000, 100_000)
_OURS = OURS + "python"
_PATCHES = 901  # of an image of 420 x 420 pixels
_VISION_TOKENS = 32
_FRAMES = 5  # of a video
# Lynx' finetuning mixture: shares of samples, and of those with images the share of videos.
_SHORT_ANSWERS, _CAPTIONS, _DIALOGS = (0.48, 0.10), (0.12, 0.83), (0.10, 0.0)  # the rest is text alone

Costs = tuple[NDArray, NDArray]


def mixture(num_samples: int, seed: int = 0) -> Costs:
    """Tokens and patches of short answers, long captions, dialogs and text instructions."""
    generator = np.random.default_rng(seed)
    shares, videos = zip(_SHORT_ANSWERS, _CAPTIONS, _DIALOGS, strict=True)
    kinds = generator.choice(4, num_samples, p=[*shares, 1 - sum(shares)])
    short = generator.integers(15, 46, num_samples)
    long = np.clip(generator.lognormal(np.log(250), 0.9, num_samples), 20, 3000).astype(np.int64)
    has_images = kinds < 3
    is_video = generator.random(num_samples) < np.array([*videos, 0.0])[kinds]
    tokens = np.where(kinds == 0, short, long) + _VISION_TOKENS * has_images
    return tokens, _PATCHES * has_images * np.where(is_video, _FRAMES, 1)


def next_fit(costs: Costs) -> list[Step]:
    packs: list[Step] = []
    room = 0
    for index, tokens in enumerate(costs[0].tolist()):
        if tokens > room:
            packs.append([[]])
            room = TOKEN_BUDGET
        packs[-1][0].append(index)
        room -= tokens
    return packs


def first_fit_decreasing(costs: Costs) -> list[Step]:
    tokens = costs[0]
    packs: list[Step] = []
    rooms = np.full(len(tokens), TOKEN_BUDGET)
    for index in np.argsort(-tokens, kind="stable").tolist():
        pack = int((rooms[: len(packs) + 1] >= tokens[index]).argmax())
        if pack == len(packs):
            packs.append([[]])
        packs[pack][0].append(index)
        rooms[pack] -= tokens[index]
    return packs


def online(ranks: int, costs: Costs) -> list[Step]:
    planner = PackPlanner(TOKEN_BUDGET, ranks=ranks)
    return planner.push(*costs) + planner.flush()


def known(ranks: int, costs: Costs) -> list[Step]:
    return plan_packs(*costs, token_budget=TOKEN_BUDGET, ranks=ranks)


PEERS: dict[str, tuple[str, Callable[[Costs], list[Step]], Callable[..., list[Step]]]] = {
    "online": ("next-fit", next_fit, online),
    "known": ("first-fit-decreasing", first_fit_decreasing, known),
}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Both ways, fewer ranks and samples first. The host plans, whatever the device."""
    for mode, (peer, _, _) in PEERS.items():
        for ranks in NUM_RANKS:
            for num_samples in NUM_SAMPLES[:1] if quick else NUM_SAMPLES:
                yield Case(
                    "planner",
                    mode,
                    f"budget={TOKEN_BUDGET} ranks={ranks} samples={num_samples}",
                    partial(setup, mode, ranks, num_samples),
                    (peer, _OURS),
                )


def setup(mode: str, ranks: int, num_samples: int) -> Setup:
    """The providers of one case; each must put every sample into one pack and keep the budget."""
    costs = mixture(num_samples)
    peer, plan, ours = PEERS[mode]
    providers: dict[str, Callable[[Costs], list[Step]]] = {peer: plan, _OURS: partial(ours, ranks)}

    def check(name: str) -> None:
        packs = [pack for step in providers[name](costs) for pack in step]
        indices = np.concatenate(packs)
        assert np.array_equal(np.sort(indices), np.arange(num_samples)), "a sample is lost or used twice"
        assert max(costs[0][pack].sum() for pack in packs) <= TOKEN_BUDGET, "a pack is over the budget"

    return Setup(
        providers=providers,
        copies=[costs],
        check=check,
        items=num_samples,
        qualities={
            "pack_utilization": lambda steps: pack_utilization(steps, costs),
            "balance": lambda steps: balance(steps, costs),
        },
        device="host",
    )


def pack_utilization(steps: list[Step], costs: Costs) -> float:
    """Share of the packs' budgets that tokens take."""
    packs = sum(len(step) for step in steps)
    return costs[0].sum() / (packs * TOKEN_BUDGET)


def balance(steps: list[Step], costs: Costs) -> float:
    """Share of the ranks' time that patches take, every step taking as long as its fullest rank."""
    loads = np.array([[costs[1][pack].sum() for pack in step] for step in steps])
    return loads.sum() / (loads.max(1).sum() * loads.shape[1])
