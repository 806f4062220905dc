"""Data as people have it: records of LLaVA, ShareGPT, TRL and OpenAI, in JSON, Parquet, WebDataset and folders.

It is read as it is, or refused once, when it is opened, with a sentence that says what to do. A record of a shape names
its media in any of the usual ways and places; it never reaches a file outside of its root, its tar or its row.
"""

import base64
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lynx.data import json_list
from lynx.data.description import open_mixture
from lynx.data.json_list import JsonListRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.media_folder import MediaFolder
from lynx.data.mixture import Group, Mixture
from lynx.data.parquet import ParquetRows
from lynx.data.prompts import Prompts
from lynx.data.records import RecordError, text_of
from lynx.data.shapes import SHAPES, parse, shape_of
from lynx.data.shards import ShardedRecords
from lynx.data.source import open_source
from lynx.data.stream import PackSampler
from lynx.eval import questions
from tests.lynx.batches import assert_same, load
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import make_image

DOCS = Path(__file__).parents[3] / "docs/data.md"
NAMES = ("cat.png", "1.png", "2.png")
ASKED, ANSWERED = "What is this?", "A cat."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", [frame(n) for n in range(5)])


@pytest.fixture
def root(tmp_path, clip):
    """A folder with three images and a video, and an image beside it."""
    root = tmp_path / "root"
    root.mkdir()
    for number, name in enumerate(NAMES):
        Image.fromarray(make_image(number)).save(root / name)
    Image.fromarray(make_image(9)).save(tmp_path / "secret.png")
    shutil.copy(clip, root)
    return root


def raw(root, name="cat.png"):
    return (root / name).read_bytes()


def data_url(root, name="cat.png"):
    return f"data:image/png;base64,{base64.b64encode(raw(root, name)).decode()}"


def read(record, root):
    [conversation] = parse(record, MediaFolder(root)).conversations
    return conversation


def parts(message):
    """The content, media by the names of their files."""
    content = message["content"]
    found = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part["text"] if "text" in part else Path(part[part["type"]]).name for part in found]


def llava(value, answer=ANSWERED, **more):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}


def messages(content, **more):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWERED}]
    return {"messages": turns, **more}


# The documentation


def documented():
    """The records that docs/data.md shows."""
    blocks = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


def test_the_records_that_are_documented(root, processor):
    """All are read, and encoded as the model takes them; every shape has one."""
    tasks = Prompts.default()
    for record in documented():
        parsed = parse(record, MediaFolder(root, check=True))
        conversations = tasks.phrase(parsed, np.random.default_rng(0))
        sample = processor.encode_branches(conversations, parsed.parents)
        assert sample.num_supervised > 0
        shows = "image" in json.dumps(record) or "video" in json.dumps(record) or "file_name" in record
        assert bool(sample.media) == shows
    assert {shape_of(record).name for record in documented()} == {shape.name for shape in SHAPES}


def tar_of(path, members):
    """A tar file of names and contents; of a content that is a TarInfo, only that."""
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            file.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pyarrow():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def parquet_of(path, rows, **options):
    arrow, parquet = pyarrow()
    parquet.write_table(arrow.Table.from_pylist(rows, **options), path, row_group_size=2)
    return path


RECORDS = [{"question": f"{n}?", "answer": f"number {n}"} for n in range(5)]


def json_lines(folder):
    (folder / "data.txt").write_text("".join(f"{json.dumps(each)}\n" for each in RECORDS))
    return folder / "data.txt"


def as_json_list(folder):
    (folder / "data.txt").write_text(json.dumps(RECORDS, indent=2))
    return folder / "data.txt"


def parquet_file(folder):
    return parquet_of(folder / "data.bin", RECORDS)


def tar_file(folder):
    return tar_of(folder / "data.bin", [(f"{n}.json", json.dumps(each).encode()) for n, each in enumerate(RECORDS)])


def folder_of_shards(folder):
    for shard, some in enumerate((RECORDS[:2], RECORDS[2:])):
        members = [(f"{n}.json", json.dumps(each).encode()) for n, each in enumerate(some)]
        tar_of(folder / f"train-{shard:05}-of-00002.tar", members)
    return folder


