"""The log-probabilities of tokens from a language model's last hidden states, as DPO, GRPO and the like train on."""

from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.registration import define
from lynx_kernels.ops.head_common import plain
from lynx_kernels.ops.head_common.operator import (
    autocast,
    backward_fake,
    check,
    needs_of,
    triton_score,
    triton_unsupported_reason,
)
from lynx_kernels.ops.token_log_probs import chunked, reference
from lynx_kernels.ops.token_log_probs.call import (
    TokenLogProbsBackwardCall,
    TokenLogProbsCall,
    TokenLogProbsJacobianCall,
    head_call,
)

OPERATION = dispatch.Operation(
    "token_log_probs",
    TokenLogProbsCall,
    TokenLogProbsBackwardCall,
    dispatch.Implementation(
        "triton",
        partial(chunked.forward, triton_score),
        partial(chunked.backward, triton_score),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=triton_unsupported_reason,
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation("chunked", partial(chunked.forward, plain.score), partial(chunked.backward, plain.score)),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def _call(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    predictors: Tensor | None,
    temperature: float,
    return_entropy: bool,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> TokenLogProbsCall:
    call = TokenLogProbsCall(
        hidden, weight, labels, predictors, bias, softcap, logit_scale, temperature, return_entropy, with_jacobian=False
    )
    check(head_call(call))
    return call


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    predictors: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
) -> Tensor: ...
@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    predictors: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@OPERATION.explained_by(_call)
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    predictors: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probabilities of labels under the rows that predict them, without the (T, V) logits. Differentiable.

    Entry i of the N entries scores ``labels[i]`` with the logits of row ``predictors[i]``:
    ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``. Its log-probability is
    ``log_softmax(logits[predictors[i]])[labels[i]]``. It is 0, as is the entropy, where the label is -100 or the
    predictor -1.

    Args:
        hidden: (T, d), fp64, fp32, fp16 or bf16. Rows that predict nothing that is counted may hold anything, even NaN;
            their gradient is 0.
        weight: (V, d), fp64, fp32, fp16 or bf16, the weight of the output head.
        labels: (N,) int64, each in [0, V) or -100.
        predictors: (N,) int64 or int32, each a row of hidden or -1. A row may predict several labels: the last row of a
            shared prompt predicts the first token of every completion. None: N = T, and row i predicts ``labels[i]``.
        temperature: above 0; divides the logits last.
        return_entropy: also return the entropy of the distribution that each entry's label is taken from.
        bias: (V,) floating point, added to the products in at least fp32.
        softcap: above 0; None for logits without a cap.
        logit_scale: the factor of the logits, before the cap.
        impl: the name of an implementation; None takes the best that can run.

    Logits are in fp32, or fp64 if hidden, weight or bias is fp64 (``"chunked"`` on CPUs rounds bf16 products to bf16).
    Under autocast hidden and weight are first cast to its dtype.

    The gradient of a row that predicts several labels is their sum, always added in the same order. The gradient of a
    frozen weight or bias is not computed. If both are frozen, ``"triton"`` and ``"chunked"`` compute d log_prob /
    d hidden in forward, save it, (N, d) in hidden's dtype, in place of hidden, and scale it in backward. Otherwise, and
    by ``"reference"``, only the arguments are saved, and backward computes the logits again. On a GPU the host does not
    read labels: all N entries are then computed with a frozen head that hidden gets a gradient through, otherwise
    min(N, T) rows. On CPUs only what is counted is. ``"triton"`` uses the same products as ``"chunked"`` and one kernel
    for what lies between them.

    Returns:
        (N,) in fp32, or fp64 if hidden, weight or bias is fp64. With ``return_entropy`` also (N,) entropies in nats,
        which carry no gradient.

    Raises:
        ValueError: a shape, a device or an option is invalid; the message names the argument.
        TypeError: an argument has the wrong dtype or is a DTensor.
        IndexError: a label or a predictor is out of range. On a GPU this is a device-side assertion.
    """
    call = _call(hidden, weight, labels, predictors, temperature, return_entropy, bias, softcap, logit_scale)
    impl = OPERATION.choose(impl, call)
    is_only_hidden = needs_of(call) == [True, False, False]
    log_probs, entropy, _ = _FORWARD(*call._replace(with_jacobian=is_only_hidden and impl != "reference"), impl)
    return (log_probs, entropy.detach()) if return_entropy else log_probs


def _forward_fake(call: TokenLogProbsCall) -> tuple[Tensor, Tensor, Tensor]:
    hidden, entries, acc = call.hidden, call.labels.shape[0], head_call(call).acc_dtype
    return (
        hidden.new_empty(entries, dtype=acc),
        hidden.new_empty(entries, dtype=acc) if call.with_entropy else hidden.new_empty(0),
        hidden.new_empty((entries, hidden.shape[1]) if call.with_jacobian else 0),
    )


def _setup_context(ctx: Any, call: TokenLogProbsCall, impl: str, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.with_jacobian, ctx.impl = call.with_jacobian, impl
    if call.with_jacobian:
        ctx.num_rows = call.hidden.shape[0]
        ctx.save_for_backward(output[2], call.labels, call.predictors)
    else:
        ctx.options = call[5:-2]  # all between the tensors and with_entropy
        ctx.save_for_backward(*call[:5])


def _autograd(ctx: Any, grad: Tensor | None, *other_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(each is not None and each.numel() for each in other_grads):
        raise RuntimeError("lynx_kernels::token_log_probs has no second derivatives")
    hidden = weight = bias = None
    if grad is not None and ctx.with_jacobian:
        hidden = _OF_JACOBIAN(grad, *ctx.saved_tensors, ctx.num_rows, "")
    elif grad is not None:
        needs = [ctx.needs_input_grad[each] for each in (0, 1, 4)]
        gradients = iter(_BACKWARD(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.impl))
        hidden, weight, bias = (next(gradients) if needed else None for needed in needs)
    return hidden, weight, None, None, bias, *[None] * 5


_OF_JACOBIAN = define(
    "token_log_probs_backward_of_jacobian",
    TokenLogProbsJacobianCall,
    "Tensor",
    lambda *args: chunked.backward_of_jacobian(TokenLogProbsJacobianCall(*args[:-1])),
    fake=lambda call: call.jacobian.new_empty((call.num_rows, call.jacobian.shape[1])),
)
_BACKWARD = define(
    "token_log_probs_backward",
    TokenLogProbsBackwardCall,
    "Tensor[]",
    OPERATION.backward,
    fake=backward_fake,
)
_FORWARD = define(
    "token_log_probs",
    TokenLogProbsCall,
    "(Tensor, Tensor, Tensor)",
    OPERATION.forward,
    fake=_forward_fake,
    autograd=(_setup_context, _autograd),
    autocast=autocast,
)
