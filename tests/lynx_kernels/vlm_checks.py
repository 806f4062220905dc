"""What is tried on each family of vision-language models: that ``apply`` changes nothing but who computes.

A check compares a tiny random model with itself before ``apply``, and raises where they differ.
"""

import contextlib
import traceback
from dataclasses import dataclass

import peft
import torch
import transformers as hf

from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from tests.lynx_kernels import vlms

GENERATION = {"max_new_tokens": 5, "do_sample": False}


def padded(family):
    """Rows with two images, one and none, padded on each side: logits and gradients. Then undone, bit for bit."""
    model = vlms.build(family)
    keys, had = list(model.state_dict()), [vars(each).get("config") for each in model.modules()]
    batches = [family.batch("left"), family.batch("right")]
    batches += [family.batch(rows=(number,)) for number, row in enumerate(family.rows()) if not row.images]
    for inputs in batches:
        before = vlms.run(model, inputs)
        with apply(model):
            vlms.assert_close(vlms.run(model, inputs), before, family.tolerance)
        after = vlms.run(model, inputs)
        assert torch.equal(after.logits, before.logits)
        assert all(torch.equal(after.gradients[name], each) for name, each in before.gradients.items())
    assert list(model.state_dict()) == keys
    assert all(vars(each).get("config") is config for each, config in zip(model.modules(), had, strict=True))


def losses(family):
    """In ``train()``, from a batch with labels, and without logits."""
    model = vlms.build(family).train()
    before = vlms.run(model, labelled(family.batch()))
    with apply(model) as patch:
        ours = vlms.run(model, labelled(family.batch()))
        assert (ours.logits is None) == (patch.parts()[-1].runs == "lynx")
    vlms.assert_close(ours, before, family.tolerance)


def packed(family):
    """All rows in one, by ``PackedCollator``: the logits and the loss of each alone, and the gradients of the loss.

    Also with layers that run once more in the backward pass.
    """
    samples, model = samples_of(family), vlms.build(family).train()
    batch = PackedCollator(model)(samples)
    assert batch["input_ids"].shape == (1, sum(each["input_ids"].shape[1] for each in samples))
    expected = alone(model, samples)
    with apply(model):
        ours = vlms.run(model, batch)
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        twice = vlms.run(model, batch)
        model.eval()
        with torch.no_grad():
            out = model(**batch, use_cache=False)
    for each in (ours, twice):
        vlms.assert_close(each, vlms.Ran(None, expected.loss, expected.gradients), family.tolerance)
    vlms.assert_close(vlms.Ran(out.logits[0], out.loss, expected.gradients), expected, family.tolerance)


def shared(family):
    """Three answers to one question, of which two begin alike: what they share stands once, its images too."""
    question = samples_of(family)[-1]
    length = question["input_ids"].shape[1]
    conversations = [answered(family, question, answer) for answer in ([7, 8, 9], [7, 11], [12, 13, 14, 15])]
    model = vlms.build(family).train()
    batch = PackedCollator(model)([conversations])
    assert batch["input_ids"].shape == (1, length + 8)
    assert batch["attention_mask"].layout.max_length == length + 4
    # 7 of the first two conversations is one token, with one label: the mean is over 8 labels, not 9.
    unshared = [dict(each) for each in conversations]
    unshared[1]["labels"] = unshared[1]["labels"].clone()
    unshared[1]["labels"][:, length] = -100
    expected = alone(model, unshared)
    with apply(model):
        ours = vlms.run(model, batch)
        model.eval()
        with torch.no_grad():
            evaluated = model(**batch, use_cache=False).loss
    vlms.assert_close(ours, vlms.Ran(None, expected.loss, expected.gradients), family.tolerance)
    torch.testing.assert_close(evaluated, expected.loss)


def greedy(family):
    generates(family)


def beams(family):
    generates(family, num_beams=2)


def static_cache(family):
    generates(family, cache_implementation="static")


def generates(family, **options):
    """The same tokens as before, for a batch that is padded on the left."""
    model, inputs = vlms.build(family), family.batch("left")
    options = {**GENERATION, **options}
    try:
        expected = model.generate(**inputs, **options)
    except Exception as error:
        raise NotThereError(f"the model itself cannot: {type(error).__name__}") from error
    with apply(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


def lora(family):
    """Peft after ``apply``; undone when it has gone."""
    results = []
    for is_patched in (False, True):
        model = vlms.build(family)
        patch = apply(model) if is_patched else contextlib.nullcontext()
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=family.lora, init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config).train()
        results.append(vlms.run(wrapped, labelled(family.batch())))
        wrapped.unload()
        with patch:
            pass
    vlms.assert_close(results[1], results[0], family.tolerance)


def checkpointing(family):
    """Layers that run once more in the backward pass."""
    model = vlms.build(family).train()
    if not model.supports_gradient_checkpointing:
        raise NotThereError("the model itself cannot")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = vlms.run(model, labelled(family.batch()))
    with apply(model):
        vlms.assert_close(vlms.run(model, labelled(family.batch())), before, family.tolerance)


CHECKS = {each.__name__.replace("_", " "): each for each in (
    padded, losses, packed, shared, greedy, beams, static_cache, lora, checkpointing,
)}  # fmt: skip


class NotThereError(Exception):
    """The model cannot do it without ``apply``, either."""


@dataclass
class Outcome:
    """What a check found.

    Attributes:
        verdict: right; refused, by a sentence of ours; not there, without ours either; wrong; or failed, with another
            error.
        why: it is not right.
    """

    verdict: str
    why: str = ""


def outcome(check, family):
    """Run a check."""
    try:
        check(family)
    except NotThereError as error:
        return Outcome("not there", str(error))
    except AssertionError as error:
        return Outcome("wrong", str(error).partition("\n")[0])
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        is_ours = isinstance(error, ValueError) and "lynx_kernels/integrations" in where
        return Outcome("refused", str(error)) if is_ours else Outcome("failed", f"{type(error).__name__}: {error}")
    return Outcome("right")


def why_not_there(family):
    """Why this release of transformers cannot build a family, or None."""
    try:
        family.model()
    except AttributeError as error:
        if getattr(error.obj, "__name__", None) == hf.__name__:
            return f"transformers {hf.__version__} has no {error.name}"
        raise
    return None


def labelled(inputs):
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def samples_of(family):
    """Each row alone, as a processor returns it, supervised in its second half."""
    found = []
    for row in range(len(family.rows())):
        sample = family.batch(rows=(row,))
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][:, : sample["input_ids"].shape[1] // 2] = -100
        found.append(sample)
    return found


def answered(family, question, answer):
    """A sample with an answer behind it, on which alone it is trained, and which sees the last token's images."""
    tokens = torch.tensor([answer])
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    more |= {name: torch.full_like(tokens, family.answer_type) for name in family.extra(tokens)}
    for name in {"cross_attention_mask", "image_attention_mask"} & question.keys():
        more[name] = question[name][:, -1:].repeat_interleave(len(answer), 1)
    joined = {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in question.items()}
    joined["labels"][:, : question["input_ids"].shape[1]] = -100
    return joined


def alone(model, samples):
    """Logits end to end, the mean loss over all labels, and the gradients of the loss."""
    count = sum(int((each["labels"][:, 1:] != -100).sum()) for each in samples)
    model.zero_grad()
    outs = [model(**each, num_items_in_batch=count, use_cache=False) for each in samples]
    loss = sum(each.loss for each in outs)
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return vlms.Ran(torch.cat([each.logits[0] for each in outs]).detach(), loss.detach(), gradients)
