"""Rows in a tree have the log-probabilities and the gradients that they have alone."""

from contextlib import nullcontext

import pytest
import torch

from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.integrations.trl.head import add_head
from tests.lynx_kernels import trl_models, vlms

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TEMPERATURE = 0.7


def rows_of(processor, *, dtype=torch.float32):
    """Two prompts with an image each, padded on the left, with three and two completions; and one of text alone."""
    asked = [["w9", "w9", "w9"], ["w12 w13 w14", "w12 w13 w14"], ["w20 w21 w22 w23"]]
    said = [["w30 w31 w32", "w30 w33", "w40 w41 w42 w43"], ["w50", "w51 w52 w53"], ["w54 w55"]]
    rows = []
    for prompt, (questions, answers) in enumerate(zip(asked, said, strict=True)):
        for question, answer in zip(questions, answers, strict=True):
            images = None if prompt == 2 else [[trl_models.image(prompt)]]
            text = question if prompt == 2 else f"<image> {question}"
            row = processor(images=images, text=[text], return_tensors="pt")
            answered = processor(text=[answer], return_tensors="pt")
            completion, length = answered["input_ids"][0], row["input_ids"].shape[1]
            per_token = {"input_ids": completion, "attention_mask": torch.ones_like(completion)}
            for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                if name in row:
                    value = torch.cat([row[name][0], per_token.get(name, torch.zeros_like(completion))])
                    left = 12 - length
                    row[name] = torch.nn.functional.pad(value, (left, 4 - len(completion)))[None]
            row["labels"] = row["input_ids"].clone()
            row["labels"][:, :12] = row["labels"][:, 12 + len(completion) :] = -100
            rows.append({name: each.to(dtype) if each.is_floating_point() else each for name, each in row.items()})
    return rows


def alone(model, rows, factors):
    """Log-probabilities and the other fields (B, L - 1) of each row without padding, and gradients."""
    model.zero_grad()
    found = {name: torch.zeros(factors.shape, dtype=torch.float64) for name in FIELDS}
    for number, row in enumerate(rows):
        is_token = row["attention_mask"][0].bool()
        inputs = {
            name: each[:, is_token] if each.shape == row["input_ids"].shape else each
            for name, each in row.items()
            if name != "labels"
        }
        logits = model(**inputs, use_cache=False).logits[0, :-1] / TEMPERATURE
        log_probs = logits.log_softmax(-1)
        labels = row["labels"][0, is_token][1:]
        columns = is_token.nonzero()[1:, 0] - 1
        chosen = labels != -100
        labels, columns, logits, log_probs = labels[chosen], columns[chosen], logits[chosen], log_probs[chosen]
        of_labels = log_probs.gather(-1, labels[:, None])[:, 0]
        (of_labels * factors[number, columns]).sum().backward()
        fields = (of_labels, -(log_probs.exp() * log_probs).sum(-1), logits.mean(-1), logits.argmax(-1) == labels,
                  (2 * log_probs).logsumexp(-1))  # fmt: skip
        for name, values in zip(FIELDS, fields, strict=True):
            found[name][number, columns] = values.detach().double()
    return found, {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def shared(model, rows, factors):
    collator = PackedCollator(model)
    add_head(model, outputs=FIELDS, temperature=TEMPERATURE, autocast=nullcontext)
    model.zero_grad()
    branches = pack_rows(rows, collator)
    out = model(branches=branches)
    (out.log_probs * factors).sum().backward()
    fields = {name: getattr(out, name).detach().double() for name in FIELDS}
    return branches, fields, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", trl_models.FAMILIES)
def test_each_row_is_as_alone(family, dtype, monkeypatch):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    model, processor = trl_models.build(family, dtype=dtype)
    if dtype == torch.float64:
        trl_models.without_fp32(model, monkeypatch)
    rows = rows_of(processor, dtype=dtype)
    factors = torch.randn(len(rows), 15, dtype=dtype, generator=torch.Generator().manual_seed(2))
    expected, gradients = alone(model, rows, factors)
    with apply(model, loss=False):
        branches, found, ours = shared(model, rows, factors)
    # The prompts stand once, "w30" of two completions too, and their images are encoded once.
    prompts = [len(rows[row]["attention_mask"][0, :12].nonzero()) for row in (0, 3, 5)]
    assert branches.num_tokens == sum(prompts) + (3 + 2 + 4 - 1) + (1 + 3) + 2
    images = branches.inputs["pixel_values"]
    assert len(images) == {"Qwen25VL": 32, "Qwen3VL": 32, "SmolVLM": 1}.get(family, 2)
    for name in FIELDS:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)
    vlms.assert_close(vlms.Ran(None, None, ours), vlms.Ran(None, None, gradients), tolerance)


def test_first_tokens_contribute():
    """The last row of a prompt predicts the first token of each completion."""
    model, processor = trl_models.build("Llava")
    rows = rows_of(processor)[:3]
    for row in rows:
        row["labels"][:, 13:] = -100
    factors = torch.ones(3, 15)
    expected, gradients = alone(model, rows, factors)
    with apply(model, loss=False):
        branches, found, ours = shared(model, rows, factors)
    assert branches.predictors.tolist() == [4, 4, 4]
    assert found["log_probs"].count_nonzero() == 3
    torch.testing.assert_close(found["log_probs"], expected["log_probs"], rtol=2e-5, atol=2e-5)
    vlms.assert_close(vlms.Ran(None, None, ours), vlms.Ran(None, None, gradients))


def test_log_probabilities_have_the_same_bits_on_the_same_layout():
    """Those of the old policy are computed without gradients, those of the new one with them."""
    model, processor = trl_models.build("Qwen3VL")
    rows = rows_of(processor)
    apply(model, loss=False)
    add_head(model, outputs=("log_probs",), autocast=nullcontext)
    with torch.no_grad():
        old = model(branches=pack_rows(rows, PackedCollator(model))).log_probs
    new = model(branches=pack_rows(rows, PackedCollator(model))).log_probs
    assert torch.equal(old, new.detach())


def test_bad_rows_are_named():
    model, processor = trl_models.build("Llava")
    rows = rows_of(processor)
    rows[1]["attention_mask"] = torch.zeros_like(rows[1]["attention_mask"])
    with pytest.raises(ValueError, match="row 1 of the batch has no tokens"):
        pack_rows(rows, PackedCollator(model))
