"""What every source of records gives, whatever it reads."""

import json
import pickle

import pytest
import torch

from lynx.data.columns import ColumnRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture
from lynx.data.records import MediaFolder, Record, RecordError, parse
from lynx.data.source import RecordSource, open_source
from lynx.data.stream import PackSampler
from tests.lynx.batches import load

RECORDS = [{"question": f"{n}?", "answer": "yes"} for n in range(5)] + [{"question": "Why?"}]  # the last has no answer


class Own:
    """A source as anyone may write it."""

    task = None
    fingerprint = "of its content"

    def __len__(self) -> int:
        return len(RECORDS)

    def __getitem__(self, index: int) -> Record:
        return parse(RECORDS[index], MediaFolder(None))

    def where(self, index: int) -> str:
        return f"own[{index}]"


def jsonl(folder):
    path = folder / "some.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    return JsonlRecords(path)


SOURCES = {"jsonl": jsonl, "columns": lambda folder: ColumnRecords(RECORDS), "own": lambda folder: Own()}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path)


def test_it_has_what_the_protocol_asks_for(source):
    assert isinstance(source, RecordSource)
    assert source.task is None or isinstance(source.task, str)
    assert source.fingerprint is None or isinstance(source.fingerprint, str)
    assert isinstance(source.where(3), str)
    assert source.where(3) != source.where(4)


def test_records_have_numbers_and_stay_the_same(source):
    assert len(source) == len(RECORDS)
    for index in (4, 0, 3, 0):
        assert source[index] == source[index]
        [[question, _]] = source[index].conversations
        assert question["content"] == f"{index}?"


def test_bad_records_and_numbers_are_errors(source):
    with pytest.raises(RecordError, match="no answer"):
        source[5]
    with pytest.raises(IndexError):
        source[len(RECORDS)]


def test_a_copy_in_another_process_gives_the_same(source):
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.fingerprint, copy.where(2), copy[2]) == (
        len(source), source.fingerprint, source.where(2), source[2],
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_it_can_be_trained_on(source, processor, workers):
    """The bad record is skipped, with its place."""
    mixture = Mixture([Group("all", 1, {"some": source})], seed=0)
    sampler = PackSampler(mixture, processor, token_budget=60, seed=0, max_steps=12)
    batches = list(load(sampler, workers))
    skipped = [entry for batch in batches for entry in batch["report"].skipped]
    assert {(entry.dataset, entry.record, entry.path) for entry in skipped} == {("some", 5, source.where(5))}
    assert sum(batch["report"].samples["some"] for batch in batches) > len(RECORDS)
    assert all(isinstance(batch["input_ids"], torch.Tensor) for batch in batches)


def test_what_is_not_a_source():
    assert not isinstance(range(3), RecordSource)


def test_a_path_is_opened_by_what_it_is(tmp_path, monkeypatch):
    path = jsonl(tmp_path).path
    opened = open_source(path, task="vqa")
    assert isinstance(opened, JsonlRecords)
    assert opened.task == "vqa"
    with pytest.raises(ValueError, match=r"columns are for a folder .*some\.jsonl is not a folder"):
        open_source(path, columns={"image": "photo"})
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "none.jsonl")
    asked = []
    monkeypatch.setattr(ColumnRecords, "from_disk", lambda folder, **options: asked.append((folder, options)))
    open_source(tmp_path, columns={"image": "photo"}, root=tmp_path, task="vqa")
    assert asked == [(tmp_path, {"columns": {"image": "photo"}, "root": tmp_path, "task": "vqa"})]
