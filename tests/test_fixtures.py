"""What earlier code wrote still loads, resumes and reports: model folders, a stopped run, exported programs, CSV rows.

tests/fixtures/README.md says how each was made. Nothing there changes when the code does.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lynx_kernels
from benchmarks import report
from benchmarks.rows import newest, read
from lynx import checkpoint
from lynx.generation.answers import generate_answers
from lynx.train import recipe, run
from lynx.train.log import read_log
from lynx_kernels import PackedLayout, SpanLayout

FIXTURES = Path(__file__).parent / "fixtures"

# The recipe of run-stopped, in today's names. Its folder keeps the names of its time in output/recipe.yaml.
RECIPE = {
    "model": "model-prefix",
    "output": "run-stopped/output",
    "precision": "fp32",
    "seed": 5,
    "token_budget": 140,
    "save_every": 2,
    "save_total_limit": 1,
    "log_every": 1,
    "data": [
        {
            "name": "pictures",
            "weight": 3,
            "datasets": [
                {"name": "colours", "path": "run-stopped/data/colours.jsonl", "task": "vqa"},
                {"name": "clips", "path": "run-stopped/data/clips.jsonl"},
            ],
        },
        {"name": "text", "weight": 1, "datasets": [{"name": "words", "path": "run-stopped/data/words.jsonl"}]},
    ],
    "stages": [
        {
            "name": "first",
            "trainable": ["resampler", "adapters", "frame_positions"],
            "steps": 3,
            "learning_rate": 1e-2,
            "warmup": 0.4,
            "max_grad_norm": 0.0,
        },
        {
            "name": "second",
            "trainable": ["adapters", "frame_positions"],
            "steps": 7,
            "learning_rate": 3e-2,
            "warmup_from": 1e-3,
            "warmup": 0.3,
            "schedule": "cosine",
            "tokens_per_step": 280,
            "betas": [0.9, 0.95],
        },
    ],
}


def image(seed, height, width):
    """A pattern that needs no random generator, whose stream might change."""
    row, column, channel = np.ogrid[:height, :width, :3]
    return ((row * (31 + seed) + column * (17 + seed) + channel * 71 + row * column) % 256).astype(np.uint8)


def conversation(question, answer=None, *media):
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


ONE_IMAGE = {"type": "image", "image": image(1, 8, 8)}  # of the tower's size: nothing is resized
CLIP = {"type": "video", "video": [image(2, 10, 14), image(3, 10, 14)]}


@pytest.mark.parametrize("name", ["model-prefix", "model-cross-attention"])
def test_a_model_folder_still_says_the_same(name):
    """Its processor makes the same batch, its weights the same logits, loss and greedy answers, in fp32."""
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    model, processor = checkpoint.load(FIXTURES / name, dtype=torch.float32)
    conversations = [
        conversation("Which digit is this?", "seven", ONE_IMAGE),
        conversation("Odd or even?", "odd"),
        conversation("Which colour is this?", "red", ONE_IMAGE, CLIP),
    ]
    batch = processor.pack([processor.encode(messages) for messages in conversations])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    # Pillow's order of passes, which decides a level here and there, is not what is tested.
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0.02)
    batch["pixel_values"] = expected["pixel_values"]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "max_supervised")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**batch).loss, expected["loss"], rtol=1e-5, atol=1e-5)

    questions = [conversation("Which digit is this?", None, ONE_IMAGE), conversation("Odd or even?")]
    answers = generate_answers(model, processor, [processor.encode(each) for each in questions], max_new_tokens=8)
    said = [{"text": each.text, "token_ids": each.token_ids} for each in answers]
    assert said == json.loads((FIXTURES / f"{name}.expected.json").read_text())


@pytest.mark.parametrize("name", ["model-prefix", "model-cross-attention"])
def test_a_model_folder_keeps_every_weight_and_its_dtype(name):
    """The cross-attention model is as a run in bf16 leaves it: frozen parts bf16, trained ones fp32."""
    model, _ = checkpoint.load(FIXTURES / name)
    found = dict(model.named_parameters())
    with safe_open(FIXTURES / name / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no dict)
            assert found[key].dtype == file.get_tensor(key).dtype, key
            assert torch.equal(found[key], file.get_tensor(key)), key
    assert len({parameter.dtype for parameter in found.values()}) == (2 if name == "model-cross-attention" else 1)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Stopped in the second of two stages, it makes the steps that a run without interruption made."""
    shutil.copytree(FIXTURES / "run-stopped", tmp_path / "run-stopped")
    monkeypatch.chdir(tmp_path)
    output = Path("run-stopped/output")
    before = (output / "log.jsonl").read_text()
    first_stage = (output / "stages/first/model.safetensors").read_bytes()

    assert run.run(recipe.load(RECIPE)) == output

    log = (output / "log.jsonl").read_text()
    assert log.startswith(before), "what had happened stays in the log"
    assert (output / "stages/first/model.safetensors").read_bytes() == first_stage
    entries = [each for each in read_log(output / "log.jsonl") if each["stage"] == "second" and "loss" in each]
    assert [each["step"] for each in entries] == [1, 2, 3, 4, 5, 6, 7]
    for entry, expected in zip(
        entries[3:], json.loads((FIXTURES / "run-stopped.expected.json").read_text()), strict=True
    ):
        assert entry["step"] == expected["step"]
        assert {key: entry[f"samples/{key}"] for key in expected["samples"]} == expected["samples"]
        assert entry["skipped_records"] == expected["skipped"], "listed before the run was stopped"
        assert entry["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-6)
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-5), f"step {entry['step']}"

    trained = load_file(output / "model.safetensors")
    for name, value in load_file(FIXTURES / "run-stopped.expected.safetensors").items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert len((output / "broken.jsonl").read_text().splitlines()) == 1, "nothing is added to the old list"
    assert not (output / "skipped.jsonl").exists(), "the record is known already"
    checkpoint.load(output)


