"""Records in every format, from files, prompts around them, and mixtures described in a recipe."""

import base64
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from lynx.data.description import open_mixture
from lynx.data.jsonl import JsonlRecords
from lynx.data.media_folder import MediaFolder
from lynx.data.mixture import paper_groups, shares
from lynx.data.prompts import Prompts
from lynx.data.records import Record, RecordError
from lynx.data.shapes import parse
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import make_image

NO_PROMPTS = Prompts({})
QUESTION = {"role": "user", "content": "Odd?"}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for n, name in enumerate(("a.png", "b.png")):
        Image.fromarray(make_image(n)).save(root / name)
    Image.fromarray(make_image(2)).save(tmp_path / "secret.png")
    write_clip(root / "clip.mp4", [frame(n) for n in range(9)])
    return root


def data(path):
    return base64.b64encode(path.read_bytes()).decode()


def phrased(record, folder, seed=0, prompts=NO_PROMPTS, **options):
    parsed = record if isinstance(record, Record) else parse(record, MediaFolder(folder), **options)
    return prompts.phrase(parsed, np.random.default_rng(seed))


def test_annotations(root):
    image = {"type": "image", "image": str(root / "a.png")}
    [messages] = phrased({"image": "a.png", "question": "What?", "answer": ["this"], "index": 4}, root)
    assert messages == [
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "this"},
    ]
    [messages] = phrased({"video": "clip.mp4", "question": "Who?", "answer": "me"}, root)
    assert messages[0]["content"][0] == {"type": "video", "video": str(root / "clip.mp4")}
    [messages] = phrased({"question": "2?", "answer": "two", "image": None}, root)
    assert messages == [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"}]
    pairs = [{"question": "Odd?", "answer": "yes"}, {"question": "Even?", "answer": "no"}]
    first, second = phrased({"image": "a.png", "questions": pairs}, root)
    assert first[0]["content"] == [image, {"type": "text", "text": "Odd?"}]
    assert second == [{"role": "user", "content": "Even?"}, {"role": "assistant", "content": "no"}]


def test_annotations_with_images_in_base64(root):
    first, second = data(root / "a.png"), data(root / "b.png")
    raw = [(root / name).read_bytes() for name in ("a.png", "b.png")]
    (root / "one.json").write_text(json.dumps(first))
    (root / "frames.json").write_text(json.dumps([first, second]))

    def media(record):
        return phrased({**record, "question": "?", "answer": "x"}, root)[0][0]["content"][0]

    assert media({"image": first}) == media({"image": "one.json"}) == {"type": "image", "image": raw[0]}
    assert media({"image": f"data:image/png;base64,{first}"})["image"] == raw[0]
    for record in ({"video": [first, second]}, {"video": "frames.json"}, {"image": "frames.json"}):
        assert media(record) == {"type": "video", "video": raw}
    assert media({"video": ["a.png", second]})["video"] == [str(root / "a.png"), raw[1]]
    (root / "abcd").write_bytes(raw[0])
    assert media({"image": "abcd"})["image"] == str(root / "abcd"), "a file goes before what might be base64"


def test_messages_and_branches(root):
    part = {"type": "image", "path": "a.png"}
    shown = {"type": "image", "image": str(root / "a.png")}
    branches = [[QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER]]
    found = phrased({"media": [part], "branches": branches}, root)
    assert found[0][0]["content"] == [shown, {"type": "text", "text": "Odd?"}]
    assert found[1] == branches[1]
    own = [{"role": "user", "content": [{"type": "text", "text": "Odd?"}, part]}, ANSWER]
    [messages] = phrased({"messages": own}, root)
    assert messages[0]["content"] == [{"type": "text", "text": "Odd?"}, shown]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"question": "?"}, "no answer"),
        ({"question": 5, "answer": "x"}, "question is 5"),
        ({"question": "?", "answer": []}, "answer is"),
        ({"question": "?", "answer": [" "]}, "answer is"),
        ({"question": "?", "answer": 7}, "answer is"),
        ({"questions": []}, "questions is not a list"),
        ({"questions": ["?"]}, "questions is not a list"),
        ({"questions": [{"question": "?"}]}, "no answer"),
        ({"branches": []}, "branches is not a list"),
        ({"branches": [[QUESTION]]}, "roles are"),
        ({"branches": [[QUESTION, ANSWER]], "media": "a.png"}, "list of parts"),
        ({"messages": 5}, "messages must be a list, got int"),
        ({"image": "../secret.png", "answer": "x"}, "leaves the root folder"),
        ({"image": "link.png", "answer": "x"}, "leaves the root folder"),
        ({"video": ["../secret.png"], "answer": "x"}, "leaves the root folder"),
        ({"video": "../secret.png", "answer": "x"}, "leaves the root folder"),
        ({"image": "../secret.json", "answer": "x"}, "leaves the root folder"),
        ({"image": "/etc/passwd", "answer": "x"}, "leaves the root folder"),
        ({"image": {"path": "../secret.png", "bytes": None}, "answer": "x"}, "leaves the root folder"),
        ({"image": "http://example.org/a.png", "answer": "x"}, "is never fetched"),
        ({"image": "none.png", "answer": "x"}, "no such image"),
        ({"image": 5, "answer": "x"}, "is 5, expected text"),
        ({"media": [{"type": "image", "base64": None}], "branches": [[QUESTION, ANSWER]]}, "a part that names none"),
        ({"image": "torn.json", "answer": "x"}, "not JSON"),
        ({"question": "?", "answer": "x", "task": 3}, "task is 3"),
        ({"question": "?", "answer": "x", "task": "chess"}, "no prompts for task 'chess'"),
    ],
)
def test_bad_records(root, bad, reason):
    os.symlink(root.parent / "secret.png", root / "link.png")
    (root.parent / "secret.json").write_text('"text"')
    (root / "torn.json").write_text("[")
    with pytest.raises(RecordError, match=reason):
        phrased(bad, root)


