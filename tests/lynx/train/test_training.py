"""Training, evaluation and the command, end to end on a few images."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import load_file

from lynx import LynxProcessor, checkpoint, cli
from lynx.data import digits, jsonl
from lynx.eval import accuracy, questions
from lynx.train import curves, flops, param_groups, recipe, run
from lynx.train.log import read_log
from lynx.train.resolution import set_resolution
from lynx.train.throughput import Window
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import conversation, make_config, make_image, make_model
from tests.lynx.small import write_records

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One image of each of two digits, asked about in one way: a model can learn it by heart."""
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, rows=8, test_rows=8)
    lines = [
        {
            "type": kind,
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": f"images/{n:04d}.png"}, question]},
                {"role": "assistant", "content": answer},
            ],
        }
        for n in (0, 1)
        for kind, question, answer in (
            ("digit", {"type": "text", "text": "Which digit?"}, str(n)),
            ("parity", {"type": "text", "text": "Odd or even?"}, "odd" if n % 2 else "even"),
        )
    ]
    path = folder / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"messages": "broken"}])))
    return path


def train(data, output, name="tiny", **changes):
    """A short run; the entries of its log."""
    defaults = {"data": str(data), "output": str(output), "token_budget": 100, "log_every": 1}
    assert run.run(recipe.load(name, {**defaults, **changes})) == output
    return [entry for entry in read_log(output / "log.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, train(data, folder, steps=70, learning_rate=3e-3)


def test_it_learns(data, trained):
    folder, log = trained
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
    answered = accuracy.answer_questions(*checkpoint.load(folder), questions.read(data)[0], batch_size=3)
    assert [(each.prediction, each.question.truths) for each in answered if not each.is_right] == []
    assert accuracy.scores(answered) == {"digit": accuracy.Score(2, 2, 1), "parity": accuracy.Score(2, 2, 1)}


def test_the_log_tells_what_was_trained_on(trained):
    folder, log = trained
    assert [entry["step"] for entry in log] == list(range(1, 71))
    assert all(
        entry["stage"] == "train" and 0 < entry["pack_utilization"] <= 1 and 0 <= entry["data_wait"] <= 1
        for entry in log
    )
    assert all(entry["mfu"] >= 0 and entry["supervised_tokens_per_second"] > 0 for entry in log)
    assert log[-1]["samples/few"] > 70
    assert log[-1]["epochs/few"] == pytest.approx(log[-1]["samples/few"] / 5, abs=1e-4)
    assert log[-1]["supervised_share/few"] == 1.0
    assert (log[-1]["skipped_records"], log[-1]["too_long_records"]) == (1, 0)
    [skipped] = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped["path"].endswith("few.jsonl:5")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["stages"][0]["steps"] == 70


def test_too_many_skipped_records_stop_the_run(data, tmp_path):
    with pytest.raises(ValueError, match="1 records cannot be used, more than max_skipped=0"):
        train(data, tmp_path, steps=3, max_skipped=0)


def test_a_file_is_read_through_once(data, tmp_path, monkeypatch):
    """Though a tokenizer is learned from it first."""
    scanned, seen = jsonl._scanned, []
    monkeypatch.setattr(jsonl, "_scanned", lambda path: (seen.append(path), scanned(path))[1])
    train(data, tmp_path, steps=1)
    assert seen == [data]


def test_progress_tells_loss_and_speed(data, capfd, tmp_path):
    train(data, tmp_path, steps=2)
    out, shown = capfd.readouterr()
    assert "{'loss'" not in out + shown, "one bar, and not Trainer's own reports beside it"
    for told in ("2/2", "loss ", "supervised tokens/s", "MFU ", " full, ", "data wait "):
        assert told in shown


def test_rates():
    """Of two ranks in four seconds that could do 100 operations a second each."""
    one = Window(supervised=10, tokens=150, capacity=200, flops=200.0, waited=1.0).totals()
    assert Window.rates(2 * one, 4.0, 2, 100.0) == {
        "supervised_tokens_per_second": 5.0,
        "tokens_per_second": 75.0,
        "mfu": 0.5,
        "pack_utilization": 0.75,
        "data_wait": 0.25,
    }


def test_supervised_tokens_are_counted(data, tmp_path, monkeypatch):
    """In every entry for the speed, since the stage began for the data sets' shares."""
    seen = []

    def rates(totals, *_):
        seen.append(totals.tolist())
        return dict.fromkeys(
            ("supervised_tokens_per_second", "tokens_per_second", "mfu", "pack_utilization", "data_wait"), 0.0
        )

    monkeypatch.setattr(Window, "rates", rates)
    train(data, tmp_path, steps=3, token_budget=111)
    saved = torch.load(tmp_path / "checkpoints/train/checkpoint-3/0-data.pt", weights_only=True)
    assert sum(supervised for supervised, *_ in seen) == saved["supervised"]["few"] > saved["samples"]["few"]
    assert all(0 < tokens < capacity == 111 for _, tokens, capacity, *_ in seen)


@pytest.mark.parametrize(
    "trainable", [("adapters",), ("resampler",), ("resampler", "frame_positions"), ("vision_tower", "language_model")]
)
def test_operations_of_a_step(tokenizer, processor, trainable):
    """From the shapes that the configuration says, for two samples, one of them with an image."""
    model = make_model(make_config(tokenizer))
    param_groups.set_trainable(model, trainable)
    conversations = (conversation("Which digit?", "seven", [make_image(0)]), conversation("Hi", "yes"))
    samples = [processor.encode(messages) for messages in conversations]
    batch = processor.pack(samples)
    lengths = [len(sample.token_ids) + 3 * len(sample.media) for sample in samples]
    supervised = int((batch["labels"] != -100).sum())
    of_tower, of_text = "vision_tower" in trainable, "language_model" in trainable
    of_media = of_tower or "frame_positions" in trainable  # whose gradient goes back to what the resampler reads
    of_latents = of_media or "resampler" in trainable
    rows = 5  # of the image: four patches and the class token
    # Operations: weights, times rows, times 2, each for the value, the gradient of the input, and that of the weight.
    expected = rows * (3 * 16 * 24 + 2 * (4 * 24 * 24 + 2 * 24 * 40)) * (6 if of_tower else 2)
    expected += rows * 2 * (24 * 2 * 16) * (2 + 2 * of_media + 2 * ("resampler" in trainable))
    expected += 3 * 2 * (32 * 16 + 16 * 32 + 2 * 32 * 4 * 32) * (2 + 2 * of_latents + 2 * ("resampler" in trainable))
    expected += sum(lengths) * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) * (6 if of_text else 4)
    expected += sum(lengths) * 2 * (2 * 32 * 8) * (6 if "adapters" in trainable else 4)
    expected += supervised * 32 * len(tokenizer) * (6 if of_text else 4)
    # Attention: two products of each visible pair, and four backward.
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    expected += 4 * (pairs * 32 * 3) * 3 + 4 * (rows**2 * 24 * 2) * (3 if of_tower else 1)
    expected += 4 * (3 * rows * 16 * 2) * (3 if of_latents else 1)
    assert flops.StepFlops(model)(batch) == expected


def test_the_same_seed_gives_the_same_model(data, tmp_path):
    def weights(name, seed):
        train(data, tmp_path / name, steps=3, seed=seed)
        return checkpoint.load(tmp_path / name)[0].state_dict()

    first, second, other = weights("first", 1), weights("second", 1), weights("other", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_goes_on_from_a_folder(data, trained, tmp_path):
    folder, _ = trained
    log = train(data, tmp_path, model=str(folder), steps=1, learning_rate=1e-6)
    assert log[0]["loss"] < 0.2
    with pytest.raises(recipe.RecipeError, match="which has its own options"):
        train(data, tmp_path / "other", model=str(folder), **{"model_options.max_frames": 3})


def test_a_finished_run_is_kept(data, trained, tmp_path):
    """The same command again does nothing, another one is refused, a fresh one begins anew."""
    train(data, tmp_path, steps=2)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    train(data, tmp_path, steps=2)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    arguments = ["train", "tiny", f"data={data}", f"output={tmp_path}", "token_budget=100", "steps=1", "log_every=1"]
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--fresh"]) == 0
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry] == [1]
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(recipe.RecipeError, match="holds a model already"):
        train(data, tmp_path, steps=2)


def test_three_stages_as_in_the_paper(tmp_path, caplog):
    """The recipe of Table 5 on the tiny model: images grow, each stage goes on from the one before."""
    data = write_records(tmp_path, 12)
    changes = {
        "model": "tiny", "steps": 2, "token_budget": 150, "tokens_per_step": 300, "workers": 0, "root": str(tmp_path),
        "pretrain-224.resolution": 16, "pretrain-420.resolution": 32, "finetune.resolution": 32, "save_every": 1,
        **{f"{stage}.data": str(data) for stage in ("pretrain-224", "pretrain-420", "finetune")},
    }  # fmt: skip
    output = tmp_path / "out"
    log = train(data, output, "lynx", **changes)
    assert "language_model, vision_tower: starts from nothing, and no stage trains it" in caplog.text
    assert [(entry["stage"], entry["step"]) for entry in log] == [
        (stage, step) for stage in ("pretrain-224", "pretrain-420", "finetune") for step in (1, 2)
    ]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-5, 1e-4, 1e-6, 1e-5, 2e-6, 2e-5])
    small, large = (checkpoint.load(each, dtype=torch.float32)[0] for each in (output / "stages/pretrain-224", output))
    assert (small.config.vision_config.image_size, large.config.vision_config.image_size) == (16, 32)
    for (name, before), after in zip(small.named_parameters(), large.parameters(), strict=True):
        if name.endswith("position_embedding"):
            continue
        trained = param_groups.group_of(name) in ("resampler", "adapters", "frame_positions")
        assert torch.equal(before, after) == (not trained), name
        if not trained:
            assert torch.equal(before, before.bfloat16().float()), name
    saved = torch.load(output / "checkpoints/finetune/checkpoint-2/optimizer.pt", weights_only=True)
    trainable = recipe.load("lynx").stages[2].trainable
    number = sum(param_groups.group_of(name) in trainable for name, _ in large.named_parameters())
    assert len(saved["state"]) == number, "frozen parameters have no optimizer state"


