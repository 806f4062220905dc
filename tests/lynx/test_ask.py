"""``lynx ask``, and how its answers come to the terminal."""

import pytest
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from lynx import cli
from lynx.generation import answers as answers_module
from lynx.generation.answers import answer, generate_answers
from lynx.generation.streaming import AnswerStreamer
from tests.lynx.conftest import conversation, make_image
from tests.lynx.searches import NEW


class Shown:
    """What is on the terminal after each step."""

    def __init__(self, streamer, capsys):
        self.streamer, self.capsys, self.steps = streamer, capsys, []

    def put(self, *tokens):
        self.streamer.put(torch.tensor(tokens))
        self.steps.append(self.capsys.readouterr().out)

    def end(self):
        self.streamer.end()
        self.steps.append(self.capsys.readouterr().out)


def begin(processor, capsys, rows, titles=None):
    shown = Shown(AnswerStreamer(processor, titles), capsys)
    shown.streamer.put(torch.zeros(rows, 0, dtype=torch.int64))  # the prompt
    return shown


def tokens_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answers_stream_in_the_order_of_the_samples(model, processor, asked, capsys):
    """Whatever order they are generated in: here equal images stand apart."""
    answers = generate_answers(model, processor, asked, streamer=AnswerStreamer(processor), **NEW)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [line.strip() for each in answers for line in each.text.splitlines() or [""]]
    assert len({each.text for each in answers}) > 2


def test_several_answers_of_a_sample_stream_one_after_the_other(model, processor, asked):
    rows = []

    class Keep(BaseStreamer):
        def put(self, value):
            rows.append(value.tolist())

        def end(self):
            rows.append("end")

    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 2, **NEW}
    answers = generate_answers(model, processor, asked, streamer=Keep(), **options)
    assert rows.pop() == "end"
    assert len(answers) == 10
    for step, row in enumerate(rows[1:]):
        assert [token for token, each in zip(row, answers, strict=True) if step < len(each.token_ids)] == [
            each.token_ids[step] for each in answers if step < len(each.token_ids)
        ]


def test_an_answer_streams_word_by_word(processor, capsys):
    shown = begin(processor, capsys, 1)
    for token in tokens_of(processor, " which digit is this"):
        shown.put(token)
    shown.end()
    assert "".join(shown.steps) == "which digit is this\n"
    assert sum(map(bool, shown.steps)) > 2


def test_whole_answers_make_room_for_the_next(processor, capsys):
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    which, odd = tokens_of(processor, " which"), tokens_of(processor, " odd or even")
    assert len(odd) > len(which) + 1
    shown = begin(processor, capsys, 3, ["first?", "second?", "third?"])
    waiting = [*which, eos, *[pad] * len(odd)]
    for step, token in enumerate([*odd, eos]):
        shown.put(waiting[step], token, waiting[step])
    before, after = shown.steps[: len(which)], shown.steps[len(which) :]
    assert "".join(before).startswith("first?\n")
    assert "second?" not in "".join(before)
    assert after[0].startswith("which\nsecond?\nodd"), "what waited is printed when its turn comes"
    assert after[-1].endswith("even\nthird?\nwhich\n"), "one that is whole already is printed at once"
    shown.end()
    assert shown.steps[-1] == ""


def test_what_is_cut_off_is_printed_at_the_end(processor, capsys):
    shown = begin(processor, capsys, 2)
    for token in tokens_of(processor, " odd or"):
        shown.put(token, token)
    shown.end()
    assert "".join(shown.steps) == "odd or\nodd or\n"


@pytest.fixture
def ask(model, processor, tmp_path, monkeypatch, capsys):
    """Runs the command on files of random images; returns its status, output and errors."""
    monkeypatch.setattr(cli, "_load", lambda folder: (model, processor))
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.fromarray(make_image(number)).save(f"{number}.png")

    def run(*arguments):
        status = cli.main(["ask", "model", *arguments])
        return status, *capsys.readouterr()

    return run


def about(processor, item, question):
    images = [Image.open(each).convert("RGB") for each in item.split()]
    media = {"images": images} if len(images) == 1 else {"videos": [images]}
    return processor.encode(conversation(question, **media))


@pytest.mark.parametrize("options", [[], ["--beams", "3"], ["--preset", "open-vqa-image"]], ids=str)
def test_ask_many_at_once(model, processor, ask, options):
    items, questions = ["0.png", "1.png", "2.png 0.png"], ["Which digit?", "Odd or even?"]
    named = {"preset": options[1]} if "--preset" in options else {"num_beams": int(options[1])} if options else {}
    samples = [about(processor, item, question) for item in items for question in questions]
    texts = answer(model, processor, samples, **named, max_new_tokens=6)
    shown = [f"{item}: {question}\n{texts.pop(0)}" for item in items for question in questions]
    arguments = ["--max-new-tokens", "6", "0.png", "-i", "1.png", "-i", "2.png", "0.png", "-q", questions[0]]
    status, out, errors = ask(*arguments, "-q", questions[1], *options)
    assert status == 0
    assert [line.strip() for line in out.splitlines()] == [line.strip() for line in "\n".join(shown).splitlines()]
    assert errors.endswith(" tokens/s\n")
    assert errors.startswith("36 tokens in ") or "preset" in named


def test_ask_in_few_words(model, processor, ask):
    [text] = answer(model, processor, [about(processor, "0.png 1.png", "Which digit?")])
    status, out, _ = ask("0.png", "1.png", "Which digit?")
    assert (status, out.strip()) == (0, text)
    status, out, _ = ask("-i", "0.png", "1.png", "--question", "Which digit?")
    assert (status, out.strip()) == (0, text)


def test_ask_describes_first(processor, ask, monkeypatch):
    described = [{"role": "user", "content": "Hello"}]
    monkeypatch.setattr(answers_module, "describe_first", lambda model, processor, conversations: [described])
    seen = []
    generate = answers_module.generate_answers
    monkeypatch.setattr(
        answers_module, "generate_answers", lambda *args, **options: seen.extend(args[2]) or generate(*args, **options)
    )
    ask("0.png", "Which?")
    ask("0.png", "Which?", "--describe-first")
    texts = [processor.answer_of(torch.tensor(each.token_ids)) for each in seen]
    assert texts == ["User: which?\nBot:", "User: hello\nBot:"]


def test_ask_takes_options_anywhere(ask):
    said = {
        ask(*each)[1]
        for each in (
            ["--beams", "2", "0.png", "1.png", "Which?"],
            ["0.png", "1.png", "Which?", "--beams", "2"],
            ["0.png", "--beams", "2", "1.png", "Which?"],
        )
    }
    assert len(said) == 1
    with pytest.raises(SystemExit):
        ask("0.png", "Which?", "--beam-me-up")
    with pytest.raises(SystemExit):
        cli.main(["demo", "0.png"])


def test_ask_keeps_case_and_draws(processor, ask):
    draw = ["0.png", "Which?", "--preset", "demo", "--max-new-tokens", "6", "--seed"]
    assert ask(*draw, "1")[1] == ask(*draw, "1")[1]
    assert len({ask(*draw, str(seed))[1] for seed in range(5)}) > 1
    ask("0.png", "Which?", "--keep-case")
    assert not processor.lowercase


def test_ask_says_what_is_missing(ask):
    for arguments in (["0.png"], ["-q", "Which?"], [], ["-i", "0.png"]):
        status, _, errors = ask(*arguments)
        assert status == 2
        assert "name at least one image and one question" in errors
    status, _, errors = ask("0.png", "Which?", "--preset", "best")
    assert (status, "preset='best' is not known" in errors) == (2, True)