def saved_data_set(folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder / "saved"


def pattern(folder):
    for shard, some in enumerate((RECORDS[:2], RECORDS[2:])):
        (folder / f"part-{shard}.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in some))
    (folder / "other.jsonl").write_text("{}\n")
    return folder / "part-*.jsonl"


CONTAINERS = {
    "JSON lines": json_lines, "JSON list": as_json_list, "Parquet": parquet_file, "tar": tar_file,
    "a folder": folder_of_shards, "a saved data set": saved_data_set, "a pattern": pattern,
}  # fmt: skip


def test_the_containers_that_are_documented():
    table = re.findall(r"^\| ([^|]+?) \| .*\|$", DOCS.read_text(), re.MULTILINE)
    assert table[1:] == list(CONTAINERS), "the first row is the head"


@pytest.fixture(params=CONTAINERS)
def container(request, tmp_path):
    folder = tmp_path / "container"
    folder.mkdir()
    return CONTAINERS[request.param](folder)


def test_a_container_is_known_by_its_content(container):
    source = open_source(container)
    assert [text_of(source[n].conversations[0][0]) for n in range(len(source))] == [f"{n}?" for n in range(5)]
    assert len({source.where(n) for n in range(5)}) == 5
    again = open_source(container)
    assert again.fingerprint == source.fingerprint is not None
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3]


def test_a_run_goes_on_in_any_container(container, processor):
    """With the very packs that would have followed."""

    def sampler():
        mixture = Mixture([Group("all", 1, {"some": open_source(container)})], seed=0)
        return PackSampler(mixture, processor, token_budget=60, seed=0, max_steps=8)

    first = sampler()
    batches = list(load(first))
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(first.state_after(4))))
    for batch, other in zip(batches[4:], load(resumed, workers=1), strict=True):
        assert_same(batch, other)


def test_other_content_has_another_fingerprint(tmp_path):
    """A run does not go on with it: one letter differs, and neither the number of records nor the size of the file."""
    other = [{**each, "answer": each["answer"].replace("4", "6")} for each in RECORDS]
    writers = [
        lambda path, rows: path.write_text(json.dumps(rows)),
        lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
        lambda path, rows: tar_of(path, [(f"{n}.json", json.dumps(each).encode()) for n, each in enumerate(rows)]),
    ]
    if importlib.util.find_spec("pyarrow"):
        writers.append(parquet_of)
    for write in writers:
        found = []
        for rows in (RECORDS, other, RECORDS):
            write(tmp_path / "data", rows)
            found.append(open_source(tmp_path / "data").fingerprint)
        assert found[0] == found[2] != found[1]


# Shapes of records


@pytest.mark.parametrize(
    ("value", "image", "expected"),
    [
        ("<image>\nWhat is this?", "cat.png", ["cat.png", "What is this?"]),
        ("What is this?\n<image>", "cat.png", ["What is this?", "cat.png"]),
        ("What is <image>?", "cat.png", ["What is ", "cat.png", "?"]),
        ("<image>", "cat.png", ["cat.png"]),
        ("<image><image>Same?", ["1.png", "2.png"], ["1.png", "2.png", "Same?"]),
        ("<image>\n<image>\nSame?", ["1.png", "2.png"], ["1.png", "2.png", "Same?"]),
        ("A:\n<image>\nB:\n<image>\nSame?", ["1.png", "2.png"], ["A:\n", "1.png", "B:\n", "2.png", "Same?"]),
        ("What is this?", "cat.png", ["cat.png", "What is this?"]),
        ("What is this?", ["1.png", "2.png"], ["1.png", "2.png", "What is this?"]),
        ("What is this?", None, ["What is this?"]),
        ("Is <image> a tag of SVG?", None, ["Is <image> a tag of SVG?"]),
    ],
)
def test_marks_in_the_text(root, value, image, expected):
    record = llava(value) if image is None else llava(value, image=image)
    assert parts(read(record, root)[0]) == expected
    as_messages = messages(value) if image is None else messages(value, images=image)
    assert parts(read(as_messages, root)[0]) == expected


def test_marks_in_later_turns(root):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "And <image>?"), ("gpt", "A dog.")]
    record = {"conversations": [{"from": who, "value": value} for who, value in turns], "image": ["1.png", "2.png"]}
    found = read(record, root)
    assert [parts(each) for each in found] == [["1.png", "What?"], ["A cat."], ["And ", "2.png", "?"], ["A dog."]]
    assert [each["role"] for each in found] == ["user", "assistant"] * 2