@pytest.mark.parametrize("name", ["lynx-cross-frozen", "lynx-cross-trained"])
def test_both_modes_of_cross_attention(name, tmp_path):
    """The gates open, and the decoder trains in one of the recipes only."""
    data = write_records(tmp_path, 12)
    changes = {
        "model": "tiny", "model_options.fusion": "cross_attention", "stages": ["finetune"], "steps": 3, "workers": 0,
        "token_budget": 150, "tokens_per_step": 300, "finetune.data": str(data), "resolution": 16, "warmup_from": 2e-5,
    }  # fmt: skip
    log = train(data, tmp_path / "out", name, **changes)
    assert [entry["step"] for entry in log] == [1, 2, 3]
    model, _ = checkpoint.load(tmp_path / "out", dtype=torch.float32)
    gates = [value for key, value in model.named_parameters() if "cross_attention" in key and key.endswith("gate")]
    assert gates
    assert all(gate.abs().sum() > 0 for gate in gates)
    saved = load_file(tmp_path / "out/checkpoints/finetune/checkpoint-3/trained.safetensors")
    of_decoder = [key for key in saved if key.startswith("language_model") and "cross_attention" not in key]
    assert bool(of_decoder) == (name == "lynx-cross-trained")


def test_questions_about_one_image_share_it_with_cross_attention(tokenizer):
    config = make_config(tokenizer, fusion="cross_attention")
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    pairs = (("Which digit?", "seven"), ("Odd or even?", "odd"), ("And which is it?", "7 seven"))
    alone = [processor.encode(conversation(*pair, [make_image(0)])) for pair in pairs]
    first, *others = (conversation(*pair, [make_image(0)] if pair == pairs[0] else ()) for pair in pairs)
    together = processor.encode_branches([first, *others])
    with torch.no_grad():
        expected, shared = (model(**processor.pack(samples)).loss.item() for samples in (alone, [together]))
    assert shared == pytest.approx(expected, rel=1e-5)


