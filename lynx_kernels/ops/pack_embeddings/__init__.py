"""The packed input of the language model: vision rows and token embeddings, interleaved."""

from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.registration import define
from lynx_kernels.ops.pack_embeddings import cpu, cuda, reference
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsBackwardCall, PackEmbeddingsCall


def _check(call: PackEmbeddingsCall) -> None:
    token_ids, embedding, vision, vision_index = call
    tensors = call._asdict()
    dispatch.refuse_dtensors("pack_embeddings", **tensors)
    dispatch.require_floating("pack_embeddings", embedding=embedding, vision=vision)
    dispatch.require_same_device("pack_embeddings", embedding.device, **tensors)
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int64),
        ("vision_index", vision_index, torch.int32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"pack_embeddings: {name} is {tensor.dtype}, expected {dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"pack_embeddings: {name} has shape {tuple(tensor.shape)}, expected (T,), one packed row")
    if vision_index.shape != token_ids.shape:
        raise ValueError(
            f"pack_embeddings: vision_index has shape {tuple(vision_index.shape)}, expected "
            f"{tuple(token_ids.shape)} like token_ids"
        )
    if embedding.dim() != 2:
        raise ValueError(f"pack_embeddings: embedding has shape {tuple(embedding.shape)}, expected (V, d)")
    if vision.dim() != 2 or vision.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"pack_embeddings: vision has shape {tuple(vision.shape)}, expected (M, {embedding.shape[1]}), as "
            "wide as embedding"
        )


OPERATION = dispatch.Operation(
    "pack_embeddings",
    PackEmbeddingsCall,
    PackEmbeddingsBackwardCall,
    dispatch.Implementation(
        "cuda",
        cuda.forward,
        cuda.backward,
        architectures=dispatch.NVIDIA,
        unsupported_reason=cuda.unsupported_reason,
    ),
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.pack_embeddings.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.pack_embeddings.triton", "backward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=lambda call: triton_backend.unsupported_reason(call.embedding, call.vision),
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, cpu.backward, architectures=("cpu",), unsupported_reason=cpu.unsupported_reason
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
    check=_check,
)


@OPERATION.explained_by(PackEmbeddingsCall)
def pack_embeddings(
    token_ids: Tensor,
    embedding: Tensor,
    vision: Tensor,
    vision_index: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Row t is ``vision[vision_index[t]]`` where that index is >= 0, otherwise ``embedding[token_ids[t]]``.

    Args:
        token_ids: (T,) int64, each in [0, V). At vision rows, any value.
        embedding: (V, d), fp64, fp32, fp16 or bf16, the embedding table of the language model.
        vision: (M, d), fp64, fp32, fp16 or bf16; M may be 0.
        vision_index: (T,) int32, each < M. Negative: row t is a token. Vision rows may be used several times or never.
        impl: the name of an implementation; None takes the best that can run.

    The gradient of a vision row or of a table row is the sum over the rows it was copied to, accumulated in at least
    fp32; it is 0 if there are none. The table's gradient is dense, and computed only if the table requires one.
    ``padding_idx`` and ``max_norm`` of an ``nn.Embedding`` are ignored. Autocast does not change the operation, as it
    does not change an embedding: there is no product, and vision rows in the autocast dtype are cast to the table's
    dtype.

    Returns:
        (T, d) in the dtype of embedding.

    Raises:
        ValueError: a shape or a device is invalid; the message names the argument.
        TypeError: an argument has the wrong dtype or is a DTensor.
        IndexError: a token id or a vision index is out of range. On a GPU this is a device-side assertion.
    """
    call = PackEmbeddingsCall(token_ids, embedding, vision, vision_index)
    return _FORWARD(*call, OPERATION.choose(impl, call))


def _forward_fake(call: PackEmbeddingsCall) -> Tensor:
    return call.embedding.new_empty((call.token_ids.shape[0], call.embedding.shape[1]))


def _backward_fake(call: PackEmbeddingsBackwardCall) -> list[Tensor]:
    outputs = ((call.num_embeddings, call.grad.dtype), (call.num_vision, call.vision_dtype))
    return [
        call.grad.new_empty((rows, call.grad.shape[1]), dtype=dtype)
        for (rows, dtype), needed in zip(outputs, call.needs, strict=True)
        if needed
    ]


def _setup_context(ctx: Any, call: PackEmbeddingsCall, impl: str, output: Tensor) -> None:
    ctx.save_for_backward(call.token_ids, call.vision_index)
    ctx.sizes = call.embedding.shape[0], call.vision.shape[0]
    ctx.vision_dtype, ctx.impl = call.vision.dtype, impl


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:3])
    gradients = iter(_BACKWARD(grad, *ctx.saved_tensors, *ctx.sizes, ctx.vision_dtype, needs, ctx.impl))
    return (None, *(next(gradients) if needed else None for needed in needs), None)


_BACKWARD = define(
    "pack_embeddings_backward", PackEmbeddingsBackwardCall, "Tensor[]", OPERATION.backward, fake=_backward_fake
)
_FORWARD = define(
    "pack_embeddings",
    PackEmbeddingsCall,
    "Tensor",
    OPERATION.forward,
    fake=_forward_fake,
    autograd=(_setup_context, _autograd),
)