def test_videos(root):
    assert parts(read(llava("<video>\nWhat happens?", video="clip.mp4"), root)[0]) == ["clip.mp4", "What happens?"]
    [question, _] = read(llava("<video>\nWhat?", video=["1.png", "2.png"]), root)
    assert [Path(each).name for each in question["content"][0]["video"]] == ["1.png", "2.png"]
    both = llava("<video> or <image>?", videos=["clip.mp4"], images=["cat.png"])
    assert parts(read(both, root)[0]) == ["clip.mp4", " or ", "cat.png", "?"]
    [question, _] = read(llava("<video><video>?", videos=["clip.mp4", ["1.png", "2.png"]]), root)
    assert [isinstance(part.get("video"), list) for part in question["content"]] == [False, True, False]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            llava("<image>\nWhat?", image=["1.png", "2.png"]),
            "places for images in its text: 1; images that it names: 2",
        ),
        (llava("<image><image>?", image="1.png"), "places for images in its text: 2; images that it names: 1"),
        (llava("<image>\nWhat?"), "mark <image>, and the record does not name what stands there"),
        (llava("What?\n<video>", image="cat.png"), "mark <video>, and the record does not name"),
        (
            messages([{"type": "image"}, {"type": "text", "text": "?"}]),
            "images in its text: 1; images that it names: 0",
        ),
        (
            messages([{"type": "image", "index": 3}], images=["1.png"]),
            "places for images in its text: 1; images that it",
        ),
        (messages("?", image="1.png", images=["1.png"]), "it has image and images; one of them"),
        (
            llava("?", image="https://example.org/a.png"),
            "the address https://example.org/a.png is never fetched: download",
        ),
        (llava("?", image="s3://bucket/a.png"), "never fetched"),
        (
            {"conversations": [{"from": "human", "value": "?"}]},
            "roles are .'user'., expected user and assistant in turn",
        ),
        ({"conversations": [{"from": "gpt", "value": "!"}, {"from": "human", "value": "?"}]}, "roles are"),
        ({"conversations": [{"from": "tool", "value": "!"}]}, "a message is of 'tool'; known are user, human"),
        ({"conversations": "?"}, "must be a list, got str"),
        ({"conversations": ["?"]}, "a message must be a mapping"),
        (
            {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "!"}]},
            "neither text nor a list",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "tools",
        ),
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, r"keys are \['prompt', 'chosen', 'rejected'\]"),
        ({"caption": "A cat."}, "an image and a caption; this one has none of these"),
        ({"image": "cat.png", "caption": " "}, "answer is ' '"),
    ],
)
def test_what_cannot_be_read_is_said(root, record, reason):
    with pytest.raises(RecordError, match=reason):
        read(record, root)


def test_the_system_speaks_first(root):
    turns = [{"from": "system", "value": "Be brief."}, *llava("<image>\nWhat?")["conversations"]]
    assert parts(read({"conversations": turns, "image": "cat.png"}, root)[0]) == ["Be brief.\n", "cat.png", "What?"]
    spoken = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *messages("What?")["messages"]]
    assert text_of(read({"messages": spoken}, root)[0]) == "Be brief.\nWhat?"
    silent = [{"role": "system", "content": ""}, *messages("What?")["messages"]]
    assert read({"messages": silent}, root)[0]["content"] == "What?"
    with pytest.raises(RecordError, match="a system's message may come before them"):
        read({"messages": [*messages("What?")["messages"], spoken[0]]}, root)


@pytest.mark.parametrize("form", ["path", "image", "url", "image_url", "image_url in a mapping", "input_image", "file"])
def test_parts_name_their_image_in_many_ways(root, form):
    text = {"type": "text", "text": "?"}
    for name, expected in (("cat.png", str(root / "cat.png")), (data_url(root), raw(root))):
        if form == "path" and name != "cat.png":
            continue
        part = {
            "path": {"type": "image", "path": name, "base64": None},
            "image": {"type": "image", "image": name, "text": None},
            "url": {"type": "image", "url": name},
            "image_url": {"type": "image_url", "image_url": name},
            "image_url in a mapping": {"type": "image_url", "image_url": {"url": name, "detail": "low"}},
            "input_image": {"type": "input_image", "image_url": name},
            "file": {"type": "image", "url": f"file://{root}/cat.png" if name == "cat.png" else name},
        }[form]
        [question, _] = read(messages([part, text]), root)
        assert question["content"] == [{"type": "image", "image": expected}, text]
    bare = {"type": "image", "base64": base64.b64encode(raw(root)).decode()}
    assert read(messages([bare, text]), root)[0]["content"][0]["image"] == raw(root)


