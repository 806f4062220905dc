"""Packs over ranks, workers and resumptions: the same samples, the same bits, none twice, none lost."""

import json
from copy import copy
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from lynx.data.collator import Collator
from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture, Reference
from lynx.data.prompts import Prompts
from lynx.data.skipped import Skipped
from lynx.data.stream import PackDataset, PackSampler
from lynx_kernels import PackPlanner
from tests.lynx.batches import assert_same, load, write
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import make_image

BUDGET = 200
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for n in range(5):
        Image.fromarray(make_image(n, 10 + n, 13)).save(folder / f"{n}.png")
    write_clip(folder / "clip.mp4", [frame(n) for n in range(20)])
    images = [
        {"image": f"{n % 5}.png", "question": f"what {'is this ' * (n % 4)}{n}?", "answer": [str(n), "a " + str(n)]}
        for n in range(17)
    ]
    write(folder / "images.jsonl", images)
    write(folder / "texts.jsonl", [{"question": f"count to {n}", "answer": "1 " * n + str(n)} for n in range(1, 12)])
    pairs = [{"question": "odd?", "answer": "yes"}, {"question": "even?", "answer": "no"}]
    write(folder / "several.jsonl", [{"image": "1.png", "questions": pairs}, {"video": "clip.mp4", "questions": pairs}])
    return folder


def mixture(folder, *names, seed=1):
    names = names or ("images", "texts", "several")
    tasks = {"images": "vqa"}
    sets = {name: JsonlRecords(folder / f"{name}.jsonl", task=tasks.get(name)) for name in names}
    return Mixture([Group(name, 1 + (name == "images"), {name: each}) for name, each in sets.items()], seed=seed)


@pytest.fixture
def make(folder, processor):
    def make(*names, **options):
        options = {"token_budget": BUDGET, "lookahead": 2, "seed": 7, **options}
        return PackSampler(mixture(folder, *names), processor, **options)

    return make


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_sample_is_taken_twice_or_lost(make, ranks):
    samplers = [make(ranks=ranks, rank=rank) for rank in range(ranks)]
    packs = [list(islice(sampler, STEPS)) for sampler in samplers]
    assert all(len(each) == STEPS for each in packs)
    taken = [reference for each in packs for pack in each for reference in pack]
    states = [sampler.state_after(STEPS) for sampler in samplers]
    assert all(state == states[0] for state in states)
    waiting = [draw for *_, draw in states[0]["waiting"]]
    assert sorted([*(reference.draw for reference in taken), *waiting]) == list(range(len(taken) + len(waiting)))
    drawn = mixture(samplers[0].mixture.datasets[0].path.parent)
    by_draw = {reference.draw: reference for reference in taken}
    for _ in range(len(taken) + len(waiting)):
        reference = drawn.draw()
        assert by_draw.get(reference.draw, reference) == reference


@pytest.mark.parametrize("ranks", [1, 2])
def test_packs_keep_the_budget_and_are_nearly_full(make, ranks):
    tokens, sets = 0, set()
    for rank in range(ranks):
        for batch in islice(load(make(ranks=ranks, rank=rank, token_budget=600)), STEPS):
            assert batch["input_ids"].numel() == batch["report"].tokens <= 600
            assert batch["report"].budget == 600
            assert batch["report"].supervised_tokens.total() == (batch["labels"] != -100).sum()
            tokens += batch["report"].tokens
            sets |= batch["report"].samples.keys()
    assert 0.95 < tokens / (ranks * STEPS * 600) <= 1
    assert sets == {"images", "texts", "several"}


def test_costs_are_those_of_the_batch(make):
    sampler = make()
    for pack in islice(sampler, STEPS):
        costs = [sampler.processor.costs(sampler.dataset.encode(reference)[0]) for reference in pack]
        batch = Collator(sampler.processor, BUDGET)([sampler.dataset[reference] for reference in pack])
        assert sum(tokens for tokens, _ in costs) == batch["input_ids"].numel()
        frames = len(batch["frame_positions"]) if "frame_positions" in batch else 0
        assert sum(patches for _, patches in costs) == frames * sampler.processor.tokens_per_frame


