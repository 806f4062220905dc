"""Records from JSONL, their refusals, collation, and the digits that the demo learns from."""

import base64
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lynx.data import digits
from lynx.data.collator import Collator
from lynx.data.jsonl import JsonlDataset, JsonlRecords
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


def test_good_records(root):
    video = record([{"type": "video", "path": ["a.png", "b.png"]}, {"type": "text", "text": "Same?"}])
    dataset = JsonlDataset(write(root, image("a.png"), "", {**video, "type": "same"}, record()))
    assert len(dataset) == 3
    assert dataset.skipped == []
    assert dataset[0]["messages"][0]["content"][0] == {"type": "image", "image": str(root / "a.png")}
    assert dataset[1]["messages"][0]["content"][0]["video"] == [str(root / "a.png"), str(root / "b.png")]
    assert dataset[1]["type"] == "same"
    assert [text_of(each["messages"][0]) for each in dataset.records] == ["What?", "Same?", "What?"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ("[]", "no list of messages"),
        ({"question": "What?"}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "What?"}]}, "roles are"),
        ({"messages": []}, "roles are"),
        (record(3), "neither text nor a list"),
        (record([{"type": "audio"}]), "no text, image or video"),
        (image(None), "path is missing"),
        (image("c.png"), "no such picture"),
        (image("../secret.png"), "leaves the root folder"),
        (image("/etc/passwd"), "leaves the root folder"),
        (image("link.png"), "leaves the root folder"),
        (image("nul\0.png"), "cannot be followed"),
        (image("x" * 5000), "cannot be followed"),
        (image("loop.png"), "cannot be followed"),
        (image("\ud800.png"), "cannot be followed"),
        ("[" * 100_000, "not JSON"),
        (record([{"type": "text"}]), "no text, image or video"),
        (record([{"type": "text", "text": 5}]), "no text, image or video"),
    ],
)
def test_a_bad_record_is_skipped_counted_and_logged(root, caplog, bad, reason):
    os.symlink(root.parent / "secret.png", root / "link.png")
    os.symlink(root / "loop.png", root / "loop.png")
    dataset = JsonlDataset(write(root, image("a.png"), bad))
    assert len(dataset) == 1
    [(line, why)] = dataset.skipped
    assert line == 2
    assert reason in why
    assert reason in caplog.text
    assert "1 of 2 records skipped" in caplog.text


def test_bytes_that_are_no_text_are_skipped(root):
    path = write(root, record())
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe\xff\n")
    assert [line for line, _ in JsonlDataset(path).skipped] == [2]


