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


def test_a_dialog_that_forks(model, processor):
    """Answers to one question, and dialogs that go on from one of them, are as good as each dialog alone."""
    model = model.double()
    question = _showing(make_image(2), [{"role": "user", "content": [{"type": "text", "text": "Which digit?"}]}])
    short = {"role": "assistant", "content": "two"}
    long = {"role": "assistant", "content": "it is a two, I think"}
    then, so = conversation("Odd?", "no"), conversation("Prime?", "yes, it is")
    tree = processor.encode_branches([question, [short], [long], then, so], [-1, 0, 0, 2, 2])
    packed = processor.pack([tree])
    separate = [processor.encode([*question, *rest]) for rest in ([short], [long, *then], [long, *so])]
    rows = processor.pack(separate)
    # What the last two dialogs share is learnt once.
    known = separate[2].labels.index(-100, separate[2].labels.index(separate[2].labels[-1]) + 1)
    start = rows["labels"].shape[1] - len(separate[2].labels)
    rows["labels"][0, start : start + known] = -100
    assert (packed["labels"] != -100).sum() == (rows["labels"] != -100).sum()
    alone = [(processor.pack([each])["labels"] != -100).sum() for each in separate]
    assert packed["labels"].shape[1] < rows["labels"].shape[1]
    assert alone[0] < packed["max_supervised"] == int((packed["labels"] != -100).sum())
    losses, gradients = [], []
    for batch in (packed, rows):
        model.zero_grad()
        losses.append(model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss)
        losses[-1].backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for name, gradient in gradients[1].items():
        atol = 1e-5 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=atol, msg=name)


def test_the_first_token_of_an_answer_that_starts_a_branch_is_learnt(model, processor):
    question = [{"role": "user", "content": "What?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    sample = processor.encode_branches([question, *answers], [-1, 0, 0])
    batch = processor.pack([sample])
    first = sum(sample.branch_lengths[:2])  # the first token of the second answer
    assert batch["labels"][0, first] != -100
    loss = model(**batch).loss
    batch["labels"][0, first] = -100
    assert not torch.equal(model(**batch).loss, loss)
    assert batch["labels"][0, 0] == -100, "BOS is never learnt"


def test_weighed_answers(model, processor):
    """The loss is the mean over tokens, one of n of an answer weighing 1 / sqrt(n), vision tokens nothing."""
    media = make_image(1)
    together = processor.encode_branches(
        [_showing(media, conversation("Odd?", "yes")), conversation("How?", "by its last digit")]
    )
    other = processor.encode(conversation("Hello", "hi"))
    batch = processor.pack([together, other], weighs_answers=True)
    labels, weights = batch["labels"][0], batch["label_weights"][0]
    ends = [sum(together.branch_lengths[: i + 1]) + processor.num_latents for i in range(2)] + [len(labels)]
    for start, end in zip([processor.num_latents, *ends], ends, strict=False):
        count = int((labels[start:end] != -100).sum())
        assert torch.allclose(weights[start:end], torch.tensor(count**-0.5)), "of each answer's own tokens"
    assert weights[: processor.num_latents].eq(0).all()
    plain = {name: each for name, each in batch.items() if name != "label_weights"}
    losses = []
    for token in (labels != -100).nonzero().flatten():
        only = torch.full_like(batch["labels"], -100)
        only[0, token] = labels[token]
        losses.append(model(**{**plain, "labels": only}).loss * weights[token])
    expected = torch.stack(losses).sum() / weights[labels != -100].sum()
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=2).loss, torch.stack(losses).sum() / 2, rtol=1e-6, atol=0
    )


def _showing(media, messages):
    (question, *rest) = messages
    return [{**question, "content": [{"type": "image", "image": media}, *question["content"]]}, *rest]


def test_branches_that_cannot_be(processor):
    with_media = _showing(make_image(0), conversation("Odd?", "yes"))
    with pytest.raises(ValueError, match="only the first conversation may have media"):
        processor.encode_branches([conversation("Even?", "no"), with_media])
    with pytest.raises(ValueError, match="no conversations"):
        processor.encode_branches([])
    with pytest.raises(ValueError, match="message 2 has role 'assistant', expected 'user'"):
        processor.encode_branches([with_media, [{"role": "assistant", "content": "so"}]], [-1, 0])
    with pytest.raises(ValueError, match="conversation 1 has parent 1, expected an earlier one"):
        processor.encode_branches([with_media, conversation("Even?", "no")], [-1, 1])
    with pytest.raises(ValueError, match="2 conversations but 1 parents"):
        processor.encode_branches([with_media, conversation("Even?", "no")], [-1])
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