def test_a_budget_that_does_not_divide_is_refused(data, tmp_path):
    with pytest.raises(recipe.RecipeError, match=r"tokens_per_step is 150, .* not a multiple of 100.* on 1 ranks"):
        train(data, tmp_path, steps=1, tokens_per_step=150)


def test_another_resolution_resizes_the_positions(model, processor):
    """To twice the side: means over four patches are near the old values; the class token's position stays."""
    before = model.vision_tower.embeddings.position_embedding.detach().clone()
    set_resolution(model, processor, 16)
    after = model.vision_tower.embeddings.position_embedding
    assert after.shape == (1, 17, 24)
    assert torch.equal(after[:, 0], before[:, 0])
    grid = torch.nn.functional.interpolate(
        before[0, 1:].reshape(1, 2, 2, 24).permute(0, 3, 1, 2), scale_factor=2, mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(after[0, 1:].T.reshape(24, 4, 4), grid[0])
    out = model(**processor.pack([processor.encode(conversation("Which?", "seven", images=[make_image(0)]))]))
    assert out.loss > 0
    with pytest.raises(ValueError, match=r"resolution is 18, .* not a multiple of .* patch_size, 4"):
        set_resolution(model, processor, 18)


def test_plot(trained, tmp_path, capsys):
    folder, _ = trained
    assert cli.main(["plot", str(folder), "--to", str(tmp_path / "curves.png")]) == 0
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "log.jsonl" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage": "a", "lo')
    with pytest.raises(ValueError, match="no entry with a loss yet"):
        curves.draw(tmp_path / "log.jsonl", tmp_path / "none.png")


def test_logs_of_earlier_code_are_drawn(tmp_path, monkeypatch):
    """With fill for pack_utilization, all of their curves."""
    folder = FIXTURES / "run-stopped" / "output"
    assert '"fill"' in (folder / "log.jsonl").read_text()
    assert cli.main(["plot", str(folder), "--to", str(tmp_path / "curves.png")]) == 0
    entries = [entry for entry in read_log(folder / "log.jsonl") if "loss" in entry]
    assert [entry["pack_utilization"] for entry in entries[:2]] == [0.9571, 0.9786]
    assert [entry["skipped_records"] for entry in entries[:2]] == [1, 1]
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *found, **options: (drawn.append(options["label"]), plot(*found, **options))[1]
    )
    curves.draw(folder / "log.jsonl", tmp_path / "again.png")
    assert drawn.count("first") == drawn.count("second") == 7, "each of the curves"


