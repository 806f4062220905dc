"""Records from JSONL, what is wrong with bad ones, collation, and the digits that the demo learns from."""

import base64
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lynx.data import digits
from lynx.data.collator import Collator
from lynx.data.jsonl import JsonlRecords
from lynx.data.media_folder import MediaFolder
from lynx.data.mixture import Group, Mixture, Reference
from lynx.data.records import RecordError, text_of
from lynx.data.stream import PackDataset
from lynx.data.tokenizer import train_tokenizer
from lynx.media.videos import load_video
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import make_image


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(make_image(0)).save(root / name)
    Image.fromarray(make_image(1)).save(tmp_path / "secret.png")
    return root


def record(content="What?", answer="This."):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def image(path):
    return record([{"type": "image", "path": path}, {"type": "text", "text": "What?"}])


def write(root, *lines):
    path = root / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def messages(path, index):
    """Those of a record's only conversation."""
    [conversation] = JsonlRecords(path)[index].conversations
    return conversation


def test_good_records(root):
    video = record([{"type": "video", "path": ["a.png", "b.png"]}, {"type": "text", "text": "Same?"}])
    path = write(root, image("a.png"), {**video, "type": "same"}, record())
    assert messages(path, 0)[0]["content"][0] == {"type": "image", "image": str(root / "a.png")}
    assert messages(path, 1)[0]["content"][0]["video"] == [str(root / "a.png"), str(root / "b.png")]
    assert [text_of(messages(path, index)[0]) for index in range(3)] == ["What?", "Same?", "What?"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ("[]", "a record must be a JSON object, got list"),
        ({"question": "What?"}, "this one has no answer"),
        ({"messages": [{"role": "user", "content": "What?"}]}, "roles are"),
        ({"messages": []}, "roles are"),
        ({"messages": "What?"}, "messages must be a list, got str"),
        (record(3), "neither text nor a list"),
        (record([{"type": "audio"}]), "not a text, an image or a video"),
        (image(None), "places for images in its text: 1; images that it names: 0"),
        (image("c.png"), "no such image: "),
        (image("../secret.png"), "leaves the root folder"),
        (image("/etc/passwd"), "leaves the root folder"),
        (image("link.png"), "leaves the root folder"),
        (image("nul\0.png"), "cannot be followed"),
        (image("x" * 5000), "cannot be followed"),
        (image("loop.png"), "cannot be followed"),
        (image("\ud800.png"), "cannot be followed"),
        ("[" * 100_000, "not JSON"),
        (record([{"type": "text"}]), "not a text, an image or a video"),
        (record([{"type": "text", "text": 5}]), "not a text, an image or a video"),
    ],
)
def test_a_bad_line_says_what_is_wrong(root, bad, reason):
    os.symlink(root.parent / "secret.png", root / "link.png")
    os.symlink(root / "loop.png", root / "loop.png")
    records = JsonlRecords(write(root, image("a.png"), bad))
    assert records[0].conversations
    with pytest.raises(RecordError, match=reason):
        records[1]


def test_bytes_that_are_not_text(root):
    path = write(root, record())
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe\xff\n")
    with pytest.raises(RecordError, match="not JSON"):
        JsonlRecords(path)[1]


def test_another_root(root, tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    path.write_text(json.dumps(image("a.png")))
    with pytest.raises(RecordError, match="no such image"):
        JsonlRecords(path)[0]
    assert JsonlRecords(path, root)[0]


def test_paths_are_as_the_root_is_named(root, monkeypatch):
    """Relative where it is: what a run writes about its data is then still true when both have moved together."""
    (root / "inner").mkdir()
    os.symlink(root / "a.png", root / "inner" / "link.png")
    write(root, image("inner/link.png"), image("gone.png"), image("../secret.png"))
    monkeypatch.chdir(root.parent)
    assert messages("root/data.jsonl", 0)[0]["content"][0]["image"] == "root/a.png"
    for index, reason in ((1, "no such image: root/gone.png"), (2, "leaves the root folder root")):
        with pytest.raises(RecordError) as error:
            JsonlRecords("root/data.jsonl")[index]
        assert str(error.value).endswith(reason)
    monkeypatch.chdir(root)
    assert messages("data.jsonl", 0)[0]["content"][0]["image"] == "a.png"


def batch_of(path, processor, *indices, seed=0, augment=True):
    mixture = Mixture([Group("all", 1, {"data": JsonlRecords(path)})], seed=0)
    dataset = PackDataset(mixture, processor, seed=seed, augment=augment)
    return Collator(processor, 1000)([dataset[Reference(0, index, draw=0)] for index in indices])


def test_a_batch_leaves_out_what_cannot_be_used(root, processor):
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = write(root, image("a.png"), image("cut.png"), record("  "), record())
    batch, good = batch_of(path, processor, 0, 1, 2, 3), batch_of(path, processor, 0, 3)
    reasons = [entry.reason for entry in batch["report"].skipped]
    assert "cut.png" in reasons[0]
    assert "empty text" in reasons[1]
    assert batch["report"].samples == good["report"].samples == {"data": 2}
    assert torch.equal(batch["input_ids"], good["input_ids"])
    assert torch.equal(batch["pixel_values"], good["pixel_values"])


def test_the_seed_decides_the_crops(root, processor):
    path = write(root, image("a.png"))

    def pixels(seed):
        return batch_of(path, processor, 0, 0, seed=seed)["pixel_values"]

    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))


