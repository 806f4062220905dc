"""Conversations to token rows and batches, and every refusal on the way."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lynx import LynxProcessor
from lynx.media.images import ImageError
from lynx.media.videos import load_video
from tests.lynx.clips import frame, numbers, write_clip
from tests.lynx.conftest import VISION, conversation, make_config, make_image


def text_of(processor, token_ids):
    return processor.tokenizer.decode(token_ids)


def test_a_row_is_bos_prompt_answer_eos(processor):
    sample = processor.encode(conversation("Which Digit?", "Seven", images=[make_image(0)]))
    assert text_of(processor, sample.token_ids) == "<s>User: which digit?\nBot: seven</s>"
    learned = [label for label in sample.labels if label != -100]
    assert text_of(processor, learned) == " seven</s>"
    supervised = [label != -100 for label in sample.labels]
    assert supervised == sorted(supervised), "everything after the first answer token is supervised"


def test_every_round_of_a_dialog_is_supervised(processor):
    messages = [
        *conversation("One?", "yes", images=[make_image(0)]),
        *conversation("Two?", "no", videos=[[make_image(1)]]),
    ]
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


def test_what_looks_like_a_special_token_is_text(processor):
    question, answer = "say </s> and <s> <pad> <image>", "x </s> y"
    sample = processor.encode(conversation(question, answer))
    special = set(processor.tokenizer.all_special_ids) | {processor.image_token_id}
    assert [token for token in sample.token_ids if token in special] == [
        processor.tokenizer.bos_token_id,
        processor.tokenizer.eos_token_id,
    ]
    assert question in text_of(processor, sample.token_ids)
    assert answer in text_of(processor, sample.token_ids)


def test_an_image_token_that_text_could_say_is_refused(tokenizer):
    with pytest.raises(ValueError, match="image_token_id is 5, one of the tokenizer"):
        LynxProcessor.for_model(make_config(tokenizer, image_token_id=5), tokenizer)


def test_towers_get_the_pixels_they_were_trained_on(tokenizer):
    processors = {
        name: LynxProcessor.for_model(make_config(tokenizer, name), tokenizer).image_processor for name in VISION
    }
    theirs = {
        "blip_2_vision_model": BlipImageProcessorPil(),
        "clip_vision_model": CLIPImageProcessorPil(),
        "siglip": SiglipImageProcessorPil(),
    }
    for name, each in processors.items():
        assert each.image_mean == list(theirs[name].image_mean)
        assert each.image_std == list(theirs[name].image_std)
    assert processors["siglip"].resize == "exact"
    options = {"image_mean": [0.1] * 3}
    assert (
        LynxProcessor.for_model(make_config(tokenizer), tokenizer, image_options=options).image_processor.image_mean[0]
        == 0.1
    )


def test_pack(processor, samples):
    batch = processor.pack(samples)
    prefixes = [3, 0, 3, 6, 3]
    lengths = [prefix + len(sample.token_ids) for prefix, sample in zip(prefixes, samples, strict=True)]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    assert batch["max_supervised"] == (batch["labels"] != -100).sum()
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
    assert batch["max_supervised"] == packed["max_supervised"]
    assert real[:, -1].all(), "padded on the left"


def test_random_crops_follow_the_generator(processor, samples):
    def pixels(generator):
        return processor.pack(samples, generator=generator)["pixel_values"]

    assert torch.equal(pixels(np.random.default_rng(1)), pixels(np.random.default_rng(1)))
    assert not torch.equal(pixels(np.random.default_rng(1)), pixels(None))


def test_a_video_has_one_crop(processor):
    """Frames of one size are cut alike, or a video would jump; another item, even of that size, is cut by itself."""
    frame, other = make_image(0, 60, 60), make_image(0, 60, 50)
    videos = [[frame, other, frame, frame], [frame, frame]]
    sample = processor.encode(conversation("What happens?", "this", videos=videos))
    pixels = processor.pack([sample], generator=np.random.default_rng(0))["pixel_values"]
    first, odd, *rest = pixels.view(6, -1)
    assert torch.equal(first, rest[0])
    assert torch.equal(first, rest[1])
    assert torch.equal(rest[2], rest[3])
    assert not torch.equal(first, rest[2])
    assert not torch.equal(first, odd)


def test_call_is_for_questions(processor):
    one = processor(text="What?", images=make_image(0))
    many = processor(text=["What?"], images=[make_image(0)])
    assert torch.equal(one["input_ids"], many["input_ids"])
    assert "labels" not in one
    assert "max_supervised" not in one
    video = [make_image(0), make_image(1)]
    for videos in (video, [video]):
        assert processor(text="What?", videos=videos)["frame_positions"].tolist() == [0, 1]
    usual = processor(text=["What?"], images=[make_image(0)], padding=True, return_tensors="pt")
    assert torch.equal(usual["input_ids"], one["input_ids"])
    both = processor(text=["What?", "Which?"], images=[None, [make_image(0), make_image(1)]], videos=[video, None])
    assert both["frame_positions"].tolist() == [0, 1, -1, -1]


ASKED = {"tokenize": True, "return_dict": True}


def test_chats_as_transformers_has_them(model, processor, tmp_path):
    """Alone, in a list, with the image by its path, after an earlier round; and through a pipeline."""
    Image.fromarray(make_image(0)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    asked = {**ASKED, "add_generation_prompt": True, "return_tensors": "pt"}
    for part in ({"image": make_image(0)}, {"path": path}, {"url": path}, {"base64": encoded(make_image(0))}):
        messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}]
        batch = processor.apply_chat_template(messages, **asked)
        expected = processor(text="What?", images=make_image(0))
        assert sorted(batch) == sorted(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "pixel_values"))
    dialog = [*conversation("Hello", "yes"), *conversation("What?")]
    both = processor.apply_chat_template([messages, dialog], **asked, padding=True)
    expected = processor.pad([processor.encode(each) for each in (messages_of(path), dialog)])
    assert torch.equal(both["input_ids"], expected["input_ids"])
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    [answer] = ask(text=messages_of(path), max_new_tokens=3, return_full_text=False)
    [plain] = ask(text="What?", images=path, max_new_tokens=3, return_full_text=False)
    assert answer["generated_text"] == plain["generated_text"]
    assert len(ask(text=["What?", "Why is that so?"], images=[path, path], max_new_tokens=3)) == 2


def messages_of(path):
    return conversation("What?", images=[path])


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "pass tokenize=True, return_dict=True"),
        ({"tokenize": True, "return_dict": True, "continue_final_message": True}, ValueError, "end with a question"),
        ({"tokenize": True, "return_dict": True, "tools": []}, TypeError, "unexpected arguments {'tools'"),
        (
            {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": False}},
            TypeError,
            "'padding': False",
        ),
    ],
)
def test_chats_of_another_kind_are_refused(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(conversation("What?"), **options)
    with pytest.raises(ValueError, match="end with a question"):
        processor.apply_chat_template(conversation("What?", "that"), **ASKED)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        (conversation(""), "message 0 .user. has an empty text"),
        (conversation("  \n", images=[make_image(0)]), "empty text"),
        (conversation("What?", " "), "message 1 .assistant. has an empty text"),
        ([{"role": "assistant", "content": "hi"}], "role 'assistant', expected 'user'"),
        ([{"content": "hi"}], "role None"),
        ([{"role": "user", "content": 7}], "content of type int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "not a text, image or video"),
        (conversation("What?", videos=[[]]), "0 frames, expected 1 to 4"),
        (conversation("What?", videos=[[make_image(0)] * 5]), "5 frames, expected 1 to 4"),
        (conversation("What?", videos=[7]), "a video must be a list of frames or a file, got int"),
        ("hi", "message 0 is a str"),
        (conversation("\udcff"), "not valid Unicode"),
    ],
)
def test_bad_conversations_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.encode(messages)


def test_bad_calls_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=make_image(0))
    with pytest.raises(ValueError, match="images must be a list with one entry"):
        processor(text=["a", "b"], images=[make_image(0)])
    with pytest.raises(ValueError, match="images must be a list with one entry"):
        processor(text=["x", "y"], images="ab")
    with pytest.raises(ValueError, match="text must be a question or a list of questions, got 5"):
        processor(text=5)
    with pytest.raises(ValueError, match="at least one sample"):
        processor(text=[])
    for wrong in ({"audio": 1}, {"return_tensors": "np"}, {"padding": "max_length"}, {"padding": False}):
        with pytest.raises(TypeError, match=rf"unexpected arguments \{{'{next(iter(wrong))}'"):
            processor(text="a", **wrong)
    with pytest.raises(ImageError, match=r"nothing\.png: no such file"):
        processor(text="a", images=str(tmp_path / "nothing.png"))


def test_a_tokenizer_without_special_tokens_is_refused(config, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no bos_token"):
        LynxProcessor.for_model(config, bare)


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", [frame(i) for i in range(41)])


def test_a_video_file_gives_max_frames_frames(processor, clip):
    frames = load_video(clip, 4)
    expected = processor(text="What?", videos=[frames])["pixel_values"]
    for videos in (clip, str(clip), [str(clip)], clip.read_bytes()):
        batch = processor(text="What?", videos=videos)
        assert batch["frame_positions"].tolist() == [0, 1, 2, 3]
        assert torch.equal(batch["pixel_values"], expected)
    two = processor(text="What?", videos=[str(clip), str(clip)])
    assert two["frame_positions"].tolist() == [0, 1, 2, 3] * 2
    processor.image_processor.max_image_pixels = 100
    with pytest.raises(ImageError, match=r"clip\.mp4: 64 x 48 pixels are more than the limit of 100"):
        processor(text="What?", videos=clip)


def test_training_draws_the_frames_of_a_video_file(processor, clip):
    sample = processor.encode(conversation("What?", "this", videos=[str(clip)]))
    generators = [None, *(np.random.default_rng(seed) for seed in (1, 2, 1))]
    drawn = [processor.load_frames(sample.media[0], generator=generator) for generator in generators]
    assert numbers(drawn[0]) == [5, 15, 25, 35]
    assert numbers(drawn[1]) == numbers(drawn[3])
    assert len({tuple(numbers(each)) for each in drawn}) == 3
    packed = processor.pack([sample], generator=np.random.default_rng(1))["pixel_values"]
    generator = np.random.default_rng(1)
    frames = processor.load_frames(str(clip), generator=generator)
    by_hand = processor.pack([processor.encode(conversation("What?", videos=[frames]))], generator=generator)
    assert torch.equal(packed, by_hand["pixel_values"])