def test_images_beside_messages(root):
    """In the order of the places, or as the parts number them; encoded, or in memory."""
    places = [{"type": "image", "text": None, "index": 1}, {"type": "text", "text": "?", "index": None}]
    places += [{"type": "image", "text": None, "index": 0}]
    assert parts(read(messages(places, images=["1.png", "2.png"]), root)[0]) == ["2.png", "?", "1.png"]
    beside = [{"type": "image"}, {"type": "text", "text": "Is <image> a tag?"}]
    assert parts(read(messages(beside, images="cat.png"), root)[0]) == ["cat.png", "Is <image> a tag?"]
    images = [{"bytes": raw(root), "path": None}, {"bytes": None, "path": "1.png"}, Image.new("RGB", (3, 3))]
    content = [{"type": "image"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    found = read(messages(content, images=images), root)[0]["content"]
    assert [part.get("image") for part in found] == [raw(root), str(root / "1.png"), images[2], None]
    prompted = {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "!"}]}
    assert parts(read({**prompted, "images": ["cat.png"]}, root)[0]) == ["cat.png", "?"]
    assert [text_of(each) for each in read({"prompt": "?", "completion": "!"}, root)] == ["?", "!"]


def test_captions_are_asked_for(root, processor):
    for record in ({"image": "cat.png", "caption": "A cat."}, {"file_name": "cat.png", "text": "A cat."}):
        parsed = parse(record, MediaFolder(root))
        [conversation] = Prompts.default().phrase(parsed, np.random.default_rng(0))
        assert len(text_of(conversation[0])) > 10
        assert text_of(conversation[1]) == "A cat."
    assert parse({"video": "clip.mp4", "caption": "It moves."}, MediaFolder(root)).task == "video caption"
    assert parse(record, MediaFolder(root), task="detailed caption").task == "detailed caption"


def test_a_change_of_shape_is_told_once(root, caplog):
    """All are read, each by its own keys."""
    lines = [messages("What?"), llava("<image>\nWhat?", image="cat.png"), messages("?"), llava("?"), RECORDS[0]]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING, "lynx"):
        source = open_source(root / "data.jsonl")
        for _ in range(2):
            for index in range(len(source)):
                assert source[index].conversations
    [told] = [each.getMessage() for each in caplog.records]
    assert told.startswith(
        f"{root}/data.jsonl:2: a record with conversations, where the first one, {root}/data.jsonl:1"
    )
    caplog.clear()
    (root / "same.jsonl").write_text("\n".join(map(json.dumps, [llava("What?"), llava("?", image="cat.png")])))
    source = open_source(root / "same.jsonl")
    assert [source[index] for index in (1, 0)]
    assert not caplog.records


# JSON


ODD_TEXTS = ['say "[1, {2}]"', "back\\slash\\", '\\"', "\\\\", "ends in \\", "{", "]", "ä,€,😀", "line\nend", ""]


