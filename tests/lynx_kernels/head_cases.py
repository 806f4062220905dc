"""Inputs, options and the plain composition for linear_cross_entropy and token_log_probs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends import onednn

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = ["chunked", "reference"]  # those of every machine
# Each changes the logits. A cap of 3 bends logits of a few units, and a scale shows on which side of the cap it stands.
OPTIONS = [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"logit_scale": 1.6}]


def make(rows=37, width=13, vocabulary=19, dtype=torch.float64, ignore_index=-100, supervised=0.4):
    """hidden, weight and one label for each row."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > supervised] = ignore_index
    labels[:1], labels[1:2], labels[2:3] = vocabulary - 1, 0, ignore_index
    return hidden.to(dtype), weight.to(dtype), labels


def make_entries(entries=90, rows=21, width=13, vocabulary=19, dtype=torch.float64):
    """hidden, weight, bias, labels and predictors.

    More labels than rows, in no order. A fifth has no predictor and a fifth no label. One row predicts many, some twice
    the same label; some rows predict nothing.
    """
    generator = torch.Generator().manual_seed(entries)
    hidden, weight, _ = make(rows, width, vocabulary)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (entries,), generator=generator)
    predictors = torch.randint(0, max(rows - 5, 1), (entries,), generator=generator)
    predictors[: entries // 5] = min(3, rows - 1)
    labels[: entries // 10] = 4
    order = torch.randperm(entries, generator=generator)
    labels, predictors = labels[order], predictors[order]
    labels[::5], predictors[1::5] = -100, -1
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, predictors


def precision_of_logits(impl, dtype):
    """The dtype that sets the budget where it is not that of the result: CPUs with products in bf16 round logits."""
    return torch.bfloat16 if dtype == torch.bfloat16 and impl == "chunked" and onednn.HAS_BF16 else None


def logits_of(hidden, weight, bias=None, *, softcap=None, logit_scale=1.0, temperature=1.0) -> Tensor:
    """(T, V) in at least fp32, from a head in the dtype of its weight."""
    logits = F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
    logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def with_options(function, **options):
    return lambda *inputs: function(*inputs, **options)
