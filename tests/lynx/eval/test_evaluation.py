"""Evaluation: questions read, answered, judged, counted and drawn, and ``lynx evaluate``."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lynx import checkpoint, cli
from lynx.eval import accuracy, judge, questions, sheet
from lynx.eval.questions import Question
from tests.lynx.conftest import conversation, make_image

OPEN_VQA = {  # of Lynx, in the paper: right, questions
    "OCR": (36, 53), "Counting": (25, 37), "Reasoning": (26, 31), "Place": (17, 22), "Color": (21, 30),
    "Spatial": (9, 15), "Action": (17, 20), "Others": (79, 94),
}  # fmt: skip


def annotation(index=1, question="What is in the image?", answer="platform", **more):
    """A line of Open-VQA."""
    return {
        "dataset": "Open_VQA_images", "question": question, "answer": [answer], "index": index,
        "image": "images/a.png", "origin_dataset": "places365", "class": "Place", **more,
    }  # fmt: skip


def write(folder, *records):
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(make_image(0)).save(folder / "images" / "a.png")
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in records))
    return path


def question(text="?", truths=("yes",), kind="all"):
    return Question(conversation(text), list(truths), kind)


def test_questions_come_in_every_format_of_records(tmp_path, processor):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": "images/a.png"}, {"type": "text", "text": "Is it odd?"}],
        },
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "it is 7"},
    ]
    pairs = [{"question": "Who?", "answer": "a cat"}, {"question": "Where?", "answer": ["here", "at home"]}]
    path = write(
        tmp_path,
        annotation(),
        {"messages": messages, "type": "dialog"},
        "",
        {"image": "images/a.png", "questions": pairs},
        {"question": "2 plus 2?", "answer": "4"},
    )
    asked, skipped = questions.read(path, encode=processor.encode)
    assert skipped == []
    assert [(each.kind, each.text, each.truths) for each in asked] == [
        ("Place", "What is in the image?", ["platform"]),
        ("dialog", "Why?", ["it is 7"]),
        ("all", "Who?", ["a cat"]),
        ("all", "Where?", ["here", "at home"]),
        ("all", "2 plus 2?", ["4"]),
    ]
    assert [len(each.messages) for each in asked] == [1, 3, 1, 1, 1]
    samples = [processor.encode(each.messages) for each in asked]
    file = str(tmp_path / "images" / "a.png")
    assert [sample.media for sample in samples] == [[[file]]] * 4 + [[]]


def test_what_cannot_be_asked_is_skipped_with_its_place(tmp_path, processor, caplog):
    root = tmp_path / "root"
    root.mkdir()
    Image.fromarray(make_image(1)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "text.png").write_text("This is not an image.")
    path = write(
        root,
        annotation(image="images/missing.png"),
        "{",
        annotation(question=" "),
        annotation(answer=""),
        annotation(image="../secret.png"),
        annotation(image="link.png"),
        annotation(image="text.png"),
        {"video": ["images/a.png"] * 5, "question": "What happens?", "answer": "nothing"},
        annotation(),
    )
    asked, skipped = questions.read(path, encode=processor.encode)
    assert len(asked) == 1
    reasons = [
        "missing.png", "not JSON", "the question is empty", "answer is", "leaves the root folder",
        "'link.png' leaves the root folder", "text.png: not an image", "5 frames, expected 1 to 4",
    ]  # fmt: skip
    assert len(skipped) == len(reasons)
    for line, (each, reason) in enumerate(zip(skipped, reasons, strict=True), start=1):
        assert each.startswith(f"{path}:{line}: ")
        assert reason in each
        assert each in caplog.text
    write(root, annotation(image="images/missing.png"), annotation(image="images/missing.png"))
    with pytest.raises(ValueError, match=r"none of its 2 records can be used; the first one: .*jsonl:1: no such image"):
        questions.read(path)
    write(root)
    with pytest.raises(ValueError, match=r"questions\.jsonl is empty$"):
        questions.read(path)


def test_scores_count_right_answers_and_the_commonest_truth():
    cases = [
        (question(kind=kind, truths=truths), prediction)
        for kind, prediction, truths in (
            ("a", "Seven", ["seven "]), ("a", "7", ["seven", "7"]), ("a", "", ["six"]), ("b", "no", ["yes"]),
            ("a", "six", ["six"]), ("a", "six", ["seven"]), ("b", "\n Yes\t", ["no", "yes"]),
        )
    ]  # fmt: skip
    right = judge.same_words(cases)
    assert right == [True, True, False, False, True, False, True]
    scores = accuracy.scores([accuracy.Answered(*case, each) for case, each in zip(cases, right, strict=True)])
    assert scores == {"a": accuracy.Score(5, 3, 3), "b": accuracy.Score(2, 1, 1)}


def test_the_table_has_the_papers_numbers():
    """76.16 % of 302, give or take 4.8 points."""
    scores = {kind: accuracy.Score(total, right, 1) for kind, (right, total) in OPEN_VQA.items()}
    lines = accuracy.table(scores).splitlines()
    assert lines[1].split() == ["OCR", "36", "/", "53", "67.9%", "54.5%", "-", "78.9%", "1.9%"]
    assert lines[-1].split() == ["overall", "230", "/", "302", "76.2%", "71.0%", "-", "80.6%", "2.6%"]
    assert len(accuracy.table({"all": accuracy.Score(2, 1, 1)}).splitlines()) == 2


@pytest.mark.parametrize("right", [0, 1, 3, 10])
def test_the_interval_is_wilsons(right):
    """Its ends are the shares from which what was seen lies 1.96 standard deviations away."""
    low, high = accuracy.Score(10, right, 0).interval
    for end, is_there in ((low, right > 0), (high, right < 10)):
        if is_there:
            assert abs(right / 10 - end) == pytest.approx(1.959964 * (end * (1 - end) / 10) ** 0.5, rel=1e-6)
    assert 0 <= low <= right / 10 <= high + 1e-12
    assert high <= 1
    assert (low == 0) == (right == 0)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes", True),
        (" yes.", True),
        ("\nNo, it is", False),
        ("NO", False),
        ("Maybe", None),
        ("", None),
        ("Yesterday", None),
    ],
)
def test_verdicts(reply, expected):
    assert judge.verdict(reply) is expected


@pytest.fixture
def judge_folder(tokenizer, tmp_path):
    """A language model too small to know anything."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_judge_is_asked_for_every_truth(judge_folder, monkeypatch, caplog):
    model = judge.LanguageModelJudge(judge_folder, batch_size=2)
    asked = []

    def replies(prompts):
        asked.append(list(prompts))
        right = {'imply the answer "a cat"': "Yes", 'imply the answer "a dog"': "No."}
        return [next((say for words, say in right.items() if words in each), "Hm") for each in prompts]

    monkeypatch.setattr(model, "replies", replies)
    truths = ["a dog", "a cat"], ["a dog"], ["a bird"]
    assert model([(question("Who?", each), "a red cat") for each in truths]) == [True, False, False]
    assert [len(each) for each in asked] == [2, 2]
    assert asked[1][:1] == [
        'Given the question "Who?", does the answer "a red cat" imply the answer "a dog"? Answer with Yes or No.'
    ]
    assert "1 of 4 verdicts are neither Yes nor No and count as No; the first: 'Hm'" in caplog.text


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s>{{ m.content }}{% endfor %}\nBot:"])
def test_a_judge_answers_alone_as_beside_others(judge_folder, template, monkeypatch):
    model = judge.LanguageModelJudge(judge_folder)
    model.tokenizer.chat_template = template
    kind, begins = type(model.tokenizer), []
    tokenize = kind.__call__
    monkeypatch.setattr(
        kind,
        "__call__",
        lambda *args, **options: (begins.append(options["add_special_tokens"]), tokenize(*args, **options))[1],
    )
    prompts = ["Is it odd? Answer with Yes or No.", "No?", "And 7, is that odd or even, would you say?"]
    together = model.replies(prompts)
    assert together == [model.replies([each])[0] for each in prompts]
    assert any(together)
    assert set(begins) == {template is None}, "a template writes its own BOS"


