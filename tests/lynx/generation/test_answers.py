"""Answers to questions about images: the same whatever else shares a root or the batch."""

import pytest
import torch

from lynx.generation import answers as answers_module
from lynx.generation.answers import GENERATION_PRESETS, answer, describe_first, generate_answers
from tests.lynx.conftest import QUESTIONS, conversation, make_image
from tests.lynx.searches import NEW, SEARCHES, plain
from tests.numbers import assert_within_budget


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_answers_depend_on_nothing_else(model, processor, asked, search):
    """Alone, in any order, in batches of any size, with or without others about the same image: the same tokens."""
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


def test_scores_depend_on_nothing_else(model, processor):
    """Log-probabilities of a row in a batch and alone: both within the budget of plain PyTorch's."""
    texts, images = [*QUESTIONS, "Hello"], [make_image(0), make_image(1), make_image(2), None]
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


def test_several_questions_read_their_image_once(model, processor, asked, reads):
    encoded = []
    model.vision_tower.register_forward_pre_hook(lambda *args, **kwargs: encoded.append(1))
    resampled = []
    model.resampler.register_forward_hook(lambda module, args, out: resampled.append(len(out)))
    generate_answers(model, processor, asked, num_beams=2, max_new_tokens=2)
    assert resampled == [2 * processor.num_latents], "one image, one video"
    texts = [each.token_ids for each in asked]
    same = next(i for i, tokens in enumerate(zip(*(texts[i] for i in (0, 2, 4)), strict=False)) if len(set(tokens)) > 1)
    assert same > 1, "BOS and more"
    assert reads[0] == (1, 2 * processor.num_latents + sum(map(len, texts)) - 2 * same)
    assert reads[1] == (10, 1)


def test_media_are_the_same_object_or_path(processor, tmp_path):
    array, path = make_image(0), tmp_path / "clip.mp4"
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
    assert answers_module._by_media(samples) == [[0, 1], [2], [3, 4], [5], [6], [7, 8], [9], [10], [11]]


def test_several_answers_to_each(model, processor, asked):
    texts = answer(model, processor, asked, num_beams=3, num_return_sequences=3, **NEW)
    best = answer(model, processor, asked, num_beams=3, **NEW)
    assert len(texts) == 15
    assert texts[::3] == best


def test_the_papers_settings(model, processor, asked, monkeypatch):
    assert GENERATION_PRESETS["demo"] == GENERATION_PRESETS["owleval"]
    rows = {
        name: tuple(
            each.get(key)
            for key in (
                "max_new_tokens", "num_beams", "do_sample", "length_penalty", "no_repeat_ngram_size", "top_p", "top_k",
            )
        )
        for name, each in GENERATION_PRESETS.items()
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
    named = answer(model, processor, asked, preset="open-vqa-image", max_new_tokens=6)
    assert seen[0].items() >= {**GENERATION_PRESETS["open-vqa-image"], "max_new_tokens": 6}.items()
    assert named == answer(model, processor, asked, **{**GENERATION_PRESETS["open-vqa-image"], "max_new_tokens": 6})
    answer(model, processor, asked[:1])
    assert seen[2]["max_new_tokens"] == 64
    with pytest.raises(ValueError, match="preset='open-vqa' is not known; there are open-vqa-image"):
        answer(model, processor, asked, preset="open-vqa")
    assert answer(model, processor, []) == []


def test_a_question_may_be_repeated_in_its_answer(model, processor):
    """N-grams are counted in the new tokens alone."""
    sample = processor.encode(conversation("Which digit is this?", images=[make_image(0)]))
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
    said = rows[0].token_ids
    end = next(i for i in range(1, len(said)) if said[i] not in said[:i])
    eos = said[end]
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(eos)
    model.generation_config.eos_token_id = eos
    try:
        stopped = generate_answers(model, processor, asked, **NEW)
    finally:
        processor.tokenizer.eos_token = "</s>"
    assert stopped[0].token_ids == said[: end + 1]
    assert all(eos not in each.token_ids[:-1] for each in stopped)


def test_description_first(model, processor, monkeypatch):
    described = []

    def say(model, processor, samples, **options):
        described.extend(samples)
        assert options == {"preset": "description", "top_k": 1}
        return ["A cat.", ""]

    monkeypatch.setattr(answers_module, "answer", say)
    one, other = make_image(0), make_image(1)
    dialog = [*conversation("What?", "this", images=[one]), *conversation("Why?")]
    conversations = [
        conversation("Which?", images=[one]), conversation("Hi"), dialog, conversation("Where?", images=[other]),
    ]  # fmt: skip
    found = describe_first(model, processor, conversations, top_k=1)
    assert [processor.answer_of(torch.tensor(each.token_ids)) for each in described] == [
        "User: describe the image in detail.\nBot:"
    ] * 2, "each image once"
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
    conversations = [conversation("Which?", images=[make_image(0)])]
    torch.manual_seed(0)
    first = describe_first(model, processor, conversations, max_new_tokens=4)
    torch.manual_seed(0)
    assert describe_first(model, processor, conversations, max_new_tokens=4) == first
    drawn = {describe_first(model, processor, conversations, max_new_tokens=4)[0][1]["content"] for _ in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_lengths_that_count_the_question_are_refused(model, processor, asked, name):
    with pytest.raises(ValueError, match=f"{name} counts the tokens of a question too; pass {name[:3]}_new_tokens"):
        generate_answers(model, processor, asked, **{name: 5})