def packed_and_spans(groups, num_tokens, num_media):
    return PackedLayout.from_groups(groups), SpanLayout.from_spans(
        [num_tokens - 4, 4], [(0, num_media), (1, num_media - 1)], num_media
    )


@pytest.mark.parametrize(
    ("name", "inputs", "layouts"),
    [
        ("adapter", ["x"], ()),  # lynx_kernels.nn.Adapter, another batch than it was exported with
        ("operators", ["token_ids", "embedding", "vision", "vision_index"], ()),  # layouts inside, as constants
        (
            "layouts",  # layouts as inputs, others than it was exported with
            ["token_ids", "embedding", "vision", "vision_index"],
            packed_and_spans([(4, [2, 6]), (3, [1, 1, 2])], 19, 7),
        ),
    ],
)
def test_an_exported_program_still_runs(name, inputs, layouts):
    """It calls the operators by name: their schemas, and the names of implementations in it, are promises."""
    assert lynx_kernels.__version__  # importing it is all that loading takes
    program = torch.export.load(FIXTURES / "exported" / f"{name}.pt2")
    expected = load_file(FIXTURES / "exported" / f"{name}.safetensors")
    out = program.module()(*(expected[each] for each in inputs), *layouts)
    for value, key in zip(out if isinstance(out, tuple) else (out,), ("out", "lse"), strict=False):
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def tables(markdown):
    """The tables of a Markdown text, each a list of lines, each a tuple of cells; the lines of dashes left out."""
    found, is_inside = [], False
    for line in markdown.splitlines():
        cells = tuple(cell.strip() for cell in line.strip("| ").split(" | "))
        if not line.startswith("|"):
            is_inside = False
        elif set("".join(cells)) != {"-"}:
            if not is_inside:
                found.append([])
            found[-1].append(cells)
            is_inside = True
    return found


def test_stored_rows_still_make_the_same_report():
    """Cases, ratios and named peers, that is; words may change."""
    rows = newest(read(FIXTURES / "results"))
    assert len(rows) == 687, "of each case the newest run"
    reported = tables(report.text(rows))
    expected = json.loads((FIXTURES / "results" / "expected.json").read_text())
    for kernel, (head, *lines) in expected["summary"].items():
        labels = 2 if head[0] == "mode" else 1  # whose names may change; those of what grows may not
        wanted = tuple(head[labels:]), [tuple(line) for line in lines]
        assert wanted in [(table[0][labels:], table[1:]) for table in reported], kernel
    for group, (head, *lines) in expected["providers"].items():
        # Beside each other in one table, under the name of whom ratios are taken to.
        wanted = Counter(map(tuple, lines))
        assert any(
            table[0][1:2] == (head[1],) and Counter(line[:3] for line in table[1:]) == wanted for table in reported
        ), group
