"""What every source of records gives, whatever it reads."""

import io
import json
import pickle
import tarfile

import pytest
import torch

from lynx.data.columns import ColumnRecords
from lynx.data.json_list import JsonListRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.media_folder import MediaFolder
from lynx.data.mixture import Group, Mixture
from lynx.data.parquet import ParquetRows
from lynx.data.records import Record, RecordError
from lynx.data.shapes import parse
from lynx.data.shards import ShardedRecords
from lynx.data.source import RecordSource, open_source
from lynx.data.stream import PackSampler
from lynx.data.tar import TarRecords
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


def json_list(folder):
    path = folder / "some.json"
    path.write_text(json.dumps({"data": RECORDS}))
    return JsonListRecords(path)


def tar(folder, records=RECORDS, name="some.tar"):
    path = folder / name
    with tarfile.open(path, "w") as file:
        for number, record in enumerate(records):
            content = json.dumps(record).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return TarRecords(path)


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": each["question"], "answer": each.get("answer")} for each in RECORDS]
    pyarrow.write_table(
        pytest.importorskip("pyarrow").Table.from_pylist(rows), folder / "some.parquet", row_group_size=2
    )
    return ColumnRecords(ParquetRows(folder / "some.parquet"))


def shards(folder):
    return ShardedRecords([tar(folder, RECORDS[:2], "0.tar"), tar(folder, RECORDS[2:], "1.tar")])


SOURCES = {
    "jsonl": jsonl, "json list": json_list, "tar": tar, "parquet": parquet, "shards": shards,
    "columns": lambda folder: ColumnRecords(RECORDS), "own": lambda folder: Own(),
}  # fmt: skip


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
    with pytest.raises(ValueError, match=r"columns are for the rows of a table, .* and .*some\.jsonl has none"):
        open_source(path, columns={"image": "photo"})
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "none.jsonl")
    asked = []

    def from_disk(folder, **options):
        asked.append((folder, options))
        return Own()

    monkeypatch.setattr(ColumnRecords, "from_disk", from_disk)
    (tmp_path / "state.json").write_text("{}")
    open_source(tmp_path, columns={"image": "photo"}, root=tmp_path, task="vqa")
    options = {"columns": {"image": "photo"}, "root": tmp_path, "task": "vqa", "check": False}
    assert asked == [(tmp_path, options)]
