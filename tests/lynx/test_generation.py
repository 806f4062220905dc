"""Answers: the tokens of transformers' own generation, whatever shares a root or stands beside it in the batch."""

import copy

import pytest
import torch
from PIL import Image
from transformers import CompileConfig, DynamicCache, GenerationConfig

from lynx import cache as cache_module
from lynx import cli, generation
from lynx.generation import SETTINGS, FirstAnswerStreamer, answer, describe_first, generate_answers
from tests.lynx.conftest import conversation, make_config, make_model, picture
from tests.numbers import assert_within_budget

SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 5, "length_penalty": -2.0, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "top_p": 0.9, "top_k": 20},
    "sampling beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
}
NEW = {"max_new_tokens": 8}


def plain(model):
    """The same model, with transformers' own attention and cache."""
    model = copy.deepcopy(model)
    model.get_decoder().config._attn_implementation = "eager"
    return model


@pytest.fixture
def batch(processor):
    return processor(
        text=["Which digit is this?", "Hello", "Which digits are these?"],
        images=[picture(0), None, None],
        videos=[None, None, [picture(1), picture(2)]],
    )


@pytest.fixture
def reads(model):
    """How many tokens the decoder reads in each forward pass."""
    found = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: found.append(args[0].shape[:2]), with_kwargs=True)
    return found


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
def test_generate_says_what_transformers_says(model, batch, reads, search, inputs):
    if inputs == "embeddings":
        vision_tokens = model.encode_media(batch["pixel_values"], batch["frame_positions"], batch["media_layout"])
        embeds = model.embed(batch["input_ids"], vision_tokens)
        batch = {"inputs_embeds": embeds.detach(), "attention_mask": batch["attention_mask"]}
    found = []
    for each in (plain(model), model):
        reads.clear()
        torch.manual_seed(7)
        wanted = {"return_dict_in_generate": True, "output_scores": True}
        found.append(each.generate(**batch, **SEARCHES[search], **NEW, **wanted))
    expected, shared = found
    assert torch.equal(shared.sequences, expected.sequences)
    for ours, theirs in zip(shared.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if search == "beams":
        torch.testing.assert_close(shared.sequences_scores, expected.sequences_scores)
    assert reads[0] == (1, int(batch["attention_mask"].sum())), "a prompt is read once, without its pads"


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_static_shapes_change_nothing(model, batch, search):
    expected = model.generate(**batch, **SEARCHES[search], **NEW)
    assert torch.equal(model.generate(**batch, **SEARCHES[search], **NEW, cache_implementation="static"), expected)


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_steps_of_static_shapes_compile_once(model, processor, batch, search, monkeypatch):
    """As on GPUs: those of sampling by transformers, those of beam search by us."""
    expected = model.generate(**batch, **SEARCHES[search], **NEW)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    model.generation_config.compile_config = compile_config
    if search == "beams":
        compiles = type(model)._compiles
        monkeypatch.setattr(type(model), "_compiles", lambda self, cache: compiles(OnGpu(), cache))
    torch._dynamo.reset()
    options = {**SEARCHES[search], **NEW, "cache_implementation": "static"}
    assert torch.equal(model.generate(**batch, **options), expected)
    assert len(compiled) == 1
    other = processor(text=["Which digit is that?", "Hello", "Bye"], images=[picture(3), None, None])
    assert torch.equal(model.generate(**other, **options), model.generate(**other, **SEARCHES[search], **NEW))
    assert len(compiled) == 1, "another generation, with prompts of other lengths, takes what is compiled"


class OnGpu:
    device = torch.device("cuda")


def test_full_prefixes(tokenizer, processor):
    """A picture whose vision tokens all see each other, against forward passes over packed rows."""
    model = make_model(make_config(tokenizer, prefix_is_causal=False))
    sample = processor.encode(conversation("Which digit is this?", images=[picture(0)]))
    [said] = generate_answers(model, processor, [sample], max_new_tokens=5)
    batch = processor(text="Which digit is this?", images=picture(0))
    assert model.generate(**batch, max_new_tokens=5)[0, batch["input_ids"].shape[1] :].tolist() == said.token_ids
    for step, token in enumerate(said.token_ids):
        row = copy.deepcopy(sample)
        row.token_ids.extend(said.token_ids[:step])
        row.labels.extend([-100] * step)
        packed = processor.pack([row])
        layout = type(packed["layout"]).from_prefixes([3], [len(row.token_ids)], root_is_causal=False)
        with torch.no_grad():
            logits = model(**{**packed, "labels": None, "layout": layout}).logits
        assert int(logits[0, -1].argmax()) == token


def test_long_answers_outgrow_a_block(model, batch, monkeypatch):
    expected = plain(model).generate(**batch, max_new_tokens=20, min_new_tokens=20, num_beams=2)
    monkeypatch.setattr(cache_module, "BLOCK", 4)
    assert torch.equal(model.generate(**batch, max_new_tokens=20, min_new_tokens=20, num_beams=2), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True},
        {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=8)},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_who_needs_another_cache_gets_it(model, processor, reads, options):
    batch = processor(text="Which digit is this?")
    options = {**({} if "generation_config" in options else NEW), **copy.deepcopy(options)}
    assert not model.shares_roots(options)
    expected = model.generate(**batch, **NEW)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_a_batch_without_a_mask(model, reads):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for first, read in ((5, (1, 6)), (model.config.pad_token_id, (2, 3))):  # perhaps a pad: transformers decides
        ids[0, 0] = first
        expected = plain(model).generate(ids, **NEW)
        reads.clear()
        assert torch.equal(model.generate(ids, **NEW), expected)
        assert reads[0] == read
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.generate(ids, attention_mask=torch.ones(2, 2), **NEW)
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        model.generate(ids[:, 1:], max_length=9, cache_implementation="static")