def test_packs_are_those_that_the_planner_balances(make):
    """By tokens and patches, of the samples as they are drawn."""
    samplers = [make(ranks=2, rank=rank) for rank in range(2)]
    dataset, drawn = samplers[0].dataset, copy(samplers[0].mixture)
    planner, references, steps = PackPlanner(BUDGET, ranks=2, lookahead=2), [], []
    while len(steps) < STEPS:
        references.append(drawn.draw())
        steps += planner.push(*dataset.processor.costs(dataset.encode(references[-1])[0]))
    for rank, sampler in enumerate(samplers):
        packs = [[references[number] for number in step[rank]] for step in steps[:STEPS]]
        assert list(islice(sampler, STEPS)) == packs


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_change_no_bit(make, ranks):
    alone, with_workers = (
        list(islice(load(make(ranks=ranks, rank=ranks - 1, max_steps=8), workers), 8)) for workers in (0, 2)
    )
    assert len(alone) == len(with_workers) == 8
    for batch, other in zip(alone, with_workers, strict=True):
        assert_same(batch, other)
    assert any("pixel_values" in batch for batch in alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_at_any_step_goes_on_as_if_never_stopped(make, workers):
    sampler = make(max_steps=STEPS)
    batches, states = [], [sampler.state_after(0)]
    for batch in load(sampler, workers):  # workers are far ahead of what is consumed
        batches.append(batch)
        states.append(json.loads(json.dumps(sampler.state_after(len(batches)))))
    assert len(batches) == STEPS
    whole = [list(pack) for pack in make(max_steps=STEPS)]
    for step, state in enumerate(states):
        resumed = make(max_steps=STEPS)
        resumed.load_state_dict(state)
        assert len(resumed) == STEPS - step
        assert list(resumed) == whole[step:]
        if step < STEPS:
            assert resumed.state_after(STEPS) == states[-1]
    resumed.load_state_dict(states[5])
    for batch, other in zip(batches[5:], load(resumed, workers), strict=True):
        assert_same(batch, other)


def test_prompts_answers_crops_and_frames_follow_the_draw(make):
    dataset = make().dataset

    def drawn(name, record, draws):
        references = [Reference(dataset.names.index(name), record, draw) for draw in draws]
        return [Collator(dataset.processor, BUDGET)([dataset[reference]]) for reference in references]

    first, again, *others = drawn("images", 3, [5, 5, *range(6, 30)])
    assert_same(first, again)
    texts = {dataset.processor.tokenizer.decode(each["input_ids"][0, 3:]) for each in (first, *others)}
    assert {text.split("bot:")[0] for text in map(str.lower, texts)} > {
        "<s>user: what is this is this is this 3? give a short answer.\n"
    }
    assert {text.split("Bot: ")[1] for text in texts} == {"3</s>", "a 3</s>"}
    assert len({each["pixel_values"].numpy().tobytes() for each in (first, *others)}) > 5
    clips = drawn("several", 1, range(8))
    assert len({each["pixel_values"].numpy().tobytes() for each in clips}) > 5
    dataset.augment = False
    still = drawn("several", 1, range(8))
    assert len({each["pixel_values"].numpy().tobytes() for each in still}) == 1


def test_of_many_frames_some_are_taken(tmp_path, processor):
    """One of each of as many equal parts as a video may have frames, four here, of nine."""
    for n in range(9):
        Image.fromarray(np.full((4, 4, 3), 20 * n, np.uint8)).save(tmp_path / f"{n}.png")
    write(tmp_path / "a.jsonl", [{"video": [f"{n}.png" for n in range(9)], "question": "?", "answer": "x"}])
    chosen = Mixture([Group("all", 1, {"a": JsonlRecords(tmp_path / "a.jsonl")})], seed=0)

    def taken(draw, augment=True):
        dataset = PackDataset(chosen, processor, seed=0, augment=augment)
        [frames] = dataset[Reference(0, 0, draw)].sample.media
        return [frame.getpixel((0, 0))[0] // 20 for frame in frames]

    assert taken(0, augment=False) == [1, 3, 5, 7]
    drawn = {tuple(taken(draw)) for draw in range(40)}
    assert len(drawn) > 10
    for number, frames in enumerate(zip(*drawn, strict=True)):
        low, high = number * 9 / 4, (number + 1) * 9 / 4
        assert set(frames) == set(range(int(low), int(high) + (high % 1 > 0)))


def test_states_are_kept_for_a_while(make):
    sampler = make(history=3)
    iterator = iter(sampler)
    for _ in range(5):
        next(iterator)
    with pytest.raises(ValueError, match="no state after step 2"):
        sampler.state_after(2)
    assert sampler.state_after(4)["step"] == 4
    with pytest.raises(ValueError, match="no state after step 3"):
        sampler.state_after(3)
    with pytest.raises(ValueError, match="no state after step 6"):
        sampler.state_after(6)


def test_every_iteration_starts_where_the_state_says(make):
    sampler = make()
    first = list(islice(sampler, 3))
    assert list(islice(sampler, 3)) == first
    assert sampler.state_after(3)["step"] == 3
    list(islice(sampler, 3))
    sampler.load_state_dict(sampler.state_after(2))
    assert next(iter(sampler)) == first[2]
    assert not any(sampler.mixture.counts.values()), "each iteration draws with a copy of the mixture"


def test_samples_as_long_as_a_pack(make, processor):
    """They fit, and one that comes may complete two steps at once: a state between them holds the second."""
    dataset = make("texts").dataset
    samples = [dataset.encode(Reference(0, record, 0))[0] for record in range(11)]
    options = {"token_budget": max(processor.costs(sample)[0] for sample in samples), "lookahead": 0, "max_steps": 60}
    sampler = make("texts", **options)
    packs, states = [], []
    for pack in sampler:
        packs.append(pack)
        states.append(sampler.state_after(len(packs)))
    assert not any(isinstance(item, Skipped) for pack in packs for item in pack)
    between = [step for step, state in enumerate(states, start=1) if state["ready"]]
    assert between
    for step in between:
        resumed = make("texts", **options)
        resumed.load_state_dict(states[step - 1])
        assert list(resumed) == packs[step:]


def test_what_does_not_fit_a_state_is_refused(make, folder, processor):
    sampler = make()
    next(iter(sampler))
    state = sampler.state_after(1)
    with pytest.raises(ValueError, match="ranks=1, but this planner has 2"):
        make(ranks=2).load_state_dict(state)
    with pytest.raises(ValueError, match="token_budget=200, but this planner has 100"):
        make(token_budget=100).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=7, this sampler has 8"):
        make(seed=8).load_state_dict(state)
    with pytest.raises(ValueError, match="sizes="):
        make("images").load_state_dict(state)
    with pytest.raises(ValueError, match="version="):
        make().load_state_dict({**state, "version": 0})
    with pytest.raises(ValueError, match="prompts="):
        make(prompts=Prompts({"vqa": ["{question}"]})).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 2, "rank": 2}, "rank is 2, expected 0 to 1"),
        ({"too_long": "cut"}, "too_long='cut'"),
        ({"history": 0}, "history=0"),
        ({"token_budget": 0}, "token_budget=0"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_endless_sampler_has_no_length(make):
    with pytest.raises(TypeError, match="no end"):
        len(make())
    assert len(make(max_steps=4)) == 4


def test_an_unknown_task_is_an_error_before_the_run(folder, processor):
    records = JsonlRecords(folder / "texts.jsonl", task="chess")
    with pytest.raises(ValueError, match="'texts' has the task 'chess'"):
        PackDataset(Mixture([Group("g", 1, {"texts": records})], seed=0), processor, seed=0)