def test_without_a_root_no_path_is_read(root):
    record = {"image": str(root / "a.png"), "question": "?", "answer": "x"}
    with pytest.raises(RecordError, match="needs a root folder"):
        phrased(record, None)
    raw = (root / "a.png").read_bytes()
    assert phrased({**record, "image": raw}, None)[0][0]["content"][0]["image"] == raw


def test_lines_are_read_one_by_one(root, monkeypatch):
    monkeypatch.setattr("lynx.data.jsonl._CHUNK", 7)  # lines cross chunks
    lines = [json.dumps({"question": f"{n}?", "answer": "ä" * n + "x"}) for n in range(30)]
    seen: set[str] = set()
    for end in ("", "\n"):
        (root / "a.jsonl").write_text("\n".join(lines) + end)
        records = JsonlRecords(root / "a.jsonl")
        assert len(records) == 30
        seen.add(records.fingerprint)
        assert [records[n].conversations[0][0]["content"] for n in (29, 0, 7)] == ["29?", "0?", "7?"]
    assert pickle.loads(pickle.dumps(records))._file is None, "another process opens the file for itself"
    assert pickle.loads(pickle.dumps(records))[7] == records[7]
    assert records.where(29) == f"{root}/a.jsonl:30"
    with pytest.raises(IndexError, match="30 records, so the last number is 29, not 30"):
        records[30]
    with pytest.raises(IndexError):
        records[-1]
    (root / "b.jsonl").write_bytes((root / "a.jsonl").read_bytes())
    assert JsonlRecords(root / "b.jsonl").fingerprint == records.fingerprint, "wherever it lies"
    (root / "b.jsonl").write_text("\n".join([lines[0].replace("0", "1"), *lines[1:]]) + "\n")
    assert len(seen | {JsonlRecords(root / "b.jsonl").fingerprint}) == 3


