"""What stands in a batch: packs without samples or images, several questions about one image, crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lynx.data.collator import Collator
from lynx.data.skipped import Skipped
from lynx_kernels import PackedLayout
from tests.lynx.batches import assert_same
from tests.lynx.conftest import conversation, make_image


def test_a_pack_without_samples_is_a_step_without_loss(processor, model):
    collator = Collator(processor, 60, always_vision=True)
    skipped = Skipped("a", 0, "", "why")
    for items in ([], [skipped]):
        batch = collator(items)
        report = batch.pop("report")
        assert (report.tokens, report.samples.total(), report.budget, report.skipped) == (0, 0, 60, items)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss == 0
        missing = [name for name, each in model.named_parameters() if each.grad is None]
        assert missing == [], "every parameter takes part in the reduction of gradients"
        assert all((each.grad == 0).all() for each in model.parameters())


def test_an_unseen_image_changes_nothing(processor, model):
    samples = [processor.encode(conversation("Hello", "yes, hello")), processor.encode(conversation("2?", "two"))]
    plain, seen = processor.pack(samples), processor.pack(samples, always_vision=True)
    assert "pixel_values" not in plain
    assert torch.equal(plain["input_ids"], seen["input_ids"])
    losses, gradients = [], []
    for batch in (plain, seen):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    assert torch.equal(*losses)
    for name, gradient in gradients[1].items():
        assert gradient is not None, name
        without = gradients[0][name]
        assert torch.equal(gradient, without) if without is not None else (gradient == 0).all()
    assert any(each is None for each in gradients[0].values())
    with_image = [processor.encode(conversation("What?", "this", images=[make_image(0)]))]
    assert_same(processor.pack(with_image), processor.pack(with_image, always_vision=True))


def test_branches_on_one_root_equal_separate_rows(processor, model):
    """Loss and gradients, in fp64, of one image with three questions, between other samples."""
    model = model.double()
    rounds = [conversation("Odd?", "yes"), [*conversation("Even?", "no"), *conversation("Sure?", "yes, i am")]]
    rounds.append(conversation("Which digit is this?", "seven"))
    media = make_image(3)
    before, after = (
        processor.encode(conversation("Hello", "hi")),
        processor.encode(conversation("What?", "this", images=[make_image(5)])),
    )
    together = processor.encode_branches([_showing(media, rounds[0]), *rounds[1:]])
    separate = [processor.encode(_showing(media, each)) for each in rounds]
    packed = processor.pack([before, together, after])
    rows = processor.pack([before, *separate, after])
    assert packed["input_ids"].numel() == rows["input_ids"].numel() - 2 * processor.num_latents
    assert packed["pixel_values"].shape[0] == rows["pixel_values"].shape[0] - 2 * 4
    assert isinstance(packed["layout"], PackedLayout)
    assert (packed["labels"] != -100).sum() == (rows["labels"] != -100).sum()
    losses, gradients = [], []
    for batch in (packed, rows):
        model.zero_grad()
        losses.append(model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss)
        losses[-1].backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for name, gradient in gradients[1].items():  # the decoder's norms compute in fp32 whatever they get
        atol = 1e-5 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=atol, msg=name)


def _showing(media, messages):
    (question, *rest) = messages
    return [{**question, "content": [{"type": "image", "image": media}, *question["content"]]}, *rest]


def test_branches_that_cannot_be(processor):
    with_media = _showing(make_image(0), conversation("Odd?", "yes"))
    with pytest.raises(ValueError, match="only the first conversation may have media"):
        processor.encode_branches([conversation("Even?", "no"), with_media])
    with pytest.raises(ValueError, match="no conversations"):
        processor.encode_branches([])
    several = processor.encode_branches([with_media, conversation("Even?", "no")])
    with pytest.raises(ValueError, match="several branches cannot be padded"):
        processor.pad([several])
    alone = processor.encode_branches([with_media])
    assert alone.branch_lengths == ()


def test_generators_are_for_all_samples_or_none(processor):
    samples = [processor.encode(conversation("What?", "this", images=[make_image(n)])) for n in range(2)]
    generators = [np.random.default_rng(n) for n in range(2)]
    both = processor.pack(samples, generator=generators)["pixel_values"]
    alone = processor.pack(samples[1:], generator=np.random.default_rng(1))["pixel_values"]
    assert torch.equal(both[4:], alone), "a sample's crop is its own generator's"
    with pytest.raises(ValueError, match="only some samples have a generator"):
        processor.pack(samples, generator=[generators[0], None])
    text = replace(samples[0], media=[], is_video=[])
    processor.pack([text, samples[1]], generator=[None, generators[1]])
