"""A model that returns the log-probabilities of ``Branches`` where TRL's trainers ask for those of padded rows.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)`` and read ``log_probs`` and more of what that
returns. A model with this head takes ``branches=`` instead, and returns the same. All of it happens inside ``forward``,
where DDP and FSDP expect it.
"""

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from lynx_kernels.children import weight_and_bias
from lynx_kernels.integrations.head_loss import PromisedLogits, promised_logits
from lynx_kernels.integrations.trl.branches import Branches
from lynx_kernels.ops.token_log_probs import token_log_probs

_ROWS = 1024  # of logits that are made at a time, for metrics


def add_head(
    model: PreTrainedModel,
    *,
    outputs: tuple[str, ...],
    temperature: float = 1.0,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Make ``model(branches=...)`` return log-probabilities; other calls are as before.

    ``entropy=False`` beside ``branches`` leaves out entropies.

    Args:
        model: of transformers, changed by ``apply``; inside peft and DDP.
        outputs: fields of TRL's ``FusedCausalLMOutput``, as its trainer asks for.
        temperature: divides the logits.
        autocast: the context in which the head runs.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at its signature
    def with_branches(
        self: PreTrainedModel, *args: Any, branches: Branches | None = None, entropy: bool = True, **kwargs: Any
    ) -> Any:
        if branches is None:
            return forward(*args, **kwargs)
        with autocast():
            logits = promised_logits(self, forward, **branches.inputs, use_cache=False)
            weights = branches.weights if self.training else None
            wanted = outputs if entropy else tuple(each for each in outputs if each != "entropy")
            return _score(logits, branches, wanted, temperature, weights)

    model.forward = types.MethodType(with_branches, model)


def _score(
    logits: PromisedLogits, branches: Branches, outputs: tuple[str, ...], temperature: float, weights: Tensor | None
) -> FusedCausalLMOutput:
    weight, bias = weight_and_bias(logits.head)
    scaled = logits.scale_and_cap()
    assert scaled is not None
    logit_scale, softcap = scaled
    hidden = logits.hidden.flatten(0, -2)

    def padded(values: Tensor) -> Tensor:  # (N,) -> (B, L - 1)
        flat = values.new_zeros(branches.shape[0] * branches.shape[1])
        return flat.index_copy(0, branches.entries, values).view(branches.shape)

    score = functools.partial(
        token_log_probs,
        hidden,
        weight,
        branches.labels,
        predictors=branches.predictors,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    log_probs, entropy = score(return_entropy=True) if "entropy" in outputs else (score(), None)
    fields = {"log_probs": log_probs if weights is None else log_probs * weights}
    if entropy is not None:
        fields["entropy"] = entropy
    of_logits = [name for name in _OF_LOGITS if name in outputs]
    if of_logits:
        with torch.no_grad():
            found = [
                [_OF_LOGITS[name](z, labels) for name in of_logits]
                for labels, rows in zip(branches.labels.split(_ROWS), branches.predictors.split(_ROWS), strict=True)
                for z in [PromisedLogits(hidden[rows], logits.head, logits.steps).make().to(log_probs) / temperature]
            ]
        for name, parts in zip(of_logits, zip(*found, strict=True), strict=False):
            fields[name] = torch.cat(parts)
    is_label = padded(torch.ones_like(branches.labels, dtype=torch.bool))
    return FusedCausalLMOutput(**{name: padded(each) for name, each in fields.items()}, label_mask=is_label)


_OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # without gradients, from logits (n, V) and labels (n,)
    "mean_logits": lambda logits, labels: logits.mean(-1),
    "is_top1": lambda logits, labels: logits.argmax(-1) == labels,
    "log_sum_sq_probs": lambda logits, labels: (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),
}