QUESTIONS = ["Which digit is this?", "Odd or even?", "Which digit is that?"]


@pytest.fixture
def asked(processor):
    """Three questions about one picture, one about a video and one about nothing, mixed."""
    one, clip = picture(0), [picture(1), picture(2)]
    first, second, third = (processor.encode(conversation(text, images=[one])) for text in QUESTIONS)
    video = processor.encode(conversation("Which digits?", videos=[clip]))
    return [first, video, second, processor.encode(conversation("Hello")), third]


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_answers_depend_on_nobody_else(model, processor, asked, search):
    """Alone, in any order, in batches of any size, with or without others about the same picture: the same tokens."""
    options = {**SEARCHES[search], **NEW}
    alone = [generate_answers(model, processor, [each], **options)[0] for each in asked]
    assert len({tuple(each.token_ids) for each in alone}) > 2, "the model must not say the same to everything"
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0], [3, 1, 4], [1, 1, 3, 3], [0] * 9):
        assert generate_answers(model, processor, [asked[i] for i in order], **options) == [alone[i] for i in order]
    batch = processor.pad(asked)
    del batch["labels"]
    rows = plain(model).generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
    if search == "greedy":
        assert [processor.answer_of(row) for row in rows] == [each.text for each in alone]


def test_scores_depend_on_nobody_else(model, processor):
    """Log-probabilities of a row in a batch and alone: both within the budget of plain PyTorch's."""
    texts, images = [*QUESTIONS, "Hello"], [picture(0), picture(1), picture(2), None]
    together, single = processor(text=texts, images=images), processor(text=texts[0], images=images[0])
    wanted = {"return_dict_in_generate": True, "output_logits": True, **NEW, "min_new_tokens": 8}

    def log_probabilities(model, batch):
        return torch.stack(model.generate(**batch, **wanted).logits)[:, 0].double().log_softmax(-1)

    in_doubles = {**single, "pixel_values": single["pixel_values"].double()}
    exact = log_probabilities(plain(model).double(), in_doubles)
    near = log_probabilities(plain(model), single)
    for batch in (single, together):
        ours = log_probabilities(model, batch)
        assert_within_budget(ours, exact, near, precision=torch.float32)
        assert_within_budget(ours.float(), exact, near.float())


def test_several_questions_read_their_picture_once(model, processor, asked, reads):
    encoded = []
    model.vision_tower.register_forward_pre_hook(lambda *args, **kwargs: encoded.append(1))
    resampled = []
    model.resampler.register_forward_hook(lambda module, args, out: resampled.append(len(out)))
    generate_answers(model, processor, asked, num_beams=2, max_new_tokens=2)
    assert resampled == [2 * processor.num_latents], "one picture, one video"
    texts = [each.token_ids for each in asked]
    same = next(i for i, tokens in enumerate(zip(*(texts[i] for i in (0, 2, 4)), strict=False)) if len(set(tokens)) > 1)
    assert same > 1, "BOS and more"
    assert reads[0] == (1, 2 * processor.num_latents + sum(map(len, texts)) - 2 * same)
    assert reads[1] == (10, 1)


def test_pictures_are_the_same_object_or_path(processor, tmp_path):
    array, path = picture(0), tmp_path / "clip.mp4"
    about = [
        *({"images": [each]} for each in (array, array, array.copy(), b"1", b"1", b"2")),
        {"videos": [[array]]},
        {"videos": [path]},
        {"videos": [path]},
        {},
        {},
        {"images": [array, array]},
    ]
    samples = [processor.encode(conversation("What?", **media)) for media in about]
    assert generation._by_pictures(samples) == [[0, 1], [2], [3, 4], [5], [6], [7, 8], [9], [10], [11]]