def test_a_file_without_usable_records_is_an_error(root):
    with pytest.raises(RecordError, match=r"no usable record \(1 skipped\)"):
        JsonlDataset(write(root, "nonsense"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        JsonlDataset(root / "nothing.jsonl")


def test_another_root(root, tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    path.write_text(json.dumps(image("a.png")))
    with pytest.raises(RecordError):
        JsonlDataset(path)
    assert len(JsonlDataset(path, root)) == 1


def batch_of(path, processor, *indices, seed=0, augment=True):
    mixture = Mixture([Group("all", 1, {"data": JsonlRecords(path)})], seed=0)
    dataset = PackDataset(mixture, processor, seed=seed, augment=augment)
    return Collator(processor, 1000)([dataset[Reference(0, index, draw=0)] for index in indices])


def test_a_batch_leaves_out_what_cannot_be_used(root, processor):
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = write(root, image("a.png"), image("cut.png"), record("  "), record())
    assert [line for line, _ in JsonlDataset(path).skipped] == [2]
    batch, good = batch_of(path, processor, 0, 1, 2, 3), batch_of(path, processor, 0, 3)
    reasons = [entry.reason for entry in batch["report"].broken]
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
    dataset = JsonlDataset(path)
    assert dataset[0]["messages"][0]["content"][0] == {"type": "video", "video": str(clip)}
    reasons = ("cut.mp4: cut short", "leaves the root folder", "no such video", "path is missing")
    for number, ((line, why), reason) in enumerate(zip(dataset.skipped, reasons, strict=True), start=2):
        assert line == number
        assert reason in why
    assert len(JsonlDataset(path, check_pictures=False)) == 2
    batch = batch_of(path, processor, 0, 1)
    assert batch["frame_positions"].tolist() == [0, 1, 2, 3]
    assert "cut.mp4: cut short" in batch["report"].broken[0].reason
    first, again, other, middles = (
        batch_of(path, processor, 0, seed=seed, augment=seed > 0)["pixel_values"] for seed in (1, 1, 2, 0)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    frames = load_video(clip, 4)
    assert torch.equal(middles, processor(text="What?", videos=[frames])["pixel_values"])


def test_pictures_in_base64(root):
    def inline(text):
        return record([{"type": "image", "base64": text}, {"type": "text", "text": "What?"}])

    data = (root / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    path = write(root, inline(text), inline(url), inline("a.png"), inline(5), inline(text[:80]))
    dataset = JsonlDataset(path)
    assert [each["messages"][0]["content"][0]["image"] for each in dataset.records] == [data, data]
    assert [line for line, _ in dataset.skipped] == [3, 4, 5]
    assert "base64 is none" in dataset.skipped[0][1]
    assert "image of 60 bytes" in dataset.skipped[2][1]


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
        dataset = JsonlDataset(path)
        assert dataset.skipped == []
        assert {each["type"] for each in dataset.records} == set(digits.PHRASINGS)
        shown = set()
        for each in dataset.records:
            question, answer = each["messages"]
            media = [part for part in question["content"] if part["type"] != "text"]
            files = [file for part in media for file in part.get("video", [part.get("image")])]
            labels = [int(truth.target[int(os.path.basename(file)[:-4])]) for file in files]
            shown |= set(files)
            if each["type"] in ("which digit", "last digit"):
                assert answer["content"] == str(labels[-1])
            if each["type"] == "digits in order":
                assert answer["content"] == " ".join(map(str, labels))
            if each["type"] == "how many frames":
                assert answer["content"] == str(len(labels))
            if each["type"] == "odd or even":
                assert answer["content"] == ("odd" if labels[0] % 2 else "even")
            if each["type"] == "digit as word":
                words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
                assert answer["content"] == words[labels[0]]
            text = question["content"][-1]["text"]
            numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]
            if each["type"] == "larger than":
                assert answer["content"] == ("yes" if labels[0] > numbers[0] else "no")
            if each["type"] == "addition":
                assert media == []
                assert answer["content"] == str(sum(numbers))
        seen.append(shown)
    assert not seen[0] & seen[1], "a held-out picture is shown in training"


def test_digits_are_the_pictures_of_scikit_learn(digit_files):
    from sklearn.datasets import load_digits

    stored = np.asarray(Image.open(digit_files[0].parent / "pictures" / "0007.png"))
    assert (stored[..., 0] == (load_digits().images[7] * 255 / 16).round()).all()


def test_every_type_asks_about_every_held_out_picture_once(tmp_path):
    _, test = digits.write(tmp_path, rows=8)
    shown = {}
    for each in JsonlDataset(test).records:
        files = [part["image"] for part in each["messages"][0]["content"] if part["type"] == "image"]
        shown.setdefault(each["type"], []).extend(files)
    assert len(shown["which digit"]) == len(set(shown["which digit"])) == 359
    assert set(shown["which digit"]) == set(shown["odd or even"])


def test_digits_follow_their_seed(digit_files, tmp_path):
    again, _ = digits.write(tmp_path / "again", rows=400, test_rows=200)
    other, _ = digits.write(tmp_path / "other", rows=400, test_rows=200, seed=1)
    assert again.read_text() == digit_files[0].read_text() != other.read_text()