def test_bad_lines_are_told_when_read(root):
    (root / "a.jsonl").write_bytes(b'{"question": "?", "answer": "x"}\n\n{no\n\xff\xfe\n[]\n')
    records = JsonlRecords(root / "a.jsonl", task="vqa")
    assert len(records) == 4, "a blank line is none"
    assert records[0].task == "vqa"
    for n in range(1, 4):
        with pytest.raises(RecordError):
            records[n]
    (root / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        JsonlRecords(root / "b.jsonl")
    with pytest.raises(FileNotFoundError):
        JsonlRecords(root / "c.jsonl")


PROMPTS = Prompts({"vqa": ["Look. {question} Short.", "{question}"], "caption": ["Describe {it}.", "What is it?"]})


def put(record, task, seeds=20):
    records = Record(record, task)
    return [PROMPTS.phrase(records, np.random.default_rng(seed)) for seed in range(seeds)]


def test_prompts_are_drawn_for_each_sample():
    texts = {messages[0]["content"][-1]["text"] for [messages] in put([[QUESTION, ANSWER]], "vqa")}
    assert texts == {"Look. Odd? Short.", "Odd?"}
    silent = {"role": "user", "content": [{"type": "image", "image": "x"}]}
    for [messages] in put([[silent, ANSWER, QUESTION, ANSWER]], "caption"):
        assert messages[0]["content"][0] == {"type": "image", "image": "x"}
        assert messages[0]["content"][1]["text"] in ("Describe {it}.", "What is it?")
        assert messages[2] == QUESTION, "only a first turn that asks nothing is asked by the prompt"
    dialogs = put([[QUESTION, ANSWER, QUESTION, ANSWER], [QUESTION, ANSWER]], "vqa")
    assert all(first[0] == first[2] for first, _ in dialogs), "one prompt a conversation"
    assert any(first[0] != second[0] for first, second in dialogs), "one for each conversation"


def test_media_stay_between_words():
    content = [{"type": "text", "text": "is "}, {"type": "image", "image": "x"}, {"type": "text", "text": " odd? "}]
    messages = [{"role": "user", "content": content}, ANSWER]
    prompts = Prompts({"t": ["Well, {question} Tell."]})
    [[question, _]] = prompts.phrase(Record([messages], "t"), np.random.default_rng(0))
    assert [part.get("text") for part in question["content"]] == ["Well, is ", None, " odd? Tell."]
    assert content[0]["text"] == "is ", "the record stays as it is"


def test_answers_are_drawn():
    answers = {"role": "assistant", "choices": ["a", "b"]}
    drawn = [messages[1]["content"] for [messages] in put([[QUESTION, answers]], None, 40)]
    assert 8 < drawn.count("a") < 32


def test_prompts_that_do_not_fit():
    silent = {"role": "user", "content": " "}
    with pytest.raises(RecordError, match=r"'caption' has no prompt with \{question\}"):
        put([[QUESTION, ANSWER]], "caption")
    with pytest.raises(RecordError, match="'vqa' has no prompt for a record without a question"):
        put([[silent, ANSWER]], "vqa")
    assert put([[silent, ANSWER]], None, 1) == [[[silent, ANSWER]]], "for the processor to refuse"


def test_prompt_files(tmp_path):
    (tmp_path / "p.yaml").write_text('vqa:\n  - "{question} Short."\n')
    (tmp_path / "p.json").write_text('{"vqa": ["{question} Short."]}')
    assert Prompts.read(tmp_path / "p.yaml").tasks == Prompts.read(tmp_path / "p.json").tasks
    for text, message in (
        ("vqa: [", r"bad\.yaml"),
        ("vqa: hello", "expected a list"),
        ("vqa: []", "expected a list"),
        ("vqa: [3]", "is not text"),
        ('vqa: ["  "]', "or is empty"),
        ('vqa: ["{question} {question}"]', "more than once"),
        ("- a", "prompts must be a mapping"),
        ("vqa: !!python/object/apply:os.getcwd []", r"bad\.yaml"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Prompts.read(tmp_path / "bad.yaml")


def test_the_prompts_that_come_along():
    tasks = Prompts.default().tasks
    assert len(tasks) >= 20
    for task, prompts in tasks.items():
        assert len(set(prompts)) == len(prompts)
        if task not in ("dialog", "instruction"):  # whose own words stand
            assert len(prompts) >= 3, task
            assert len({"{question}" in prompt for prompt in prompts}) == 1, f"{task}: asks itself, or puts questions"
    assert "Please answer yes or no." in tasks["yes or no"][0]
    assert "Answer with a place name." in tasks["place"][0]


def line(path, n=1):
    path.write_text('{"question": "?", "answer": "x"}\n' * n)


def test_a_described_mixture(root):
    (root / "more").mkdir()
    line(root / "a.jsonl", 3)
    line(root / "more" / "b.jsonl", 1)
    description = [
        {"name": "x", "weight": 3, "datasets": [
            {"name": "a", "path": "a.jsonl", "task": "vqa"}, {"name": "b", "path": "more/b.jsonl", "root": "."},
        ]},
        {"name": "y", "weight": 1, "datasets": [{"name": "c", "path": "more/b.jsonl"}]},
    ]  # fmt: skip
    mixture = open_mixture(description, root, seed=4)
    assert mixture.shares == pytest.approx({"a": 9 / 16, "b": 3 / 16, "c": 1 / 4})
    assert mixture.seed == 4
    assert mixture.datasets[0].task == "vqa"


def test_the_papers_mixture_with_own_files(root):
    line(root / "a.jsonl")
    groups = paper_groups("finetuning")
    names = [name for group in groups for name in group.datasets]
    files = [{"name": name, "path": "a.jsonl"} for name in names]
    mixture = open_mixture({"paper": "finetuning", "datasets": files}, root, seed=0)
    by_group = {group.name: sum(mixture.shares[name] for name in group.datasets) for group in groups}
    expected = {group.name: sum(shares(groups)[name] for name in group.datasets) for group in groups}
    assert by_group == pytest.approx(expected)
    some = {"paper": "finetuning", "datasets": files[4:6], "partial": True}
    assert [group.name for group in open_mixture(some, root, seed=0).groups] == ["questions"]
    with pytest.raises(ValueError, match=r"lacks .*'Baize'"):
        open_mixture({**some, "partial": False}, root, seed=0)


def test_dialogs_that_fork(root):
    folder, say = MediaFolder(root), lambda role, text: {"role": role, "content": text}
    ask = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Odd?"}]}
    deeper = {"messages": [say("assistant", "no")], "branches": [[say("user", "Sure?"), say("assistant", "yes")]]}
    record = parse({"messages": [ask], "branches": [[ANSWER], deeper]}, folder)
    assert record.parents == (-1, 0, 0, 2)
    assert [[message["role"] for message in each] for each in record.conversations] == [
        ["user"], ["assistant"], ["assistant"], ["user", "assistant"],
    ]  # fmt: skip
    assert record.conversations[0][0]["content"][0]["type"] == "image"
    llava = {"conversations": [{"from": "human", "value": "Odd?"}], "branches": [[{"from": "gpt", "value": "yes"}]]}
    assert parse(llava, folder).parents == (-1, 0)
    about = {"media": [{"type": "image", "path": "a.png"}], "branches": [[QUESTION, ANSWER], deeper_of(QUESTION)]}
    assert parse(about, folder).parents == (-1, -1, 1)


def deeper_of(question):
    return {"messages": [question], "branches": [[ANSWER]]}


def test_a_prompt_opens_a_dialog_and_leaves_what_continues_it(root):
    record = parse({**deeper_of(QUESTION), "branches": [[ANSWER, QUESTION, ANSWER]]}, MediaFolder(root), task="vqa")
    first, second = Prompts({"vqa": ["Say: {question}"]}).phrase(record, np.random.default_rng(0))
    assert first[0]["content"][0]["text"] == "Say: Odd?"
    assert second[1] == QUESTION


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [QUESTION], "branches": []}, "branches is not a list of conversations, or is empty"),
        ({"messages": [QUESTION], "branches": [[QUESTION, ANSWER]]}, "expected assistant and user in turn"),
        ({"messages": [QUESTION, ANSWER], "branches": [[QUESTION]]}, "ending with assistant"),
        ({"messages": [QUESTION], "branches": [{"branch": []}]}, "a branch needs messages; one has"),
        ({"branches": [{"messages": [QUESTION, ANSWER], "branches": "x"}]}, "branches is not a list"),
    ],
)
def test_dialogs_that_cannot_fork_so(root, record, message):
    with pytest.raises(RecordError, match=message):
        parse(record, MediaFolder(root))