@pytest.mark.parametrize(("indent", "chunk"), [(None, 1), (None, 2), (None, 3), (2, 7), (0, 64), (2, 2**22)])
def test_elements_of_a_list(tmp_path, monkeypatch, chunk, indent):
    """Whatever stands in texts, and wherever a piece that is read at once ends."""
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    records = [{"question": f"{n} {text}?", "answer": "x", "more": [[text], {"a": {"b": [text]}}]}
               for n, text in enumerate(ODD_TEXTS)]  # fmt: skip
    path = tmp_path / "data.json"
    around = {"info": {"data": [1]}, "names": ["a", "b"], "license": [], "version": "[{"}
    images = [{"id": 1}, {"id": 2}]
    for ascii_only in (True, False):
        for value, name in (
            (records, ""), ({**around, "annotations": records}, '["annotations"]'),
            ({**around, "images": images, "data": records, "more": images}, '["data"]'),
        ):  # fmt: skip
            path.write_text(json.dumps(value, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
            source = JsonListRecords(path)
            assert len(source) == len(records)
            for index, record in enumerate(records):
                assert text_of(source[index].conversations[0][0]) == record["question"]
            assert source.where(3) == f"{path}{name}[3]"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "is empty"), ("[ \n ]", "is empty"), ('{\n"data": []}', "its lists of mappings: none"),
        ('{\n"a": [{"x": 1}],\n"b": [{"x": 1}]}', "its lists of mappings: a, b"),
        ('{\n"a": [1, 2]}', "its lists of mappings: none"),
        ('[\n{"question": "?", "answer": "x"},', "cut short: 1 brackets did not end"),
        ('[\n{"question": "?', "cut short: a text did not end"),
        ('{\n"question": "?"\n}\n{\n"question": "?"\n}', "several JSON values, some over several lines"),
        ("[\n1]]", "a bracket closes that was not opened"),
        ('[\n{"question": "?", "answer": "x"}\n] and more', "more than JSON at its end"),
        ("[\n1, 2]", "a record must be a JSON object, got int"),
    ],
)  # fmt: skip
def test_json_that_is_no_list_of_records(tmp_path, content, reason):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        open_source(tmp_path / "data.json")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("chunk", [1, 5, 2**22])
def test_lines(tmp_path, monkeypatch, end, mark, chunk):
    """Blank ones have no number, but count where a person looks for a record."""
    monkeypatch.setattr("lynx.data.jsonl._CHUNK", chunk)
    path = tmp_path / "data.jsonl"
    first, second, third = (json.dumps(each) for each in RECORDS[:3])
    path.write_bytes(mark + end.join([first, "", " \t", second, third, "", ""]).encode())
    source = JsonlRecords(path)
    assert [text_of(source[n].conversations[0][0]) for n in range(len(source))] == ["0?", "1?", "2?"]
    assert [source.where(n).rpartition(":")[2] for n in range(3)] == ["1", "4", "5"]
    path.write_bytes(end.join(["", "", first, second]).encode())
    assert [JsonlRecords(path).where(n).rpartition(":")[2] for n in range(2)] == ["3", "4"]
    path.write_bytes(f"{end} {end}".encode())
    with pytest.raises(ValueError, match="is empty"):
        JsonlRecords(path)


def test_a_file_of_lines_is_not_taken_for_a_list(tmp_path):
    """A first line that is cut, a record that holds lists, a single record: they are lines."""
    path = tmp_path / "data"
    good = json.dumps(RECORDS[0])
    for lines in (
        ['{"question": "cut', good],
        [good],
        [json.dumps({"questions": RECORDS})],
        ["[1]", good],
        ["{}", good],
    ):
        path.write_text("\n".join(lines))
        assert isinstance(open_source(path), JsonlRecords)
    for value in (RECORDS, {"data": RECORDS}, {"anything": RECORDS}):
        for end in ("", "\n", "\n\n"):
            path.write_text(json.dumps(value) + end)
            assert isinstance(open_source(path), JsonListRecords)


def test_a_list_far_too_large_for_memory_is_read_in_pieces(tmp_path, monkeypatch):
    """One line of it may be longer than a record may be."""
    monkeypatch.setattr(json_list, "MAX_RECORD", 100)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    assert len(open_source(path)) == len(RECORDS)


# Parquet


def test_rows_with_encoded_images(root):
    rows = [
        {"images": [{"bytes": raw(root), "path": None}], "messages": messages([
            {"type": "image", "text": None}, {"type": "text", "text": "What?"}])["messages"]},
        {"images": [{"bytes": raw(root, "1.png"), "path": "no.png"}], "messages": messages([
            {"type": "text", "text": "What?"}, {"type": "image", "text": None}])["messages"]},
    ]  # fmt: skip
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": "A cat."}]
    source = open_source(parquet_of(root / "data.parquet", rows))
    assert source[0].conversations[0][0]["content"][0] == {"type": "image", "image": raw(root)}
    assert source[1].conversations[0][0]["content"][1] == {"type": "image", "image": raw(root, "1.png")}
    assert source.where(1) == f"{root}/data.parquet[1]"


def test_columns_and_labels(root):
    arrow, parquet = pyarrow()
    labels = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "photo": {"_type": "Image"}}
    rows = [
        {"photo": {"bytes": raw(root), "path": None}, "query": "?", "label": n % 2, "unread": "x"} for n in range(5)
    ]
    table = arrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": labels}})})
    parquet.write_table(table, root / "data.parquet", row_group_size=2)
    columns = {"image": "photo", "question": "query", "answer": "label"}
    source = open_source(root / "data.parquet", columns=columns)
    assert [source[n].conversations[0][1]["choices"] for n in range(5)] == [["cat"], ["dog"]] * 2 + [["cat"]]
    description = [{"name": "g", "weight": 1, "datasets": [{"name": "d", "path": "data.parquet", "columns": columns}]}]
    assert len(open_mixture(description, root, seed=0).datasets[0]) == 5
    with pytest.raises(ValueError, match=r"none of the columns .* has the name of a field"):
        open_source(parquet_of(root / "other.parquet", [{"a": 1}]))