def test_ask(data, trained, capsys):
    folder, _ = trained
    for name, digit in (("0000.png", "0"), ("0001.png", "1")):
        assert cli.main(["ask", str(folder), str(data.parent / "images" / name), "Which digit?"]) == 0
        assert capsys.readouterr().out.strip() == digit
    clip = write_clip(data.parent / "clip.mp4", [frame(number) for number in range(9)])
    assert cli.main(["ask", str(folder), str(clip), "Which digit?"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{model}", "{folder}/nothing.png", "What?"], "nothing.png: no such file"),
        (["ask", "{model}", "{folder}/few.jsonl", "What?"], "few.jsonl: not an image"),
        (["ask", "{model}", "{folder}/nothing.mp4", "What?"], "nothing.mp4: no such file"),
        (["ask", "{model}", "{folder}/images/0000.png", " "], "empty text"),
        (["ask", "{folder}/none", "{folder}/images/0000.png", "What?"], "no such model folder"),
        (["ask", "{model}", *["{folder}/images/0000.png"] * 6, "What?"], "6 frames, expected 1 to 5"),
        (["ask", "{model}", "{folder}/images/0000.png", "\udcff"], "not valid Unicode"),
        (["ask", "{model}", "-q", "What?"], "name at least one image and one question"),
        (["ask", "{model}", "-i", "{folder}/images/0000.png", "What?"], "with -i the question needs -q"),
        (["ask", "{model}", "a.png", "b.mp4", "What?"], "b.mp4 is a video, an item of its own"),
        (["ask", "{model}", "https://example.org/cat.png", "What?"], "https://example.org/cat.png: a URL is never"),
        (["ask", "{model}", "cat1", "What?"], "cat1: no such file"),  # though it could be base64
        (
            ["ask", "{model}", "{folder}/images/0000.png", "What?", "--preset", "none"],
            "preset='none' is not known",
        ),
        (["train", "tiny", "data={folder}/none.jsonl", "output={folder}/out"], "none.jsonl"),
        (["train", "tinny"], "neither a file nor a shipped recipe of this name; did you mean tiny?"),
        (["train", "tiny", "data={folder}/few.jsonl", "step=3"], "there is no key 'step'; did you mean"),
        (["evaluate", "{folder}", "{folder}/few.jsonl"], "not a complete model folder"),
    ],
)
def test_the_command_says_what_is_wrong(data, trained, capsys, arguments, message):
    arguments = [each.format(model=trained[0], folder=data.parent) for each in arguments]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(f"lynx {arguments[0]}: ")
    assert message in printed


def test_counts_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ask", "a", "b", "c", "--beams", "-1"])
    assert "is not at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["ask", "a", "b", "c", "--beams", "two"])
    assert "argument --beams: 'two' is not an integer" in capsys.readouterr().err


def test_an_unknown_option_shows_its_commands_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ask", "a", "b", "--beam", "2", "--bogus"])
    assert "usage: lynx ask [options] MODEL IMAGE" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "advice"), [("matplotlib", True), ("gguf", False), ("av", False)])
def test_what_brings_a_missing_module(capsys, monkeypatch, module, advice):
    def fail(options):
        raise ModuleNotFoundError(f"there is no {module}", name=module)

    monkeypatch.setattr(cli, "_plot", fail)
    assert cli.main(["plot", "folder"]) == 2
    assert ("lynx-kernels[demo]" in capsys.readouterr().err) == advice


def test_demo(tmp_path, capsys, monkeypatch):
    """The demo itself, cut short: every step of it runs, and it says that so short a training is not enough."""
    monkeypatch.setattr("lynx.demo.STEPS", 2)
    monkeypatch.setattr("lynx.demo.digits.write", partial(digits.write, rows=64, test_rows=16))
    assert cli.main(["demo", "--folder", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "which digit" in out
    assert "learned less than it should have: which digit" in err
    for name in ("answers.png", "loss.png"):
        Image.open(tmp_path / name).load()
    checkpoint.load(tmp_path / "model")
