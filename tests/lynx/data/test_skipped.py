"""Records that cannot be used: left out, counted, named, up to a limit."""

import json

import pytest
from PIL import Image

from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture
from lynx.data.skipped import Skipped, SkippedRecords, TooManySkippedError
from lynx.data.stream import PackSampler
from tests.lynx.batches import load, write
from tests.lynx.conftest import make_image


@pytest.fixture
def damaged(tmp_path, processor):
    """Ten records: one names a file that is not an image, one has no answer, one is too long."""
    Image.fromarray(make_image(0)).save(tmp_path / "good.png")
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
def test_records_that_cannot_be_used_are_left_out_counted_and_named(damaged, tmp_path, ranks, workers):
    lists = [SkippedRecords(tmp_path / "run", rank, limit=5) for rank in range(ranks)]
    for rank in range(ranks):
        for batch in load(damaged(max_steps=25, ranks=ranks, rank=rank), workers):
            lists[rank].add(batch["report"].skipped)
            assert batch["report"].samples.keys() <= {"some"}
    assert lists[0].path.name == "skipped.jsonl"
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
        assert each.summary() == {"skipped_records": 2, "too_long_records": 1}


def test_only_one_rank_tells_of_what_every_rank_met(damaged):
    first, second = (list(damaged(max_steps=25, ranks=2, rank=rank)) for rank in (0, 1))
    assert sum(isinstance(item, Skipped) for pack in first for item in pack) > 1
    assert not any(isinstance(item, Skipped) for pack in second for item in pack)


def test_every_draw_becomes_a_sample_or_is_skipped_once(damaged):
    sampler = damaged(max_steps=40)
    items = [item for pack in sampler for item in pack]
    state = sampler.state_after(40)
    assert len(items) + len(state["waiting"]) == state["mixture"]["counts"]["some"]


def test_records_are_skipped_up_to_a_limit(tmp_path):
    folder = tmp_path / "deep"
    path = folder / "skipped.jsonl"
    entries = [Skipped("a", n, f"a.jsonl:{n + 1}", "no such image") for n in range(4)]
    skipped = SkippedRecords(folder, limit=2)
    skipped.add([])
    assert not path.exists()
    skipped.add([*entries[:2], entries[0], Skipped("a", 9, "a.jsonl:10", "long", True)])
    assert skipped.summary() == {"skipped_records": 2, "too_long_records": 1}
    resumed = SkippedRecords(folder, limit=2)
    assert resumed.summary() == skipped.summary()
    resumed.add(entries[:2])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(TooManySkippedError, match=r"3 records cannot.*max_skipped=2.*skipped\*\.jsonl.*a\.jsonl:3"):
        resumed.add(entries[:3])
    assert len(path.read_text().splitlines()) == 4, "the last one is listed, too"
    again = SkippedRecords(folder, limit=2)
    again.add([Skipped("a", 9, "a.jsonl:10", "long", True)])
    with pytest.raises(TooManySkippedError, match=r"3 records cannot be used.*a\.jsonl:1"):
        again.add(entries[:1])
    SkippedRecords(folder, limit=3).add(entries[:1])


def test_the_limit_is_that_of_all_ranks(tmp_path):
    entries = [Skipped("a", n, f"a.jsonl:{n + 1}", "no such image") for n in range(4)]
    first, second, third = (SkippedRecords(tmp_path, rank, limit=3) for rank in range(3))
    first.add(entries[:2])
    second.add(entries[1:3])
    assert [json.loads(line)["record"] for line in second.path.read_text().splitlines()] == [2]
    third.add(entries[:3])
    assert not third.path.exists(), "the others have listed all of it"
    with second.path.open("a") as file:
        file.write(json.dumps(Skipped("a", 7, "", "")._asdict())[:9])  # it is just being written
    assert [each.summary()["skipped_records"] for each in (first, second, third)] == [3, 3, 3]
    with pytest.raises(TooManySkippedError, match="4 records cannot be used, more than max_skipped=3"):
        first.add(entries[3:])


def test_the_lists_of_earlier_code_count(tmp_path):
    """They were called broken.jsonl, of further ranks broken-1.jsonl and so on."""
    entries = [Skipped("a", n, f"a.jsonl:{n + 1}", "no such image") for n in range(3)]
    for name, entry in zip(("broken.jsonl", "broken-1.jsonl"), entries, strict=False):
        (tmp_path / name).write_text(json.dumps(entry._asdict()) + "\n")
    resumed = SkippedRecords(tmp_path, limit=2)
    resumed.add(entries[:2])
    assert resumed.summary() == {"skipped_records": 2, "too_long_records": 0}
    assert not resumed.path.exists()
    with pytest.raises(TooManySkippedError, match="3 records cannot be used"):
        resumed.add(entries[2:])
    assert len(resumed.path.read_text().splitlines()) == 1


def test_half_a_line_of_a_killed_run(tmp_path):
    path = tmp_path / "skipped.jsonl"
    entries = [Skipped("a", n, "", "why") for n in range(3)]
    SkippedRecords(tmp_path).add(entries[:2])
    path.write_text(path.read_text()[:-9])
    resumed = SkippedRecords(tmp_path)
    assert resumed.count == 1
    resumed.add(entries[:2])
    resumed.add(entries[2:])
    assert resumed.count == SkippedRecords(tmp_path).count == 3
    assert len(path.read_text().splitlines()) == 4, "half a line, and the three others"


def test_too_long_can_be_an_error(damaged):
    with pytest.raises(ValueError, match=r"some\.jsonl:10: \d+ tokens are more than the budget of 60"):
        list(damaged(max_steps=25, too_long="error"))


def test_data_without_a_usable_record_stops(tmp_path, processor):
    write(tmp_path / "none.jsonl", [{"question": "?"}] * 3)
    chosen = Mixture([Group("all", 1, {"none": JsonlRecords(tmp_path / "none.jsonl")})], seed=0)
    with pytest.raises(TooManySkippedError, match=r"none of the last 1000 records.*none\.jsonl"):
        next(iter(PackSampler(chosen, processor, token_budget=60, seed=0)))