def test_a_row_group_is_read_once_for_its_rows(root, monkeypatch):
    rows = ParquetRows(parquet_of(root / "data.parquet", RECORDS))
    numbers = []
    file = rows._file()

    class Counting:
        def read_row_group(self, number, **options):
            numbers.append((number, options["columns"]))
            return file.read_row_group(number, **options)

    monkeypatch.setattr(rows, "_open", (os.getpid(), Counting()))
    assert [rows[n]["question"] for n in (0, 1, 4, 3, 2)] == ["0?", "1?", "4?", "3?", "2?"]
    assert [number for number, _ in numbers] == [0, 2, 1]
    some = rows.select_columns(["answer"])
    assert some[1] == {"answer": "number 1"}


def test_row_groups_too_large(root, monkeypatch, caplog):
    path = parquet_of(root / "data.parquet", RECORDS)
    monkeypatch.setattr("lynx.data.parquet._SLOW", 10)
    with caplog.at_level(logging.WARNING, "lynx"):
        open_source(path)
    assert "is slow; write the file anew with smaller ones: pyarrow.parquet.write_table" in caplog.text
    monkeypatch.setattr("lynx.data.parquet._MOST", 10)
    with pytest.raises(ValueError, match="to read a row would read its row group of 0 MiB; write the file anew"):
        open_source(path)


