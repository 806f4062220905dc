"""Prefixes of every kind: each bridge, causal and full roots, packed against padded, and what is refused."""

import pytest
import torch

from lynx import LynxProcessor
from lynx.media import tower
from lynx_kernels import SpanLayout
from tests.lynx.clips import frame, write_clip
from tests.lynx.conftest import conversation, make_config, make_image, make_model

BRIDGES = ["resampler", "mlp", "linear"]


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def build(tokenizer, **options):
    config = make_config(tokenizer, **options)
    return make_model(config), LynxProcessor.for_model(config, tokenizer)


def two_images(processor, second=1):
    return processor.encode(conversation("Same?", "no", images=[make_image(0), make_image(second)]))


def some_samples(processor):
    return [
        two_images(processor),
        processor.encode(conversation("Hello", "yes")),
        processor.encode(conversation("Which digits?", "1 2", videos=[[make_image(2), make_image(3)]])),
    ]


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_and_padded_give_the_same(tokenizer, bridge, is_causal):
    model, processor = build(tokenizer, bridge=bridge, prefix_is_causal=is_causal)
    samples = some_samples(processor)
    packed, padded = processor.pack(samples), processor.pad(samples)
    prefixes = [6, 0, 3] if bridge == "resampler" else [2 * 5, 0, 2 * 5]
    assert [(row == processor.image_token_id).sum() for row in padded["input_ids"]] == prefixes
    assert packed["layout"].has_full is not is_causal
    packed_logits = model(**inputs(packed)).logits[0]
    padded_logits = model(**inputs(padded)).logits[padded["attention_mask"].bool()]
    assert packed_logits.abs().max() > 0.1
    torch.testing.assert_close(packed_logits, padded_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_what_two_images_of_a_row_see(tokenizer, is_causal):
    """The second image reaches the first one's tokens where the prefix is full, its own and the text always."""
    model, processor = build(tokenizer, prefix_is_causal=is_causal)
    logits = []
    for second in (1, 9):
        batch = processor.pack([two_images(processor, second), some_samples(processor)[2]])
        logits.append(model(**inputs(batch)).logits[0])
    length = len(two_images(processor).token_ids) + 6
    changed = (logits[0] != logits[1]).any(1)
    assert changed[:3].all() == changed[:3].any() == (not is_causal)
    assert changed[3:length].all()
    assert not changed[length:].any()


@pytest.mark.parametrize("bridge", BRIDGES)
def test_every_parameter_learns(tokenizer, bridge):
    model, processor = build(tokenizer, bridge=bridge, prefix_is_causal=False)
    model(**processor.pack(some_samples(processor))).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("bridge", ["resampler", "linear"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_with_a_full_prefix(tokenizer, bridge, options):
    """Greedy tokens are the argmax of forward; with beams, of the beams without a cache."""
    model, processor = build(tokenizer, bridge=bridge, prefix_is_causal=False)
    questions = [
        processor.encode(conversation("Same?", images=[make_image(0), make_image(1)])),
        processor.encode(conversation("Hello, is this a longer question?")),
    ]
    batch = inputs(processor.pad(questions))
    tokens = model.generate(**batch, max_new_tokens=4, eos_token_id=-1, **options)
    if "num_beams" in options:
        again = model.generate(**batch, max_new_tokens=4, eos_token_id=-1, use_cache=False, **options)
        assert torch.equal(tokens, again)
        return
    prompt = batch["input_ids"].shape[1]
    for step in range(4):
        ids = tokens[:, : prompt + step]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, step, dtype=torch.int64)], 1)
        with torch.no_grad():
            logits = model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, prompt + step])


def test_a_full_prefix_without_a_mask(tokenizer):
    model, processor = build(tokenizer, prefix_is_causal=False)
    batch = inputs(processor.pad([two_images(processor)]))
    expected = model(**batch).logits
    del batch["attention_mask"]
    torch.testing.assert_close(model(**batch).logits, expected)
    vision_tokens = model.encode_media(batch["pixel_values"])
    embeds = model.embed(batch["input_ids"], vision_tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds, prefix_lengths=torch.tensor([6])).logits, expected)
    with pytest.raises(ValueError, match="pass prefix_lengths with inputs_embeds"):
        model(inputs_embeds=embeds)
    moved = {**batch, "input_ids": batch["input_ids"].roll(1, 1)}
    with pytest.raises(ValueError, match="image tokens of a row must be its first tokens"):
        model(**moved)
    with pytest.raises(ValueError, match="image tokens of a row must be its first tokens"):
        model.generate(**moved, max_new_tokens=2)


def test_another_attention_refuses_full_prefixes(tokenizer):
    config = make_config(tokenizer, prefix_is_causal=False)
    config.text_config._attn_implementation = "sdpa"
    processor = LynxProcessor.for_model(config, tokenizer)
    with pytest.raises(ValueError, match=r"prefix_is_causal=False needs attn_implementation='lynx'.*'sdpa'"):
        make_model(config)(**inputs(processor.pad([two_images(processor)])))


@pytest.mark.parametrize("bridge", BRIDGES)
def test_an_image_of_which_no_token_is_made(tokenizer, bridge):
    """A batch of text that runs the vision graph for its gradients' sake: a layout of no queries."""
    model, processor = build(tokenizer, bridge=bridge)
    batch = processor.pack([processor.encode(conversation("Hello", "yes"))])
    unseen = {
        "pixel_values": processor.pack([two_images(processor)])["pixel_values"],
        "media_layout": SpanLayout.from_spans([0], [(0, 10)], 10),
    }
    loss = model(**batch, **unseen).loss
    assert torch.equal(loss, model(**batch).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.vision_tower.parameters())


def test_a_layout_of_another_kind_is_refused(tokenizer):
    model, _ = build(tokenizer, prefix_is_causal=False)
    _, causal = build(tokenizer)
    with pytest.raises(
        ValueError, match="the layout has no full segment, but vision tokens, and the model prefix_is_causal=False"
    ):
        model(**causal.pack([two_images(causal)]))


def test_a_video_file_has_as_many_tokens_as_its_frames(tokenizer, tmp_path):
    model, processor = build(tokenizer, bridge="linear")
    clip = write_clip(tmp_path / "clip.mp4", [frame(i) for i in range(9)])
    batch = processor(text="What?", videos=str(clip))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * tower.tokens_per_frame(
        model.config.vision_config
    )
    assert "media_layout" not in batch
    assert model(**batch).logits.isfinite().all()
