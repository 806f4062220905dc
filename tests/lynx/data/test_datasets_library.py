"""Data sets that the ``datasets`` library saved, where it is installed; the other tests have a stand-in for it."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lynx.data.columns import ColumnRecords
from lynx.train import recipe, run
from tests.lynx.small import COLOURS

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Twelve rows of images, one in four without, with labels; as many of two-frame videos; as many of text."""
    folder = tmp_path_factory.mktemp("saved")
    names = list(COLOURS)
    images = [Image.new("RGB", (9 + n, 14), COLOURS[names[n % 3]]) for n in range(12)]
    features = {
        "photo": datasets.Image(),
        "query": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
    }
    rows = {
        "photo": [each if n % 4 else None for n, each in enumerate(images)],
        "query": ["Which colour?"] * 12,
        "label": [n % 3 for n in range(12)],
    }
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(folder / "images")
    features = {"video": datasets.Sequence(datasets.Image()), "answer": datasets.Value("string")}
    rows = {"video": [[each, each] for each in images], "answer": [names[n % 3] for n in range(12)]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(folder / "videos")
    dialog = [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red"}]
    datasets.Dataset.from_list([{"messages": dialog}] * 12).save_to_disk(folder / "texts")
    return folder


COLUMNS = {"image": "photo", "question": "query", "answer": "label"}


def test_images_stay_encoded(saved):
    [[question, answer]] = ColumnRecords.from_disk(saved / "images", columns=COLUMNS)[1].conversations
    assert question["content"][0]["image"].startswith(b"\x89PNG")
    assert answer["choices"] == ["green"]
    [[question, _]] = ColumnRecords.from_disk(saved / "videos")[1].conversations
    assert all(frame.startswith(b"\x89PNG") for frame in question["content"][0]["video"])


def test_the_fingerprint_is_of_the_rows(saved, tmp_path):
    videos = datasets.load_from_disk(saved / "videos")

    def fingerprint(rows):
        return ColumnRecords(rows).fingerprint

    videos.save_to_disk(tmp_path / "moved")
    assert fingerprint(videos) == ColumnRecords.from_disk(tmp_path / "moved").fingerprint
    other = videos.select([*range(11), 10])
    assert len(other) == len(videos)
    assert fingerprint(other) != fingerprint(videos) != fingerprint(videos.rename_column("answer", "question"))


def test_training_on_them(saved, tmp_path):
    named = [("images", {"columns": COLUMNS}), ("videos", {"task": "video caption"}), ("texts", {})]
    described = [{"name": name, "path": str(saved / name), **options} for name, options in named]
    data = [{"name": "all", "weight": 1, "datasets": described}]
    models = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        changes = {"data": data, "output": str(output), "steps": 3, "token_budget": 200, "workers": workers}
        run.run(recipe.load("tiny", changes))
        assert not (output / "skipped.jsonl").exists()
        models.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
