"""Records in the rows of ``datasets``, which a stand-in is for here, and of anything else."""

import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from lynx.data.columns import ColumnRecords
from lynx.data.description import open_mixture
from lynx.data.prompts import Prompts
from lynx.data.records import RecordError
from tests.lynx.conftest import make_image

QUESTION = {"role": "user", "content": "Odd?"}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.fixture
def root(tmp_path):
    Image.fromarray(make_image(0)).save(tmp_path / "a.png")
    return tmp_path


def phrased(record, tasks):
    return Prompts(tasks).phrase(record, np.random.default_rng(0))


@dataclass
class Labels:
    """As ``datasets.ClassLabel``."""

    names: tuple[str, ...] = ("cat", "dog")

    def int2str(self, number):
        return self.names[number]


class Rows:
    """As ``datasets.Dataset``, as far as it matters: rows are as they are stored in the format of Arrow."""

    def __init__(self, rows, features, kind=None):
        self.rows, self.features, self.format = rows, features, {"type": kind}
        self.data = types.SimpleNamespace(nbytes=len(repr(rows)))

    column_names = property(lambda self: list(self.rows[0]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        if self.format["type"] == "custom":
            return {**row, "query": "Transformed?"}
        assert self.format["type"] == "arrow"
        return types.SimpleNamespace(to_pylist=lambda: [row])

    def with_format(self, kind):
        return Rows(self.rows, self.features, kind)

    def select_columns(self, columns):
        return Rows([{column: row[column] for column in columns} for row in self.rows], self.features)


def test_rows_of_datasets(root):
    raw = (root / "a.png").read_bytes()
    rows = [
        {"img": {"bytes": raw, "path": None}, "label": 1, "query": "Which?"},
        {"img": {"bytes": None, "path": "a.png"}, "label": 0, "query": "Which?"},
        {"img": None, "label": -1, "query": "Which?"},
    ]
    features = {"img": "image", "label": Labels(), "query": "string"}
    dataset = Rows(rows, features)
    columns = {"image": "img", "answer": "label", "question": "query"}
    records = ColumnRecords(dataset, columns, task="vqa", name="pets")
    assert len(records) == 3
    [messages] = phrased(records[0], {"vqa": ["{question} Short."]})
    assert messages[0]["content"][0] == {"type": "image", "image": raw}
    assert messages[1]["content"] == "dog"
    with pytest.raises(RecordError, match="needs a root folder"):
        records[1]
    inside = ColumnRecords(dataset, columns, root)[1]
    assert inside.conversations[0][0]["content"][0]["image"] == str(root / "a.png")
    with pytest.raises(RecordError, match="answer is -1"):
        records[2]
    assert records.where(2) == "pets[2]"
    transformed = ColumnRecords(Rows(rows, features, "custom"), columns)
    assert transformed[0].conversations[0][0]["content"][1]["text"] == "Transformed?"
    assert transformed.fingerprint is None


def test_the_fingerprint_of_rows(root):
    rows = [{"answer": f"{n:3}", "label": n % 2, "other": n} for n in range(200)]
    features = {"answer": "string", "label": Labels()}

    def fingerprint(rows=rows, features=features, columns=None, **options):
        return ColumnRecords(
            Rows(rows, features), columns or {"answer": "answer", "task": "label"}, **options
        ).fingerprint

    first = fingerprint()
    assert fingerprint(root=root, name="elsewhere") == fingerprint([{**row, "other": 0} for row in rows]) == first
    others = [
        fingerprint([{**rows[0], "answer": "one"}, *rows[1:]]),
        fingerprint([rows[0], {**rows[1], "answer": "longer, though not among the rows that are read"}, *rows[2:]]),
        fingerprint(features={**features, "label": Labels(("dog", "cat"))}),
        fingerprint(columns={"answer": "answer"}),
    ]
    assert len({first, *others}) == 5


def test_rows_of_anything(root):
    messages = [QUESTION, ANSWER]
    records = ColumnRecords([{"messages": messages, "other": 3}])
    assert records[0].conversations == [messages]
    image = Image.fromarray(make_image(0))
    [[question, _]] = ColumnRecords([{"image": image, "answer": "x"}])[0].conversations
    assert question["content"][0]["image"] is image
    for bad, message in (
        (([{"a": 1}], {"image": "b"}), r"no column \['b'\]"),
        (([{"a": 1}],), r"none of the columns \['a'\] has the name of a field"),
        (([{"a": 1}], {"photo": "a"}), r"no field \['photo'\]"),
        (([],), "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ColumnRecords(*bad)
    with pytest.raises(TypeError, match="without streaming"):
        ColumnRecords(iter([]))
    with pytest.raises(TypeError, match=r"splits \['train'\]"):
        ColumnRecords({"train": [1]})


def test_a_saved_data_set(root, monkeypatch):
    """What ``open_mixture`` asks of the library; a module that gives such rows stands in for it."""
    rows = Rows([{"img": {"bytes": b"raw", "path": None}, "label": 1}], {"img": "image", "label": Labels()})
    library = types.SimpleNamespace(load_from_disk={str(root / "saved"): rows}.__getitem__)
    monkeypatch.setitem(sys.modules, "datasets", library)
    (root / "saved").mkdir()
    (root / "saved/state.json").write_text("{}")
    columns = {"image": "img", "answer": "label"}
    description = [{"name": "g", "weight": 1, "datasets": [{"name": "s", "path": "saved", "columns": columns}]}]
    [records] = open_mixture(description, root, seed=0).datasets
    [messages] = phrased(records[0], {})
    assert messages[0]["content"][0] == {"type": "image", "image": b"raw"}
    assert messages[1]["content"] == "dog"
    assert records.where(0) == f"{root}/saved[0]"


def test_a_missing_library_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        ColumnRecords.from_disk(root)
