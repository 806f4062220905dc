from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.pack_embeddings import OPERATION, pack_embeddings, reference
from tests.lynx_kernels.helpers import assert_child_ends_well, check, count_compilations, dtensors, permuted, run

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NARROW = DTYPES[1:]
FORWARD = torch.ops.lynx_kernels.pack_embeddings.default
BACKWARD = torch.ops.lynx_kernels.pack_embeddings_backward.default


def naive(token_ids, embedding, vision, vision_index):
    rows = [
        vision[index].to(embedding.dtype) if index >= 0 else embedding[token]
        for token, index in zip(token_ids.tolist(), vision_index.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else embedding[:0]


def make(rows=37, vocabulary=11, num_vision=7, width=5, dtype=torch.float64, device="cpu"):
    """Inputs with repeated and unused rows in both tables, and invalid token ids at the vision rows."""
    generator = torch.Generator().manual_seed(rows)
    token_ids = torch.randint(0, vocabulary - 1, (rows,), generator=generator)  # the last token never occurs
    vision_index = torch.randint(-3, max(num_vision - 1, 1), (rows,), generator=generator, dtype=torch.int32)
    if num_vision == 0:
        vision_index.fill_(-1)
    token_ids[vision_index >= 0] = torch.where(torch.arange(rows) % 2 == 0, -1, vocabulary + 5)[vision_index >= 0]
    embedding = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    vision = torch.randn(num_vision, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(device)
    inputs = token_ids, embedding.to(dtype), vision.to(dtype), vision_index
    return [each.to(device) for each in inputs], grad


def runs(impl, dtype, device="cpu"):
    inputs, _ = make(dtype=dtype, device=device)
    return impl not in dispatch.explain(pack_embeddings, *inputs).reasons


# All implementations that can run on this machine, in every dtype they support.
CASES = [(impl, dtype) for impl in OPERATION.names for dtype in DTYPES if runs(impl, dtype)]
FP32 = [impl for impl, dtype in CASES if dtype == torch.float32]


def calls(impl):
    return partial(pack_embeddings, impl=impl)


def check_equal(function, inputs, grad=None):
    """Outputs are copies, so they must be equal bit for bit. Gradients are sums, so they have an error budget."""
    output = function(*inputs)
    assert output.dtype == inputs[1].dtype
    torch.testing.assert_close(output, naive(*inputs), rtol=0, atol=0)
    check(function, naive, inputs, grad)


def check_permuted(function, inputs, grad):
    expected = run(function, inputs, grad)
    actual = run(function, [permuted(each) for each in inputs], permuted(grad))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def check_mixed(function, inputs, grad):
    """Every pair of narrow dtypes. Rows are converted like ``.to``; gradients have the dtype of their input."""
    token_ids, embedding, vision, vision_index = inputs
    for table in NARROW:
        for source in NARROW:
            check_equal(function, (token_ids, embedding.to(table), vision.to(source), vision_index), grad)


def check_conversions(function, device="cpu"):
    """Conversions equal PyTorch's: all 16-bit values to fp32, and fp32 values at, between and near halfway of them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    index = torch.arange(2**10, dtype=torch.int32, device=device)

    def converted(values, dtype):
        table = torch.zeros(1, 64, dtype=dtype, device=device)
        packed = function(torch.zeros(2**10, dtype=torch.int64, device=device), table, values.to(device), index)
        return packed.cpu()

    for narrow in (torch.float16, torch.bfloat16):
        numbers = bits.view(narrow).view(-1, 64)
        exact = numbers.float()
        torch.testing.assert_close(converted(numbers, torch.float32), exact, rtol=0, atol=0, equal_nan=True)
        above = exact.view(-1).nan_to_num().view(torch.int32).roll(-1).view(torch.float32).view(-1, 64)
        middle = ((exact.double() + above.double()) / 2).float()
        for values in (exact, middle, *(torch.nextafter(middle, torch.full((), far)) for far in (3e38, -3e38))):
            rounded = values.to(narrow)
            torch.testing.assert_close(converted(values, narrow), rounded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 37, 130])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_equals_indexing(rows, impl, dtype):
    inputs, grad = make(rows, dtype=dtype)
    check_equal(calls(impl), inputs, grad)
    check_equal(calls(impl), inputs)  # an expanded gradient


@pytest.mark.parametrize("width", [1, 64, 1300])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_widths(width, impl, dtype):
    """The last width has enough bytes for several threads."""
    check_equal(calls(impl), *make(90, width=width, dtype=dtype))


@pytest.mark.parametrize("impl", FP32)
def test_mixed_dtypes(impl):
    check_mixed(calls(impl), *make())


@pytest.mark.parametrize("impl", FP32)
def test_conversions(impl):
    check_conversions(calls(impl))


def test_gradcheck():
    (token_ids, embedding, vision, vision_index), _ = make()
    leaves = embedding.requires_grad_(), vision.requires_grad_()
    assert torch.autograd.gradcheck(lambda e, v: pack_embeddings(token_ids, e, v, vision_index), leaves)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_permuted_inputs_and_gradient(impl, dtype):
    check_permuted(calls(impl), *make(dtype=dtype))


@pytest.mark.parametrize("impl", FP32)
def test_slices_and_expanded_inputs(impl):
    (token_ids, embedding, vision, vision_index), grad = make(dtype=torch.float32)
    inputs = (token_ids, embedding[:, :1].expand_as(embedding), vision[:1].expand_as(vision), vision_index)
    check_equal(calls(impl), inputs, grad)
    inputs = (token_ids, embedding[:, 1:4], vision[:, 2:], vision_index)
    check_equal(calls(impl), inputs, grad.float()[:, :3])  # in the output's dtype, otherwise the slice would be copied


def far_rows(rows):
    """The same values in rows so far apart that the last one begins beyond 2^31 numbers, and bytes.

    Only the pages of memory that are touched exist.
    """
    distance = 2**31 // (len(rows) - 1) + 5
    memory = torch.empty((len(rows) - 1) * distance + rows.shape[1], dtype=rows.dtype)
    return memory.as_strided(rows.shape, (distance, 1)).copy_(rows)


@pytest.mark.parametrize("impl", FP32)
def test_rows_beyond_32_bits(impl):
    (token_ids, embedding, vision, vision_index), grad = make(dtype=torch.bfloat16)
    token_ids[vision_index < 0], vision_index[vision_index >= 0] = 10, 6
    inputs, grad = (token_ids, embedding, vision, vision_index), grad.bfloat16()
    expected = run(calls(impl), inputs, grad)
    assert expected[0].unique(dim=0).shape[0] == 2, "the last row of each"
    far = token_ids, far_rows(embedding), far_rows(vision), vision_index
    for ours, theirs in zip(run(calls(impl), far, far_rows(grad)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", FP32)
def test_only_text_and_only_vision(impl):
    pack_embeddings = calls(impl)
    inputs, grad = make(num_vision=0, dtype=torch.float32)
    output, grad_embedding, grad_vision = run(pack_embeddings, inputs, grad)
    torch.testing.assert_close(output, F.embedding(inputs[0], inputs[1]), rtol=0, atol=0)
    assert grad_vision.shape == (0, 5)
    assert grad_embedding[-1].eq(0).all()
    vision = torch.randn(3, 5)
    index = torch.tensor([2, 2, 0], dtype=torch.int32)
    output = pack_embeddings(torch.full((3,), -1), torch.empty(0, 5), vision, index)
    torch.testing.assert_close(output, vision[[2, 2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("impl", FP32)
def test_repeated_and_unused_rows(impl):
    vision = torch.ones(3, 2, requires_grad=True)
    index = torch.tensor([1, -1, 1, 0, 1], dtype=torch.int32)
    pack_embeddings(torch.zeros(5, dtype=torch.int64), torch.ones(4, 2), vision, index, impl=impl).sum().backward()
    torch.testing.assert_close(vision.grad, torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize("impl", FP32)
def test_long_sums_accumulate_in_fp32(impl):
    """A bf16 sum of ones stops at 256."""
    embedding = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    vision = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0, -1], dtype=torch.int32).repeat(1024)
    pack_embeddings(torch.zeros(2048, dtype=torch.int64), embedding, vision, index, impl=impl).sum().backward()
    assert embedding.grad.eq(1024).all()
    assert vision.grad.eq(1024).all()


@pytest.mark.parametrize("trained", ["embedding", "vision"])
@pytest.mark.parametrize("impl", FP32)
def test_only_needed_gradients(impl, trained, monkeypatch):
    (token_ids, embedding, vision, vision_index), grad = make(dtype=torch.float32)
    _, *expected = run(calls(impl), (token_ids, embedding, vision, vision_index), grad)
    leaf = (embedding if trained == "embedding" else vision).requires_grad_()
    pack_embeddings(token_ids, embedding, vision, vision_index, impl=impl).backward(grad.float())
    torch.testing.assert_close(leaf.grad, expected[trained == "vision"], rtol=0, atol=0)
    needs = [trained == "embedding", trained == "vision"]
    gradients = BACKWARD(grad.float(), token_ids, vision_index, 11, 7, torch.float32, needs, impl)
    assert [each.shape for each in gradients] == [leaf.shape]


@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
@pytest.mark.parametrize("impl", FP32)
def test_opcheck(impl, layout):
    (token_ids, embedding, vision, vision_index), grad = make(dtype=torch.float32)
    embedding, vision, grad = layout(embedding), layout(vision), layout(grad.float())
    needs = [True, True]
    torch.library.opcheck(BACKWARD, (grad, token_ids, vision_index, 11, 7, torch.float32, needs, impl))
    torch.library.opcheck(BACKWARD, (grad, token_ids, vision_index, 11, 7, torch.bfloat16, [False, True], impl))
    leaves = embedding.requires_grad_(), vision.requires_grad_()
    torch.library.opcheck(FORWARD, (token_ids, *leaves, vision_index, impl))


@pytest.mark.parametrize("impl", FP32)
def test_compiles_twice_at_most(impl):
    def leaves(rows, num_vision):
        (token_ids, embedding, vision, vision_index), _ = make(rows, num_vision=num_vision, dtype=torch.float32)
        return token_ids, embedding, vision.requires_grad_(), vision_index

    counts = count_compilations(
        calls(impl), [leaves(*sizes) for sizes in [(37, 7), (50, 9), (61, 4), (20, 30), (77, 5)]]
    )
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize("impl", [*FP32, None])
def test_compiled_equals_eager(impl):
    inputs, grad = make(dtype=torch.float32)
    compiled = torch.compile(calls(impl), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, inputs, grad), run(calls(impl), inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("impl", FP32)
def test_autocast_does_not_change_it(impl, compiled):
    (token_ids, embedding, vision, vision_index), _ = make(dtype=torch.float32)
    inputs = (token_ids, embedding, vision.bfloat16(), vision_index)
    function = torch.compile(calls(impl), backend="aot_eager", fullgraph=True) if compiled else calls(impl)
    with torch.autocast("cpu", torch.bfloat16):
        output, grad_embedding, grad_vision = run(function, inputs, None)
    torch.testing.assert_close(output, naive(*inputs), rtol=0, atol=0)
    assert (grad_embedding.dtype, grad_vision.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("impl", FP32)
def test_indices_out_of_range(impl):
    (token_ids, embedding, vision, vision_index), _ = make(dtype=torch.float32)
    text, image = int((vision_index < 0).nonzero()[0]), int((vision_index >= 0).nonzero()[0])
    for wrong in (-1, 11):
        ids = token_ids.clone()
        ids[text] = wrong
        with pytest.raises(IndexError, match=rf"token_ids\[{text}\] is {wrong}, outside \[0, 11\)"):
            pack_embeddings(ids, embedding, vision, vision_index, impl=impl)
    index = vision_index.clone()
    index[image] = 7
    with pytest.raises(IndexError, match=rf"vision_index\[{image}\] is 7, outside \[0, 7\)"):
        pack_embeddings(token_ids, embedding, vision, index, impl=impl)


def test_device_assertion(monkeypatch):
    monkeypatch.setattr(reference, "_host_may_read", lambda tensor: False)
    inputs, _ = make()
    torch.testing.assert_close(pack_embeddings(*inputs), naive(*inputs))
    with pytest.raises(RuntimeError, match="vision_index has a value outside"):
        pack_embeddings(*inputs[:3], inputs[3] + 7, impl="reference")


def test_explain_and_unknown_implementation(monkeypatch):
    inputs, _ = make()
    wide = dispatch.explain(pack_embeddings, *inputs)
    assert wide.name == "reference"
    assert wide.reasons["cpu"] == (cpu_backend.MISSING or "it accumulates in fp32, and embedding is torch.float64")
    narrow = [*inputs[:1], inputs[1].float(), inputs[2].half(), inputs[3]]
    assert dispatch.explain(pack_embeddings, *narrow).reasons["cuda"] == (
        "it is written for sm_80, sm_90, sm_100, and the tensors are on cpu"
    )
    assert dispatch.explain(pack_embeddings, *narrow).name == ("cpu" if cpu_backend.MISSING is None else "reference")
    monkeypatch.setattr(cpu_backend, "MISSING", "the compiled module is missing")
    assert dispatch.explain(pack_embeddings, *narrow).reasons["cpu"] == "the compiled module is missing"
    with pytest.raises(ValueError, match="impl='nonsense' is not an implementation"):
        pack_embeddings(*inputs, impl="nonsense")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"token_ids": torch.zeros(37, dtype=torch.int32)}, TypeError, "token_ids is torch.int32, expected"),
        ({"vision_index": torch.zeros(37, dtype=torch.int64)}, TypeError, "vision_index is torch.int64"),
        ({"embedding": torch.zeros(11, 5, dtype=torch.int64)}, TypeError, "embedding is torch.int64"),
        ({"vision": torch.zeros(7, 5, dtype=torch.int64)}, TypeError, "vision is torch.int64"),
        ({"token_ids": torch.zeros(1, 37, dtype=torch.int64)}, ValueError, "token_ids has shape .1, 37."),
        ({"vision_index": torch.zeros(1, 37, dtype=torch.int32)}, ValueError, "vision_index has shape .1, 37."),
        ({"vision_index": torch.zeros(36, dtype=torch.int32)}, ValueError, "vision_index has shape .36,."),
        ({"embedding": torch.zeros(5)}, ValueError, "embedding has shape .5,., expected .V, d."),
        ({"vision": torch.zeros(7)}, ValueError, "vision has shape .7,., expected .M, 5."),
        ({"vision": torch.zeros(7, 4)}, ValueError, "vision has shape .7, 4., expected .M, 5."),
        ({"vision": torch.zeros(7, 5, device="meta")}, ValueError, "vision is on meta, expected cpu"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    names = ("token_ids", "embedding", "vision", "vision_index")
    inputs, _ = make()
    with pytest.raises(error, match=message):
        pack_embeddings(**{**dict(zip(names, inputs, strict=True)), **changed})


def test_dtensor_raises(tmp_path):
    (token_ids, embedding, vision, vision_index), _ = make()
    with dtensors(tmp_path) as distribute, pytest.raises(TypeError, match="embedding is a DTensor"):
        pack_embeddings(token_ids, distribute(embedding), vision, vision_index)


needs_host = pytest.mark.skipif(cpu_backend.MISSING is not None, reason=str(cpu_backend.MISSING))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_host
def test_result_does_not_depend_on_threads(threads):
    inputs, grad = make(300, width=1300, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(calls("cpu"), inputs, grad))
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_host
def test_forked_child_does_not_hang(threads):
    threads(2)
    inputs, _ = make(300, width=1300, dtype=torch.float32)
    expected = pack_embeddings(*inputs, impl="cpu")
    # Compare with NumPy, because PyTorch's own threads would hang there.
    assert_child_ends_well(lambda: np.array_equal(pack_embeddings(*inputs, impl="cpu").numpy(), expected.numpy()))


@needs_host
def test_backward_checks_indices():
    (token_ids, _, _, vision_index), grad = make(dtype=torch.float32)
    for needs, message in ([True, False], "token_ids"), ([False, True], "vision_index"):
        with pytest.raises(IndexError, match=message):
            BACKWARD(grad.float(), token_ids, vision_index, 3, 3, torch.float32, needs, "cpu")
