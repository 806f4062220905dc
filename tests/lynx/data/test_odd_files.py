"""What is no file, such as a pipe, or is far too long, is refused at once: nothing waits for it or reads it whole."""

import json
import os
import signal
import socket

import pytest

from lynx.data import json_list, media_folder, records
from lynx.data.json_list import JsonListRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.parquet import ParquetRows
from lynx.data.prompts import Prompts
from lynx.data.source import open_source
from lynx.data.tar import TarRecords
from lynx.eval import questions
from lynx.media.images import ImageError, load_image
from lynx.media.videos import VideoError, load_video
from lynx.train import build, recipe

KINDS = {"pipe": "a pipe", "device": "a device", "folder": "a folder", "socket": "a socket"}
LINE = {"question": "Odd?", "answer": "yes"}


@pytest.fixture(autouse=True)
def at_once():
    """An alarm, as a test that waits for a pipe waits for ever."""

    def late(*_):
        raise AssertionError("it was not refused at once")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=KINDS)
def odd(request, tmp_path, monkeypatch):
    """A path that is no regular file, and what it is in words."""
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "odd"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("odd")
    return path, KINDS[request.param]


@pytest.mark.parametrize(
    "reads", [JsonlRecords, JsonListRecords, TarRecords, ParquetRows, Prompts.read, questions.read]
)
def test_files_of_data(odd, reads):
    path, kind = odd
    is_data = reads is questions.read and kind == "a folder"
    with pytest.raises(
        ValueError, match=f"odd is {kind}, not a file; copy" if not is_data else "odd is a folder without"
    ):
        reads(path)


def test_sources(odd):
    path, kind = odd
    with pytest.raises(
        ValueError, match="odd is a folder without data" if kind == "a folder" else f"odd is {kind}, not a file"
    ):
        open_source(path)


@pytest.mark.parametrize("key", ["data", "datasets"])
def test_recipes(odd, key):
    path, kind = odd
    stage = {"name": "train", "trainable": ["adapters"], "steps": 1, "learning_rate": 0.1}
    made = recipe.load({"model": "tiny", "output": "out", "stages": [stage], "data": {"paper": "all"}, key: str(path)})
    with pytest.raises(ValueError, match=f"stage train: data: .*odd is {kind}"):
        build.mixture(made, made.stages[0])


def test_recipe_files(odd):
    path, _ = odd
    with pytest.raises(FileNotFoundError, match="odd"):
        recipe.load(path)


def test_images_and_videos(odd):
    path, kind = odd
    is_folder = kind == "a folder"  # of which the system says it
    with pytest.raises(ImageError, match="Is a directory" if is_folder else f"odd: .* it is {kind}, not an image file"):
        load_image(path)
    with pytest.raises(VideoError, match="Is a directory" if is_folder else f"odd: .* it is {kind}, not a video file"):
        load_video(path, 1)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.usefixtures("odd")
def test_media_of_records(tmp_path, kind):
    (tmp_path / "data.jsonl").write_text(json.dumps({kind: "odd", **LINE}))
    with pytest.raises(records.RecordError, match=r"odd|leaves the root folder"):
        JsonlRecords(tmp_path / "data.jsonl")[0]


def test_a_record_far_too_long(tmp_path, monkeypatch):
    """It is skipped by its length, and the others are read."""
    monkeypatch.setattr(records, "MAX_RECORD", 100)
    monkeypatch.setattr(json_list, "MAX_RECORD", 100)
    good, long = json.dumps(LINE), json.dumps({**LINE, "more": "x" * 1000})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good}\n{long}\n{good}\n")
    source = JsonlRecords(path)
    with pytest.raises(records.RecordError, match=f"the record has {len(long) + 1} bytes, more than 100"):
        source[1]
    assert source[0] == source[2]
    found, skipped = questions.read(path)
    assert [each.text for each in found] == ["Odd?"] * 2
    assert skipped == [
        f"{path}:2: the record has {len(long) + 1} bytes, more than 100, the most that is read as one record"
    ]


def test_a_json_file_of_frames_far_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(media_folder, "_MAX_STORED", 1000)
    (tmp_path / "frames.json").write_text(json.dumps(["x" * 2000]))
    (tmp_path / "data.jsonl").write_text(json.dumps({"video": "frames.json", **LINE}))
    with pytest.raises(records.RecordError, match="2004 bytes, more than 1000"):
        JsonlRecords(tmp_path / "data.jsonl")[0]
