"""The CUDA kernels of pack_embeddings, run on a CPU through the implementation that launches them."""

import pytest
import torch

from lynx_kernels.ops.pack_embeddings import pack_embeddings
from tests.cuda import host_kernels
from tests.cuda.host_kernels import KernelError
from tests.lynx_kernels.helpers import run
from tests.lynx_kernels.test_pack_embeddings import (
    BACKWARD,
    NARROW,
    calls,
    check_conversions,
    check_equal,
    check_mixed,
    check_permuted,
    make,
)

pytestmark = pytest.mark.usefixtures("on_host")
kernels = calls("cuda")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (37, 5), (37, 16), (20, 513), (9, 4104)])
def test_sizes(rows, width, dtype):
    """Widths that are multiples of 16 bytes and others; rows of several blocks, the last of which is not full."""
    inputs, grad = make(rows, width=width, dtype=dtype)
    check_equal(kernels, inputs, grad)


@pytest.mark.parametrize("width", [8, 3])
def test_mixed_dtypes(width):
    check_mixed(kernels, *make(width=width))


def test_rows_that_end_inside_16_bytes_of_the_other_dtype():
    """12 columns are three times 16 bytes of fp32, and one and a half of bf16. Rows start at multiples of 16 bytes."""
    (token_ids, embedding, vision, vision_index), grad = make(width=16)
    inputs = token_ids, embedding[:, :12].float().contiguous(), vision.bfloat16()[:, :12], vision_index
    check_equal(kernels, inputs, grad[:, :12])


def test_gradients_are_of_the_dtype_asked_for():
    (token_ids, _, _, vision_index), grad = make(width=8)
    [gradient] = BACKWARD(grad.float(), token_ids, vision_index, 11, 7, torch.bfloat16, [False, True], "cuda")
    assert gradient.dtype == torch.bfloat16


def test_conversions():
    check_conversions(kernels)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", NARROW)
def test_rows_that_do_not_start_at_16_bytes(offset, dtype, on_host):
    """The sanitizer stops wide accesses at other addresses."""
    on_host.offset = offset
    check_equal(kernels, *make(width=16, dtype=dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_strides(dtype):
    """Rows further apart than they are wide, by multiples of 16 bytes and not."""
    (token_ids, embedding, vision, vision_index), grad = make(width=32, dtype=dtype)
    check_permuted(kernels, (token_ids, embedding, vision, vision_index), grad)
    grad = grad.to(dtype)  # or its slices would be converted, which copies them
    for columns in (slice(0, 16), slice(3, 19), slice(0, 15)):
        check_equal(kernels, (token_ids, embedding[:, columns], vision[:, columns], vision_index), grad[:, columns])
    odd = torch.cat([embedding, embedding[:, :1]], 1)[:, :16]  # aligned rows, but no two of them
    check_equal(kernels, (token_ids, odd, vision[:, :16], vision_index), grad[:, :16])


@pytest.mark.parametrize("distance", [1, 127, 128, 129, 300])
def test_uses_of_a_vision_row(distance):
    """Two and three uses that far apart: in one round of a block, at the end of one, in several."""
    rows = 2 * distance + 5
    vision_index = torch.full((rows,), -1, dtype=torch.int32)
    vision_index[[1, 1 + distance, 1 + 2 * distance]] = 2
    vision_index[[2, 4 + distance] if distance > 1 else [4, 5]] = 0
    inputs, grad = make(rows, num_vision=4, width=8, dtype=torch.float32)
    check_equal(kernels, (inputs[0].clamp(0, 10), inputs[1], inputs[2], vision_index), grad)


def test_rows_beyond_32_bits():
    """Of tensors of more than 2^31 numbers, only the last blocks run."""
    host_kernels.run(host_kernels.HERE / "far_driver.cpp")


def test_the_order_of_threads_changes_nothing(on_host):
    inputs, grad = make(300, width=24, dtype=torch.float32)
    results = []
    for seed in range(3):
        on_host.seed = seed
        results.append(run(kernels, inputs, grad))
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_vision_no_text_no_width():
    inputs, grad = make(num_vision=0, dtype=torch.float32)
    check_equal(kernels, inputs, grad)
    vision, index = torch.randn(3, 8), torch.tensor([2, 2, 0], dtype=torch.int32)
    check_equal(kernels, (torch.full((3,), -1), torch.empty(0, 8), vision, index), torch.ones(3, 8).double())
    assert pack_embeddings(torch.zeros(3).long(), torch.ones(2, 0), vision[:, :0], index, impl="cuda").shape == (3, 0)


def test_indices_out_of_range(on_host):
    """As on a GPU, the kernel asserts."""
    (token_ids, embedding, vision, vision_index), grad = make(width=8, dtype=torch.float32)
    text, vision_row = int((vision_index < 0).nonzero()[0]), int((vision_index >= 0).nonzero()[0])
    for wrong in (-1, 11):
        ids = token_ids.clone()
        ids[text] = wrong
        with pytest.raises(KernelError, match="a token id is out of range"):
            kernels(ids, embedding, vision, vision_index)
    index = vision_index.clone()
    index[vision_row] = 7
    with pytest.raises(KernelError, match="a vision_index is out of range"):
        kernels(token_ids, embedding, vision, index)
    with pytest.raises(KernelError, match="a vision_index is out of range"):
        on_host.pack_embeddings_backward(grad.float(), index, 7, torch.float32)
