"""The Triton kernels of pack_embeddings, with small tiles: a row takes several, and so do the uses of one row."""

from dataclasses import replace

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.pack_embeddings import pack_embeddings
from lynx_kernels.ops.pack_embeddings import triton as implementation
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsBackwardCall, PackEmbeddingsCall
from tests.interpreter import DTYPES
from tests.interpreter.sparse import run_only
from tests.lynx_kernels.test_pack_embeddings import calls, check_equal, check_mixed, check_permuted, make

interpreted = calls("triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(implementation, "_COLUMNS", 16)
    monkeypatch.setattr(implementation, "_SUM_COLUMNS", 8)
    monkeypatch.setattr(implementation, "_SCAN", 8)
    monkeypatch.setattr(implementation, "_FIND", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 16), (37, 5), (40, 33)])
def test_sizes(rows, width, dtype):
    inputs, grad = make(rows, width=width, dtype=dtype)
    check_equal(interpreted, inputs, grad)
    check_equal(interpreted, inputs)  # an expanded gradient


def test_mixed_dtypes():
    check_mixed(interpreted, *make(20))


def test_strides():
    inputs, grad = make(width=20, dtype=torch.float32)
    check_permuted(interpreted, inputs, grad)
    token_ids, embedding, vision, vision_index = inputs
    # In fp32 already, otherwise the slice would be copied.
    check_equal(interpreted, (token_ids, embedding[:, 3:], vision[:, 3:], vision_index), grad.float()[:, 3:])


@pytest.mark.parametrize("distance", [1, 7, 8, 9, 20])
def test_uses_of_a_vision_row(distance):
    """Two and three uses at this distance: found in one scan, or in several."""
    rows = 2 * distance + 5
    vision_index = torch.full((rows,), -1, dtype=torch.int32)
    vision_index[[1, 1 + distance, 1 + 2 * distance]] = 2
    vision_index[[2, 4 + distance] if distance > 1 else [4, 5]] = 0
    inputs, grad = make(rows, num_vision=4, width=8, dtype=torch.float32)
    check_equal(interpreted, (inputs[0].clamp(0, 10), inputs[1], inputs[2], vision_index), grad)


def test_empty_inputs():
    inputs, grad = make(num_vision=0, dtype=torch.float32)
    check_equal(interpreted, inputs, grad)
    vision, index = torch.randn(3, 8), torch.tensor([2, 2, 0], dtype=torch.int32)
    check_equal(interpreted, (torch.full((3,), -1), torch.empty(0, 8), vision, index), torch.ones(3, 8).double())
    assert pack_embeddings(torch.zeros(3).long(), torch.ones(2, 0), vision[:, :0], index, impl="triton").shape == (3, 0)


def test_long_sums_accumulate_in_fp32():
    """An fp16 sum of ones stops at 2048."""
    vision = torch.ones(1, 2, dtype=torch.float16, requires_grad=True)
    index = torch.zeros(2100, dtype=torch.int32)
    interpreted(torch.zeros(2100, dtype=torch.int64), vision.detach(), vision, index).sum().backward()
    assert vision.grad.eq(2100).all()


def test_indices_out_of_range(monkeypatch):
    """The kernel asserts, as on a GPU. Triton compiles assertions only with debug=True."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    (token_ids, embedding, vision, vision_index), _ = make(dtype=torch.float32)
    interpreted(token_ids, embedding, vision, vision_index)
    text = int((vision_index < 0).nonzero()[0])
    for wrong in (-1, 11):
        ids = token_ids.clone()
        ids[text] = wrong
        with pytest.raises(InterpreterError, match="token_ids has a value out of range"):
            interpreted(ids, embedding, vision, vision_index)
    with pytest.raises(InterpreterError, match="vision_index has a value out of range"):
        interpreted(token_ids, embedding, vision, vision_index.clamp(0) + 7)


def test_backward_ignores_indices_out_of_range():
    """Forward has already raised an error for them. Backward must not write outside the gradient."""
    grad, index = torch.ones(3, 2), torch.tensor([0, 5, 1], dtype=torch.int32)
    [gradient] = implementation.backward(
        PackEmbeddingsBackwardCall(grad, torch.zeros(3).long(), index, 4, 2, torch.float32, [False, True])
    )
    assert gradient.tolist() == [[1, 1], [1, 1]]


def test_rows_beyond_32_bits(monkeypatch):
    """Of tensors of more than 2^31 numbers, only the last rows exist, and only the last programs run."""
    monkeypatch.setattr(implementation, "_FIND", 1024)
    run_only(monkeypatch, lambda kernel, programs: range(max(programs - 2, 0), programs))
    rows, width = 2**28 + 5, 8
    embedding, vision, grad = (torch.empty(rows, width, dtype=torch.float16) for _ in range(3))
    token_ids, vision_index = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
    embedding[-1], vision[-1], grad[-2:] = 2.0, 3.0, torch.tensor([[5.0], [7.0]], dtype=torch.float16)
    token_ids[-2:], vision_index[-1000:] = rows - 1, -1
    vision_index[-1] = rows - 1
    out = implementation.forward(PackEmbeddingsCall(token_ids, embedding, vision, vision_index))
    assert out[-2:].tolist() == [[2.0] * width, [3.0] * width]
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)  # fresh pages are zeros, and not yet there
    gradient = implementation._vision_gradient(grad, vision_index, rows, torch.float16)
    assert gradient[-1].tolist() == [7.0] * width


def test_runs_only_when_named():
    inputs, _ = make(dtype=torch.float32)
    refused = dispatch.explain(pack_embeddings, *inputs).reasons
    assert refused["triton"] == "the Triton interpreter runs only when named by impl="
