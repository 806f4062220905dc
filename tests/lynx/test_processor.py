"""Conversations to token rows and batches, and every refusal on the way."""

import numpy as np
import pytest
import torch

from lynx import LynxProcessor
from lynx.images import ImageError
from tests.lynx.conftest import conversation, picture


def text_of(processor, token_ids):
    return processor.tokenizer.decode(token_ids)


def test_a_row_is_bos_prompt_answer_eos(processor):
    sample = processor.encode(conversation("Which Digit?", "Seven", images=[picture(0)]))
    assert text_of(processor, sample.token_ids) == "<s>User: which digit?\nBot: seven</s>"
    learned = [label for label in sample.labels if label != -100]
    assert text_of(processor, learned) == " seven</s>"
    supervised = [label != -100 for label in sample.labels]
    assert supervised == sorted(supervised), "everything after the first answer token is supervised"


def test_every_round_of_a_dialog_is_supervised(processor):
    messages = [*conversation("One?", "yes", images=[picture(0)]), *conversation("Two?", "no", videos=[[picture(1)]])]
    sample = processor.encode(messages)
    assert text_of(processor, sample.token_ids) == "<s>User: one?\nBot: yes</s>\nUser: two?\nBot: no</s>"
    assert text_of(processor, [label for label in sample.labels if label != -100]) == " yes</s> no</s>"
    assert sample.is_video == [False, True]


def test_a_question_ends_where_the_answer_begins(processor):
    messages = conversation("Which digit is this?", "7")
    question, whole = processor.encode(messages[:1]), processor.encode(messages)
    assert whole.token_ids[: len(question.token_ids)] == question.token_ids
    assert set(question.labels) == {-100}


def test_case_is_kept_when_asked(config, tokenizer):
    processor = LynxProcessor.for_model(config, tokenizer, lowercase=False)
    assert "Which Digit?" in text_of(processor, processor.encode(conversation("Which Digit?")).token_ids)


def test_no_text_becomes_a_picture_token(processor):
    sample = processor.encode(conversation(f"<image> {chr(0xFFFF)} <|image|> {processor.image_token_id}"))
    assert processor.image_token_id not in sample.token_ids


def test_pack(processor, samples):
    batch = processor.pack(samples)
    prefixes = [3, 0, 3, 6, 3]
    lengths = [prefix + len(sample.token_ids) for prefix, sample in zip(prefixes, samples, strict=True)]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    rows = batch["input_ids"][0].split(lengths)
    for row, prefix, sample in zip(rows, prefixes, samples, strict=True):
        assert row.tolist() == [processor.image_token_id] * prefix + sample.token_ids
    assert batch["layout"].position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert batch["frame_positions"].tolist() == [-1, 0, 1, 2, -1, 0, 1, -1]
    assert batch["pixel_values"].shape == (8 * 4, 3 * 4 * 4)
    assert batch["media_layout"].segments.tolist() == [
        [0, 0, 5], [3, 5, 20], [6, 20, 25], [9, 25, 35], [12, 35, 40], [15, 40, 40],
    ]  # fmt: skip


def test_pad(processor, samples):
    batch = processor.pad(samples)
    packed = processor.pack(samples)
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][real], packed["input_ids"][0])
    assert torch.equal(batch["labels"][real], packed["labels"][0])
    assert (batch["input_ids"][~real] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][~real] == -100).all()
    assert real[:, -1].all(), "padded on the left"


def test_random_crops_follow_the_generator(processor, samples):
    def pixels(generator):
        return processor.pack(samples, generator=generator)["pixel_values"]

    assert torch.equal(pixels(np.random.default_rng(1)), pixels(np.random.default_rng(1)))
    assert not torch.equal(pixels(np.random.default_rng(1)), pixels(None))


def test_call_is_for_questions(processor):
    one = processor(text="What?", images=picture(0))
    many = processor(text=["What?"], images=[picture(0)])
    assert torch.equal(one["input_ids"], many["input_ids"])
    assert "labels" not in one
    video = [picture(0), picture(1)]
    for videos in (video, [video]):
        assert processor(text="What?", videos=videos)["frame_positions"].tolist() == [0, 1]
    both = processor(text=["What?", "Which?"], images=[None, [picture(0), picture(1)]], videos=[video, None])
    assert both["frame_positions"].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        (conversation(""), "message 0 .user. has an empty text"),
        (conversation("  \n", images=[picture(0)]), "empty text"),
        (conversation("What?", " "), "message 1 .assistant. has an empty text"),
        ([{"role": "assistant", "content": "hi"}], "role 'assistant', expected 'user'"),
        ([{"content": "hi"}], "role None"),
        ([{"role": "user", "content": 7}], "content of type int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "no text, image or video"),
        (conversation("What?", videos=[[]]), "0 frames, expected 1 to 4"),
        (conversation("What?", videos=[[picture(0)] * 5]), "5 frames, expected 1 to 4"),
        (conversation("What?", videos=["film.mp4"]), "a video is a list of frames, got str"),
    ],
)
def test_bad_conversations_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.encode(messages)


def test_bad_calls_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=picture(0))
    with pytest.raises(ValueError, match="images must be a list with one entry"):
        processor(text=["a", "b"], images=[picture(0)])
    with pytest.raises(TypeError, match=r"unexpected arguments \['audio'\]"):
        processor(text="a", audio=1)
    with pytest.raises(ImageError, match=r"nothing\.png: no such file"):
        processor(text="a", images=str(tmp_path / "nothing.png"))


def test_a_tokenizer_without_special_tokens_is_refused(config, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no bos_token"):
        LynxProcessor.for_model(config, bare)
