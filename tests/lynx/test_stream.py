"""Packs over ranks, workers and resumptions: the same samples, the same bits, none twice, none lost."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lynx.data.broken import Broken, BrokenRecords, TooManyBrokenError
from lynx.data.collator import Collator
from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture, Reference
from lynx.data.prompts import Prompts
from lynx.data.stream import PackDataset, PackSampler
from lynx_kernels import PackedLayout
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import conversation, picture

BUDGET = 200
STEPS = 12


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for n in range(5):
        Image.fromarray(picture(n, 10 + n, 13)).save(folder / f"{n}.png")
    write_clip(folder / "clip.mp4", [frame(n) for n in range(20)])
    pictures = [
        {"image": f"{n % 5}.png", "question": f"what {'is this ' * (n % 4)}{n}?", "answer": [str(n), "a " + str(n)]}
        for n in range(17)
    ]
    write(folder / "pictures.jsonl", pictures)
    write(folder / "texts.jsonl", [{"question": f"count to {n}", "answer": "1 " * n + str(n)} for n in range(1, 12)])
    pairs = [{"question": "odd?", "answer": "yes"}, {"question": "even?", "answer": "no"}]
    write(folder / "several.jsonl", [{"image": "1.png", "questions": pairs}, {"video": "clip.mp4", "questions": pairs}])
    return folder


def mixture(folder, *names, seed=1):
    names = names or ("pictures", "texts", "several")
    tasks = {"pictures": "vqa"}
    sets = {name: JsonlRecords(folder / f"{name}.jsonl", task=tasks.get(name)) for name in names}
    return Mixture([Group(name, 1 + (name == "pictures"), {name: each}) for name, each in sets.items()], seed=seed)


@pytest.fixture
def make(folder, processor):
    def make(*names, **options):
        options = {"token_budget": BUDGET, "lookahead": 2, "seed": 7, **options}
        return PackSampler(mixture(folder, *names), processor, **options)

    return make


def load(sampler, workers=0, always_vision=False):
    collator = Collator(sampler.processor, sampler.token_budget, always_vision=always_vision)
    return DataLoader(sampler.dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif name in ("report", "max_supervised"):
            assert value == other[name]
        else:
            assert torch.equal(value.segments, other[name].segments), name


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
    assert sets == {"pictures", "texts", "several"}


def test_costs_are_those_of_the_batch(make):
    sampler = make()
    for pack in islice(sampler, STEPS):
        costs = [sampler.processor.costs(sampler.dataset.encode(reference)[0]) for reference in pack]
        batch = Collator(sampler.processor, BUDGET)([sampler.dataset[reference] for reference in pack])
        assert sum(tokens for tokens, _ in costs) == batch["input_ids"].numel()
        frames = len(batch["frame_positions"]) if "frame_positions" in batch else 0
        assert sum(patches for _, patches in costs) == frames * sampler.processor.tokens_per_frame


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

    first, again, *others = drawn("pictures", 3, [5, 5, *range(6, 30)])
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
    assert not any(isinstance(item, Broken) for pack in packs for item in pack)
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
    with pytest.raises(ValueError, match="ranks=1, this planner 2"):
        make(ranks=2).load_state_dict(state)
    with pytest.raises(ValueError, match="token_budget=200, this planner 100"):
        make(token_budget=100).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=7, this sampler 8"):
        make(seed=8).load_state_dict(state)
    with pytest.raises(ValueError, match="sizes="):
        make("pictures").load_state_dict(state)
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
    with pytest.raises(ValueError, match="'texts' is of task 'chess'"):
        PackDataset(Mixture([Group("g", 1, {"texts": records})], seed=0), processor, seed=0)


@pytest.fixture
def damaged(tmp_path, processor):
    """Ten records: one names a file that is no picture, one has no answer, one is too long."""
    Image.fromarray(picture(0)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    records = [{"image": "good.png", "question": f"{n}?", "answer": "yes"} for n in range(7)]
    records += [{"image": "bad.png", "question": "?", "answer": "no"}, {"question": "?"}]
    records += [{"question": "long " * 500, "answer": "no"}]
    write(tmp_path / "some.jsonl", records)

    def make(**options):
        chosen = Mixture([Group("all", 1, {"some": JsonlRecords(tmp_path / "some.jsonl")})], seed=0)
        return PackSampler(chosen, processor, **{"token_budget": 60, "lookahead": 0, "seed": 0, **options})

    return make


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_records_are_left_out_counted_and_named(damaged, tmp_path, ranks, workers):
    lists = [BrokenRecords(tmp_path / "run", rank, limit=5) for rank in range(ranks)]
    for rank in range(ranks):
        for batch in load(damaged(max_steps=25, ranks=ranks, rank=rank), workers):
            lists[rank].add(batch["report"].broken)
            assert batch["report"].samples.keys() <= {"some"}
    assert lists[0].path.name == "broken.jsonl"
    files = sorted((tmp_path / "run").iterdir())
    assert set(files) <= {each.path for each in lists}
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(entry["record"] for entry in found) == [7, 8, 9], "each once, however often and by whom it is met"
    entries = {entry["record"]: entry for entry in found}
    assert all(entries[n]["path"] == f"{tmp_path}/some.jsonl:{n + 1}" for n in entries)
    assert all(entries[n]["dataset"] == "some" for n in entries)
    assert "bad.png" in entries[7]["reason"]
    assert "no answer" in entries[8]["reason"]
    assert "more than the budget of 60" in entries[9]["reason"]
    assert [entries[n]["too_long"] for n in (7, 8, 9)] == [False, False, True]
    for each in lists:
        assert each.summary() == {"broken_records": 2, "too_long_records": 1}


def test_only_one_rank_tells_of_what_every_rank_met(damaged):
    first, second = (list(damaged(max_steps=25, ranks=2, rank=rank)) for rank in (0, 1))
    assert sum(isinstance(item, Broken) for pack in first for item in pack) > 1
    assert not any(isinstance(item, Broken) for pack in second for item in pack)


def test_every_draw_becomes_a_sample_or_is_told_to_be_broken_once(damaged):
    sampler = damaged(max_steps=40)
    items = [item for pack in sampler for item in pack]
    state = sampler.state_after(40)
    assert len(items) + len(state["waiting"]) == state["mixture"]["counts"]["some"]


def test_broken_records_up_to_a_limit(tmp_path):
    folder = tmp_path / "deep"
    path = folder / "broken.jsonl"
    entries = [Broken("a", n, f"a.jsonl:{n + 1}", "no such picture") for n in range(4)]
    broken = BrokenRecords(folder, limit=2)
    broken.add([])
    assert not path.exists()
    broken.add([*entries[:2], entries[0], Broken("a", 9, "a.jsonl:10", "long", True)])
    assert broken.summary() == {"broken_records": 2, "too_long_records": 1}
    resumed = BrokenRecords(folder, limit=2)
    assert resumed.summary() == broken.summary()
    resumed.add(entries[:2])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(TooManyBrokenError, match=r"3 records are broken.*limit of 2.*broken\*\.jsonl.*a\.jsonl:3"):
        resumed.add(entries[:3])
    assert len(path.read_text().splitlines()) == 4, "the last one is listed, too"
    again = BrokenRecords(folder, limit=2)
    again.add([Broken("a", 9, "a.jsonl:10", "long", True)])
    with pytest.raises(TooManyBrokenError, match=r"3 records are broken.*a\.jsonl:1"):
        again.add(entries[:1])
    BrokenRecords(folder, limit=3).add(entries[:1])


def test_the_limit_is_that_of_all_ranks(tmp_path):
    entries = [Broken("a", n, f"a.jsonl:{n + 1}", "no such picture") for n in range(4)]
    first, second, third = (BrokenRecords(tmp_path, rank, limit=3) for rank in range(3))
    first.add(entries[:2])
    second.add(entries[1:3])
    assert [json.loads(line)["record"] for line in second.path.read_text().splitlines()] == [2]
    third.add(entries[:3])
    assert not third.path.exists(), "the others have listed all of it"
    with second.path.open("a") as file:
        file.write(json.dumps(Broken("a", 7, "", "")._asdict())[:9])  # it is just being written
    assert [each.summary()["broken_records"] for each in (first, second, third)] == [3, 3, 3]
    with pytest.raises(TooManyBrokenError, match="4 records are broken, more than the limit of 3"):
        first.add(entries[3:])


def test_half_a_line_of_a_killed_run(tmp_path):
    path = tmp_path / "broken.jsonl"
    entries = [Broken("a", n, "", "why") for n in range(3)]
    BrokenRecords(tmp_path).add(entries[:2])
    path.write_text(path.read_text()[:-9])
    resumed = BrokenRecords(tmp_path)
    assert resumed.count == 1
    resumed.add(entries[:2])
    resumed.add(entries[2:])
    assert resumed.count == BrokenRecords(tmp_path).count == 3
    assert len(path.read_text().splitlines()) == 4, "half a line, and the three others"


def test_too_long_can_be_an_error(damaged):
    with pytest.raises(ValueError, match=r"some\.jsonl:10: \d+ tokens are more than the budget of 60"):
        list(damaged(max_steps=25, too_long="error"))


def test_data_without_a_usable_record_stops(tmp_path, processor):
    write(tmp_path / "none.jsonl", [{"question": "?"}] * 3)
    chosen = Mixture([Group("all", 1, {"none": JsonlRecords(tmp_path / "none.jsonl")})], seed=0)
    with pytest.raises(TooManyBrokenError, match=r"none of the last 1000 records.*none\.jsonl"):
        next(iter(PackSampler(chosen, processor, token_budget=60, seed=0)))


def test_a_pack_without_samples_is_a_step_without_loss(processor, model):
    collator = Collator(processor, 60, always_vision=True)
    broken = Broken("a", 0, "", "why")
    for items in ([], [broken]):
        batch = collator(items)
        report = batch.pop("report")
        assert (report.tokens, report.samples.total(), report.budget, report.broken) == (0, 0, 60, items)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss == 0
        missing = [name for name, each in model.named_parameters() if each.grad is None]
        assert missing == [], "every parameter takes part in the reduction of gradients"
        assert all((each.grad == 0).all() for each in model.parameters())


def test_an_unseen_picture_changes_nothing(processor, model):
    samples = [processor.encode(conversation("Hello", "yes, hello")), processor.encode(conversation("2?", "two"))]
    plain, seen = processor.pack(samples), processor.pack(samples, always_vision=True)
    assert "pixel_values" not in plain
    assert torch.equal(plain["input_ids"], seen["input_ids"])
    losses, gradients = [], []
    for batch in (plain, seen):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    assert torch.equal(*losses)
    for name, gradient in gradients[1].items():
        assert gradient is not None, name
        without = gradients[0][name]
        assert torch.equal(gradient, without) if without is not None else (gradient == 0).all()
    assert any(each is None for each in gradients[0].values())
    with_picture = [processor.encode(conversation("What?", "this", images=[picture(0)]))]
    assert_same(processor.pack(with_picture), processor.pack(with_picture, always_vision=True))


def test_branches_on_one_root_equal_separate_rows(processor, model):
    """Loss and gradients, in fp64, of one picture with three questions, between other samples."""
    model = model.double()
    rounds = [conversation("Odd?", "yes"), [*conversation("Even?", "no"), *conversation("Sure?", "yes, i am")]]
    rounds.append(conversation("Which digit is this?", "seven"))
    media = picture(3)
    before, after = (
        processor.encode(conversation("Hello", "hi")),
        processor.encode(conversation("What?", "this", images=[picture(5)])),
    )
    together = processor.encode_branches([_showing(media, rounds[0]), *rounds[1:]])
    separate = [processor.encode(_showing(media, each)) for each in rounds]
    packed = processor.pack([before, together, after])
    rows = processor.pack([before, *separate, after])
    assert packed["input_ids"].numel() == rows["input_ids"].numel() - 2 * processor.num_latents
    assert packed["pixel_values"].shape[0] == rows["pixel_values"].shape[0] - 2 * 4
    assert isinstance(packed["layout"], PackedLayout)
    assert (packed["labels"] != -100).sum() == (rows["labels"] != -100).sum()
    losses, gradients = [], []
    for batch in (packed, rows):
        model.zero_grad()
        losses.append(model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss)
        losses[-1].backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for name, gradient in gradients[1].items():  # the decoder's norms compute in fp32 whatever they get
        atol = 1e-5 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=atol, msg=name)


def _showing(media, messages):
    (question, *rest) = messages
    return [{**question, "content": [{"type": "image", "image": media}, *question["content"]]}, *rest]


def test_branches_that_cannot_be(processor):
    with_media = _showing(picture(0), conversation("Odd?", "yes"))
    with pytest.raises(ValueError, match="only that one may have some"):
        processor.encode_branches([conversation("Even?", "no"), with_media])
    with pytest.raises(ValueError, match="no conversations"):
        processor.encode_branches([])
    several = processor.encode_branches([with_media, conversation("Even?", "no")])
    with pytest.raises(ValueError, match="packed, not padded"):
        processor.pad([several])
    alone = processor.encode_branches([with_media])
    assert alone.branch_lengths == ()


def test_generators_are_for_all_samples_or_none(processor):
    samples = [processor.encode(conversation("What?", "this", images=[picture(n)])) for n in range(2)]
    generators = [np.random.default_rng(n) for n in range(2)]
    both = processor.pack(samples, generator=generators)["pixel_values"]
    alone = processor.pack(samples[1:], generator=np.random.default_rng(1))["pixel_values"]
    assert torch.equal(both[4:], alone), "a sample's crop is its own generator's"
    with pytest.raises(ValueError, match="some have none"):
        processor.pack(samples, generator=[generators[0], None])
    text = replace(samples[0], media=[], is_video=[])
    processor.pack([text, samples[1]], generator=[None, generators[1]])