def test_frames_of_a_video_share_their_crop(root, processor):
    video = record([{"type": "video", "path": ["a.png", "a.png"]}, {"type": "text", "text": "What?"}])
    first, second = batch_of(write(root, video), processor, 0)["pixel_values"].chunk(2)
    assert torch.equal(first, second)


def test_video_files(root, processor):
    def video(path):
        return record([{"type": "video", "path": path}, {"type": "text", "text": "What?"}])

    clip = write_clip(root / "clip.mp4", [frame(i) for i in range(41)])
    (root / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
    (root.parent / "secret.mp4").write_bytes(clip.read_bytes())
    path = write(root, video("clip.mp4"), video("cut.mp4"), video("../secret.mp4"), video("none.mp4"), video(7))
    assert messages(path, 0)[0]["content"][0] == {"type": "video", "video": str(clip)}
    for index, reason in ((2, "leaves the root folder"), (3, "no such video"), (4, "is 7, expected text")):
        with pytest.raises(RecordError, match=reason):
            JsonlRecords(path)[index]
    with pytest.raises(RecordError, match=r"cut\.mp4: cut short"):
        MediaFolder(root, check=True).source("cut.mp4", is_video=True)
    batch = batch_of(path, processor, 0, 1)
    assert batch["frame_positions"].tolist() == [0, 1, 2, 3]
    assert "cut.mp4: cut short" in batch["report"].skipped[0].reason
    first, again, other, middles = (
        batch_of(path, processor, 0, seed=seed, augment=seed > 0)["pixel_values"] for seed in (1, 1, 2, 0)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    frames = load_video(clip, 4)
    assert torch.equal(middles, processor(text="What?", videos=[frames])["pixel_values"])


def test_images_in_base64(root, processor):
    def inline(text):
        return record([{"type": "image", "base64": text}, {"type": "text", "text": "What?"}])

    data = (root / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    path = write(root, inline(text), inline(url), inline("a.png"), inline(5), inline(text[:80]))
    assert [messages(path, index)[0]["content"][0]["image"] for index in (0, 1)] == [data, data]
    for index in (2, 3):
        with pytest.raises(RecordError, match="not valid base64"):
            JsonlRecords(path)[index]
    assert "image of 60 bytes" in batch_of(path, processor, 4)["report"].skipped[0].reason


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(["only these words"], vocab_size=300)
    for text in ("something ELSE", "çöğ 漢字 🙂", "tabs\tand\nlines", "3 + 47 = 50"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("1797", add_special_tokens=False)["input_ids"]) == 4


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    return digits.write(tmp_path_factory.mktemp("digits"), rows=400, test_rows=200)


def test_digits_are_true_and_held_out(digit_files):
    from sklearn.datasets import load_digits

    truth = load_digits()
    seen = []
    for path in digit_files:
        kinds = [json.loads(line)["type"] for line in path.read_text().splitlines()]
        assert set(kinds) == set(digits.PHRASINGS)
        shown = set()
        for index, kind in enumerate(kinds):
            question, answer = messages(path, index)
            media = [part for part in question["content"] if part["type"] != "text"]
            files = [file for part in media for file in part.get("video", [part.get("image")])]
            labels = [int(truth.target[int(os.path.basename(file)[:-4])]) for file in files]
            shown |= set(files)
            if kind in ("which digit", "last digit"):
                assert answer["content"] == str(labels[-1])
            if kind == "digits in order":
                assert answer["content"] == " ".join(map(str, labels))
            if kind == "how many frames":
                assert answer["content"] == str(len(labels))
            if kind == "odd or even":
                assert answer["content"] == ("odd" if labels[0] % 2 else "even")
            if kind == "digit as word":
                words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
                assert answer["content"] == words[labels[0]]
            text = question["content"][-1]["text"]
            numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]
            if kind == "larger than":
                assert answer["content"] == ("yes" if labels[0] > numbers[0] else "no")
            if kind == "addition":
                assert media == []
                assert answer["content"] == str(sum(numbers))
        seen.append(shown)
    assert not seen[0] & seen[1], "a held-out image is shown in training"


def test_digits_are_the_images_of_scikit_learn(digit_files):
    from sklearn.datasets import load_digits

    stored = np.asarray(Image.open(digit_files[0].parent / "images" / "0007.png"))
    assert (stored[..., 0] == (load_digits().images[7] * 255 / 16).round()).all()


def test_every_type_asks_about_every_held_out_image_once(tmp_path):
    _, test = digits.write(tmp_path, rows=8)
    shown = {}
    for line in test.read_text().splitlines():
        each = json.loads(line)
        files = [part["path"] for part in each["messages"][0]["content"] if part["type"] == "image"]
        shown.setdefault(each["type"], []).extend(files)
    assert len(shown["which digit"]) == len(set(shown["which digit"])) == 359
    assert set(shown["which digit"]) == set(shown["odd or even"])


def test_digits_follow_their_seed(digit_files, tmp_path):
    again, _ = digits.write(tmp_path / "again", rows=400, test_rows=200)
    other, _ = digits.write(tmp_path / "other", rows=400, test_rows=200, seed=1)
    assert again.read_text() == digit_files[0].read_text() != other.read_text()