def test_several_answers_to_each(model, processor, asked):
    texts = answer(model, processor, asked, num_beams=3, num_return_sequences=3, **NEW)
    best = answer(model, processor, asked, num_beams=3, **NEW)
    assert len(texts) == 15
    assert texts[::3] == best


def test_the_papers_settings(model, processor, asked, monkeypatch):
    assert SETTINGS["demo"] == SETTINGS["owleval"]
    rows = {
        name: tuple(
            each.get(key)
            for key in (
                "max_new_tokens", "num_beams", "do_sample", "length_penalty", "no_repeat_ngram_size", "top_p", "top_k",
            )
        )
        for name, each in SETTINGS.items()
    }  # fmt: skip
    assert rows == {
        "open-vqa-image": (64, 5, False, -2, 2, None, None),
        "open-vqa-video": (128, 3, False, -1, 3, None, None),
        "owleval": (256, 3, True, 1, 3, 0.9, 3),
        "demo": (256, 3, True, 1, 3, 0.9, 3),
        "description": (128, 1, True, None, None, 0.9, 3),
    }
    seen = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **each: seen.append(each) or generate(self, **each))
    named = answer(model, processor, asked, settings="open-vqa-image", max_new_tokens=6)
    assert seen[0].items() >= {**SETTINGS["open-vqa-image"], "max_new_tokens": 6}.items()
    assert named == answer(model, processor, asked, **{**SETTINGS["open-vqa-image"], "max_new_tokens": 6})
    answer(model, processor, asked[:1])
    assert seen[2]["max_new_tokens"] == 64
    with pytest.raises(ValueError, match="settings='open-vqa' is not known; there are open-vqa-image"):
        answer(model, processor, asked, settings="open-vqa")
    assert answer(model, processor, []) == []


def test_a_question_may_be_repeated_in_its_answer(model, processor):
    """N-grams are counted in the new tokens alone."""
    sample = processor.encode(conversation("Which digit is this?", images=[picture(0)]))
    seen = []

    def watch(ids, scores):
        seen.append(ids.shape[1])
        return scores

    generate_answers(model, processor, [sample], logits_processor=[watch], **NEW)
    assert seen == list(range(len(seen)))


def test_another_attention_says_the_same(model, processor, asked):
    assert answer(plain(model), processor, asked, **NEW) == answer(model, processor, asked, **NEW)


def test_an_answer_ends_with_its_eos(model, processor, asked):
    rows = generate_answers(model, processor, asked, **NEW)
    eos = rows[0].token_ids[2]
    assert rows[0].token_ids.index(eos) == 2
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(eos)
    model.generation_config.eos_token_id = eos
    try:
        stopped = generate_answers(model, processor, asked, **NEW)
    finally:
        processor.tokenizer.eos_token = "</s>"
    assert stopped[0].token_ids == rows[0].token_ids[:3]
    assert all(eos not in each.token_ids[:-1] for each in stopped)


def test_description_first(model, processor, monkeypatch):
    described = []

    def say(model, processor, samples, **options):
        described.extend(samples)
        assert options == {"settings": "description", "top_k": 1}
        return ["A cat.", ""]

    monkeypatch.setattr(generation, "answer", say)
    one, other = picture(0), picture(1)
    dialog = [*conversation("What?", "this", images=[one]), *conversation("Why?")]
    conversations = [
        conversation("Which?", images=[one]), conversation("Hi"), dialog, conversation("Where?", images=[other]),
    ]  # fmt: skip
    found = describe_first(model, processor, conversations, top_k=1)
    assert [processor.answer_of(torch.tensor(each.token_ids)) for each in described] == [
        "User: describe the image in detail.\nBot:"
    ] * 2, "each picture once"
    image, question = conversations[0][0]["content"]
    rounds = [
        {"role": "user", "content": [image, {"type": "text", "text": "Describe the image in detail."}]},
        {"role": "assistant", "content": "A cat."},
    ]
    assert found[1::2] == conversations[1::2]
    assert found[0] == [*rounds, {"role": "user", "content": [question]}]
    assert found[2] == [*rounds, {"role": "user", "content": dialog[0]["content"][1:]}, *dialog[1:]]
    sample = processor.encode(found[0])
    text = processor.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    assert text == "User: describe the image in detail.\nBot: a cat.\nUser: which?\nBot:"
    assert sample.media[0][0] is one