def test_parquet_that_is_damaged(root):
    path = parquet_of(root / "data.parquet", RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data\.parquet: not a Parquet file, or damaged"):
        open_source(path)


def test_parquet_without_pyarrow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (root / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lynx-kernels\[parquet\]'"):
        open_source(root / "data.parquet")


# WebDataset


def test_members_make_records(root):
    metadata = {"url": "https://example.org/a.png", "key": "2", "caption": "shorter", "width": 3}
    members = [
        ("a/0.png", raw(root)), ("a/0.json", json.dumps(RECORDS[0]).encode()),
        ("a/1.png", raw(root, "1.png")), ("a/1.txt", "\ufeffA cat.\n".encode()),
        ("a/2.jpg", raw(root, "2.png")), ("a/2.json", json.dumps(metadata).encode()), ("a/2.txt", b"A dog."),
        ("a/3.json", json.dumps(metadata).encode()), ("a/3.png", raw(root)),
        ("a/4.json", json.dumps(llava("<image> or <image>?", image=["x/4.left.png", "4.right.png"])).encode()),
        ("a/4.right.png", raw(root, "1.png")), ("a/4.left.png", raw(root)),
        ("b/4.json", json.dumps(messages([{"type": "image"}, {"type": "text", "text": "?"}])).encode()),
        ("b/4.webp", raw(root)), ("b/4.mask.png", raw(root, "1.png")), ("b/._4.png", b"x"),
        ("b/5.mp4", raw(root, "clip.mp4")), ("b/5.txt", b"It moves."),
    ]  # fmt: skip
    source = open_source(tar_of(root / "data.tar", members), check=True)
    found = [source[n].conversations[0] for n in range(len(source))]
    image, other = ({"type": "image", "image": raw(root, name)} for name in ("cat.png", "1.png"))
    assert found[0][0]["content"] == [image, {"type": "text", "text": "0?"}]
    assert [found[n][1]["choices"] for n in (1, 2, 3, 6)] == [["A cat."], ["A dog."], ["shorter"], ["It moves."]]
    assert found[1][0]["content"][0] == other
    assert found[4][0]["content"] == [image, {"type": "text", "text": " or "}, other, {"type": "text", "text": "?"}]
    assert found[5][0]["content"] == [image, {"type": "text", "text": "?"}], "a mask is no image to ask about"
    assert found[6][0]["content"][0] == {"type": "video", "video": raw(root, "clip.mp4")}
    assert [source[n].task for n in (0, 1, 6)] == [None, "caption", "video caption"]
    assert source.where(5) == f"{root}/data.tar[b/4]"


def test_names_that_are_long_or_strange(root):
    keys = ["x" * 300, "ä" * 150, "folder/" * 20 + "y"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(root / "data.tar", "w", format=form) as file:
            for key in keys:
                for suffix, content in (("png", raw(root)), ("txt", key[:20].encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
        source = open_source(root / "data.tar")
        assert [source.where(n) for n in range(3)] == [f"{root}/data.tar[{key}]" for key in keys]
        assert [source[n].conversations[0][1]["choices"] for n in range(3)] == [[key[:20]] for key in keys]


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def test_a_tar_file_reaches_nothing_outside(root):
    secret = str(root.parent / "secret.png")
    record = json.dumps(RECORDS[0]).encode()
    naming = [
        json.dumps({**RECORDS[0], "image": name}).encode() for name in (secret, "../secret.png", f"file://{secret}")
    ]
    members = [
        ("0.json", record), ("1.json", record), link("1.png", secret), ("2.json", record),
        link("2.png", "0.json", tarfile.LNKTYPE), ("3.json", record), link("3.png", "", tarfile.FIFOTYPE),
        ("4.json", naming[0]), ("5.json", naming[1]), ("6.json", naming[2]),
        ("7.json", json.dumps({**RECORDS[0], "image": "frames.json"}).encode()), ("../8.json", record),
    ]  # fmt: skip
    source = open_source(tar_of(root / "data.tar", members))
    assert source[0].conversations
    for number in (1, 2, 3):
        with pytest.raises(RecordError, match="a member is a link, which is not followed"):
            source[number]
    for number in (4, 5, 6, 7):
        with pytest.raises(RecordError, match="is not among the members of the record"):
            source[number]
    assert source[8].conversations, "nothing is unpacked, so a name is a name"
    assert sorted(each.name for each in root.parent.iterdir()) == ["root", "secret.png"]
    with pytest.raises(ValueError, match="see its members alone; leave out root"):
        open_source(root / "data.tar", root=root)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.json", b"{")], "not JSON"), ([("1.png", b"")], "none of these"), ([("1.txt", b"x")], "none of these"),
        ([("1.png", b"x"), ("1.txt", b"\xff")], "the text of 1 is not UTF-8"),
        ([("1.txt", b"x"), ("1.txt", b"x")], "two members of the name 1.txt"),
    ],
)  # fmt: skip
def test_members_that_make_no_record(root, members, reason):
    path = tar_of(root / "data.tar", [("0.json", json.dumps(RECORDS[0]).encode()), *members])
    with pytest.raises(RecordError, match=reason):
        open_source(path)[1]


def test_tar_files_that_cannot_be_read(root):
    path = tar_of(root / "data.tar", [(f"{n}.json", json.dumps(each).encode()) for n, each in enumerate(RECORDS)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"number 4") + 3])
    with pytest.raises(ValueError, match=r"data\.tar: cut short in 4\.json"):
        open_source(path)
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"data\.tar: not a tar file, or cut short"):
        open_source(path)
    tar_of(path, [])
    with pytest.raises(ValueError, match="is empty"):
        open_source(path)


# Folders, patterns, and what is refused when it is opened


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "is a folder without data"),
        (["inner/a.tar"], "one of the folders in it: inner"),
        (["a.png", "b.jpg", "c.txt"], 'holds 2 images, and nothing that says .* such as {"image": "a.png", "question"'),
        (
            ["train.jsonl", "test.jsonl", "a.png"],
            r"name the file in it that holds the records: test\.jsonl, train\.jsonl",
        ),
        (
            ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
            r"2 kinds; .*test-\*\.parquet, .*train-\*",
        ),
        (["00000.tar", "00000.parquet"], r"files of 2 kinds; name one kind of them: .*\*\.parquet, .*\*\.tar"),
    ],
)
def test_folders_that_are_no_data(tmp_path, names, reason):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for opens in (open_source, questions.read):
        with pytest.raises(ValueError, match=reason):
            opens(tmp_path)
    description = [{"name": "g", "weight": 1, "datasets": [{"name": "d", "path": "."}]}]
    with pytest.raises(ValueError, match=f"mixture\\[0\\].datasets\\[0\\]: .*{reason}"):
        open_mixture(description, tmp_path, seed=0)


@pytest.mark.parametrize(
    "names",
    [
        ("0000.tar", "0001.tar"),
        ("train-00000-of-00002-a4f0.tar", "train-00001-of-00002-9bcd.tar"),
        ("a1.tar", "a12.tar"),
    ],
)
def test_names_of_shards(tmp_path, names):
    for name in names:
        tar_of(tmp_path / name, [("0.json", json.dumps(RECORDS[0]).encode())])
    (tmp_path / "output.tar").mkdir()
    assert len(open_source(tmp_path)) == 2