def test_a_judge_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; judge needs the folder of a language model"):
        judge.LanguageModelJudge(tmp_path / "none")
    with pytest.raises(ValueError, match="transformers cannot read a language model from it"):
        judge.LanguageModelJudge(tmp_path)


def test_a_judge_in_a_pickle_is_refused(judge_folder):
    weights = load_file(judge_folder / "model.safetensors")
    (judge_folder / "model.safetensors").unlink()
    torch.save(weights, judge_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="transformers cannot read a language model from it"):
        judge.LanguageModelJudge(judge_folder)


@pytest.fixture
def folder(model, processor, tmp_path):
    checkpoint.save(tmp_path / "model", model, processor)
    return tmp_path / "model"


def test_evaluate(folder, tmp_path, capsys, monkeypatch):
    """Open-VQA's own format, with the paper's settings, a judge that always agrees, an image that is missing."""
    long = {"video": ["images/a.png"] * 9, "question": "What happens?", "answer": "nothing"}
    path = write(tmp_path, annotation(), annotation(image="images/gone.png"), annotation(**{"class": "Color"}), long)
    used = []
    monkeypatch.setattr(accuracy, "answer", lambda *args, **options: (used.append(options), ["<$red\n"] * 2)[1])
    monkeypatch.setattr(judge, "LanguageModelJudge", lambda folder: lambda cases: [True] * len(cases))
    files = {"--judge": tmp_path, "--answers": tmp_path / "answers.jsonl", "--sheet": tmp_path / "sheet.png"}
    options = [str(each) for option in files.items() for each in option]
    assert cli.main(["evaluate", str(folder), str(path), "--preset", "open-vqa-image", *options]) == 0
    out = capsys.readouterr().out
    assert used == [{"preset": "open-vqa-image"}]
    assert out.splitlines()[3].split() == ["overall", "2", "/", "2", "100.0%", "34.2%", "-", "100.0%", "100.0%"]
    assert "skipped, and not counted: 2; the first one: " in out
    assert "gone.png" in out
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["Place", "Color"]
    assert lines[0]["prediction"] == "<$red\n"
    assert lines[0]["right"] is True
    Image.open(tmp_path / "sheet.png").load()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--judge", "nowhere"), "nowhere: no such folder; judge needs the folder of a language model"),
        (("--preset", "open-vqa"), "preset='open-vqa' is not known; there are open-vqa-image"),
        (("--answers", "nowhere/a.jsonl"), "nowhere/a.jsonl: there is no folder nowhere"),
        (("--sheet", "nowhere/a.png"), "nowhere/a.png: there is no folder nowhere"),
        (("--root", "nowhere"), "none of its 1 records can be used; the first one"),
    ],
)
def test_evaluate_says_what_is_wrong_before_it_asks(folder, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr(accuracy, "answer", lambda *args, **options: pytest.fail("asked"))
    assert cli.main(["evaluate", str(folder), str(write(tmp_path, annotation())), *more]) == 2
    assert message in capsys.readouterr().err


def test_images_are_drawn(tmp_path):
    answered = [
        accuracy.Answered(question("Two or $x $a_{$?", ["2", "two"]), prediction, prediction == "2")
        for prediction in ("2", "", "3", "many " * 99, "x" * 300)
    ]
    sheet.answer_sheet(answered, tmp_path / "answers.png", columns=2)
    Image.open(tmp_path / "answers.png").load()