def test_descriptions_are_drawn(model, processor):
    conversations = [conversation("Which?", images=[picture(0)])]
    torch.manual_seed(0)
    first = describe_first(model, processor, conversations, max_new_tokens=4)
    torch.manual_seed(0)
    assert describe_first(model, processor, conversations, max_new_tokens=4) == first
    drawn = {describe_first(model, processor, conversations, max_new_tokens=4)[0][1]["content"] for _ in range(5)}
    assert len(drawn) > 1


def test_the_first_answer_streams(model, processor, asked, capsys):
    streamer = FirstAnswerStreamer(processor)
    answers = generate_answers(model, processor, asked, streamer=streamer, **NEW)
    assert capsys.readouterr().out.strip() == answers[0].text


def test_the_first_answer_streams_word_by_word(processor, capsys):
    streamer = FirstAnswerStreamer(processor)
    streamer.put(torch.zeros(2, 0, dtype=torch.int64))  # the prompt
    shown = []
    for token in processor.tokenizer(" which digit is this", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token, 5]))
        shown.append(capsys.readouterr().out)
    streamer.end()
    shown.append(capsys.readouterr().out)
    assert "".join(shown) == "which digit is this\n"
    assert sum(map(bool, shown)) > 2


@pytest.fixture
def ask(model, processor, tmp_path, monkeypatch, capsys):
    """Runs the command on files of random pictures; returns its status, output and errors."""
    monkeypatch.setattr(cli, "_load", lambda folder: (model, processor))
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.fromarray(picture(number)).save(f"{number}.png")

    def run(*arguments):
        status = cli.main(["ask", "model", *arguments])
        return status, *capsys.readouterr()

    return run


def about(processor, item, question):
    pictures = [Image.open(each).convert("RGB") for each in item.split()]
    media = {"images": pictures} if len(pictures) == 1 else {"videos": [pictures]}
    return processor.encode(conversation(question, **media))


@pytest.mark.parametrize("options", [[], ["--beams", "3"], ["--settings", "open-vqa-image"]], ids=str)
def test_ask_many_at_once(model, processor, ask, options):
    items, questions = ["0.png", "1.png", "2.png 0.png"], ["Which digit?", "Odd or even?"]
    named = {"settings": options[1]} if "--settings" in options else {"num_beams": int(options[1])} if options else {}
    samples = [about(processor, item, question) for item in items for question in questions]
    texts = answer(model, processor, samples, **named, max_new_tokens=6)
    shown = [f"{item}: {question}\n{texts.pop(0)}" for item in items for question in questions]
    arguments = ["--max-new-tokens", "6", "0.png", "-p", "1.png", "-p", "2.png", "0.png", "-q", questions[0]]
    status, out, errors = ask(*arguments, "-q", questions[1], *options)
    assert status == 0
    assert [line.strip() for line in out.splitlines()] == [line.strip() for line in "\n".join(shown).splitlines()]
    assert errors.endswith(" tokens/s\n")
    assert errors.startswith("36 tokens in ") or "settings" in named


def test_ask_in_few_words(model, processor, ask):
    [text] = answer(model, processor, [about(processor, "0.png 1.png", "Which digit?")])
    status, out, _ = ask("0.png", "1.png", "Which digit?")
    assert (status, out.strip()) == (0, text)
    status, out, _ = ask("-p", "0.png", "1.png", "--question", "Which digit?")
    assert (status, out.strip()) == (0, text)


def test_ask_describes_first(processor, ask, monkeypatch):
    described = [{"role": "user", "content": "Hello"}]
    monkeypatch.setattr(generation, "describe_first", lambda model, processor, conversations: [described])
    seen = []
    generate = generation.generate_answers
    monkeypatch.setattr(
        generation, "generate_answers", lambda *args, **options: seen.extend(args[2]) or generate(*args, **options)
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
    draw = ["0.png", "Which?", "--settings", "demo", "--max-new-tokens", "6", "--seed"]
    assert ask(*draw, "1")[1] == ask(*draw, "1")[1]
    assert len({ask(*draw, str(seed))[1] for seed in range(5)}) > 1
    ask("0.png", "Which?", "--keep-case")
    assert not processor.lowercase


def test_ask_says_what_is_missing(ask):
    for arguments in (["0.png"], ["-q", "Which?"], [], ["-p", "0.png"]):
        status, _, errors = ask(*arguments)
        assert status == 2
        assert "say at least one picture and one question" in errors
    status, _, errors = ask("0.png", "Which?", "--settings", "best")
    assert (status, "settings='best' is not known" in errors) == (2, True)