def test_branches_nest_only_so_deep(root):
    record = deeper_of(QUESTION)
    for _ in range(500):
        record = {"messages": [QUESTION, ANSWER], "branches": [record]}
    with pytest.raises(RecordError, match="branches nest more than 100 levels deep"):
        parse(record, MediaFolder(root))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("groups", "mixture must be a list of groups .*, got str"),
        ([5], r"mixture\[0\] is 5"),
        ([{"name": "x", "weight": 1}], r"mixture\[0\] lacks \['datasets'\]"),
        ([{"name": "x", "weight": "1", "datasets": []}], r"mixture\[0\].weight is '1'"),
        ([{"name": "x", "weight": 1, "datasets": []}], "no data sets"),
        ([{"name": "x", "weight": 1, "datasets": "a"}], r"mixture\[0\].datasets is 'a'"),
        ([{"name": "x", "weight": 1, "datasets": [{"name": "a"}]}], r"datasets\[0\] lacks \['path'\]"),
        (
            [{"name": "x", "weight": 1, "datasets": [{"name": "a", "path": "a.jsonl", "url": 1}]}],
            r"unknown keys \['url'\]",
        ),
        ([{"name": "x", "weight": 1, "datasets": [{"name": "a", "path": "a.jsonl"}] * 2}], "has the name .a. already"),
        ([{"name": "x", "weight": 1, "datasets": [{"name": "a", "path": "a.jsonl", "columns": {}}]}], "columns are"),
        ({"paper": "finetuning"}, r"lacks \['datasets'\]"),
        ({"paper": "testing", "datasets": []}, "no phase 'testing'"),
        ({"paper": "finetuning", "datasets": [], "partial": True, "more": [5]}, r"mixture.more\[0\] is 5"),
        ({"paper": "finetuning", "datasets": [{"name": "a", "path": "a.jsonl"}]}, r"has no \['a'\]"),
    ],
)
def test_bad_descriptions(root, description, message):
    line(root / "a.jsonl")
    with pytest.raises(ValueError, match=message):
        open_mixture(description, root, seed=0)