def test_shards_follow_each_other(tmp_path):
    source = open_source(folder_of_shards(tmp_path))
    assert isinstance(source, ShardedRecords)
    assert [source.where(n).rpartition("/")[2] for n in (1, 2)] == [
        "train-00000-of-00002.tar[1]", "train-00001-of-00002.tar[0]",
    ]  # fmt: skip
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="there are 5 records"):
            source[wrong]
    with pytest.raises(FileNotFoundError, match="no file matches this pattern"):
        open_source(tmp_path / "none-*.tar")
    (tmp_path / "one[1].jsonl").write_text(json.dumps(RECORDS[0]))
    assert len(open_source(tmp_path / "one[1].jsonl")) == 1, "a file goes before a pattern"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x1f\x8b\x08 rest", r"compressed \(gzip\); unpack it: gunzip"), (b"\x28\xb5\x2f\xfd rest", "unzstd"),
        (b"BZh9 rest", "bunzip2"), (b"\xfd7zXZ\0 rest", "unxz"), (b"PK\x03\x04 rest", "a ZIP archive"),
        (b"ARROW1\0\0", "an Arrow file"), ('{"a": 1}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        (b"image,question,answer\ncat.png,?,x\n", "none of its 2 records can be used; .*data:1: not JSON"),
        (b"\x89PNG\r\n\x1a\n rest", "none of its 2 records can be used"),
    ],
)  # fmt: skip
def test_other_files_are_refused_once(tmp_path, content, reason):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_source(tmp_path / "data")


def test_records_that_name_addresses_are_refused_once(root):
    """Before a run starts, and not each of a million records."""
    path = root / "data.jsonl"
    address = "https://example.org/a.png"
    records = [llava("<image>\n?", image=address), messages([{"type": "image_url", "image_url": {"url": address}}])]
    path.write_text("\n".join(json.dumps(record) for record in records * 50))
    with pytest.raises(ValueError, match=r"none of 8 records from all over it .*jsonl:1: the address https.*download"):
        open_source(path)
    path.write_text("\n".join(json.dumps(record) for record in [*records * 50, *RECORDS * 5]))
    assert len(open_source(path)) == 125, "where some can be used, the others are skipped one by one"


@pytest.mark.parametrize("shape", ["messages", "llava", "annotation", "frames", "caption", "prompt"])
@pytest.mark.parametrize(
    "name",
    ["../secret.png", "{outside}/secret.png", "file://{outside}/secret.png", "file://../secret.png", "link.png",
     "folder/secret.png", "file://{outside}/%73ecret.png", "images/../../secret.png", "secret.json"],
)  # fmt: skip
def test_no_record_reads_a_file_outside_of_its_root(root, shape, name):
    os.symlink(root.parent / "secret.png", root / "link.png")
    os.symlink(root.parent, root / "folder")
    os.symlink(root.parent / "secret.json", root / "secret.json")
    (root.parent / "secret.json").write_text('"aGVsbG8="')
    name = name.format(outside=root.parent)
    record = {
        "messages": messages([{"type": "image", "url": name}, {"type": "text", "text": "?"}]),
        "llava": llava("<image>\n?", image=name),
        "annotation": {"image": name, "question": "?", "answer": "x"},
        "frames": {"video": ["cat.png", name], "question": "?", "answer": "x"},
        "caption": {"image": name, "caption": "x"},
        "prompt": {"images": [{"bytes": None, "path": name}], "prompt": "?", "completion": "x"},
    }[shape]
    with pytest.raises(RecordError, match="leaves the root folder"):
        read(record, root)
    with pytest.raises(RecordError, match=r"needs a root folder"):
        read(record if shape != "frames" else {**record, "video": [name]}, None)


def test_questions_of_any_data(root):
    """``lynx evaluate`` reads what training reads."""
    records = [llava("<image>\nWhat?", image="cat.png", type="Thing"), llava("<image>\nWhat?", image="none.png")]
    (root / "data.json").write_text(json.dumps(records))
    [question], [skipped] = questions.read(root / "data.json")
    assert (question.text, question.truths, question.kind) == ("What?", ["A cat."], "Thing")
    assert skipped.startswith(f"{root}/data.json[1]: no such image")
    members = [("0.png", raw(root)), ("0.json", json.dumps(RECORDS[0]).encode()), ("1.png", b"x"), ("1.json", b"{}")]
    [question], [skipped] = questions.read(tar_of(root / "data.tar", members))
    assert question.text == "0?"
    assert f"{root}/data.tar[1]: " in skipped
