import pytest
import torch
from torch.nn import functional as F

from lynx_kernels import dispatch
from lynx_kernels.embeddings import pack_embeddings, reference
from tests.lynx_kernels.helpers import check, count_compilations, dtensors, permuted, run

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORWARD = torch.ops.lynx_kernels.pack_embeddings.default
BACKWARD = torch.ops.lynx_kernels.pack_embeddings_backward.default


def naive(token_ids, embedding, vision, vision_index):
    rows = [
        vision[index].to(embedding.dtype) if index >= 0 else embedding[token]
        for token, index in zip(token_ids.tolist(), vision_index.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else embedding[:0]


def make(rows=37, vocabulary=11, num_vision=7, width=5, dtype=torch.float64):
    """Inputs with repeated and unused rows on both sides and nonsense token ids under the vision rows."""
    generator = torch.Generator().manual_seed(rows)
    token_ids = torch.randint(0, vocabulary - 1, (rows,), generator=generator)  # the last token never occurs
    vision_index = torch.randint(-3, max(num_vision - 1, 1), (rows,), generator=generator, dtype=torch.int32)
    if num_vision == 0:
        vision_index.fill_(-1)
    token_ids[vision_index >= 0] = torch.where(torch.arange(rows) % 2 == 0, -1, vocabulary + 5)[vision_index >= 0]
    embedding = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    vision = torch.randn(num_vision, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (token_ids, embedding.to(dtype), vision.to(dtype), vision_index), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 37, 130])
def test_equals_indexing(rows, dtype):
    inputs, grad = make(rows, dtype=dtype)
    output = pack_embeddings(*inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output, naive(*inputs), rtol=0, atol=0)
    check(pack_embeddings, naive, inputs, grad)
    check(pack_embeddings, naive, inputs)  # an expanded gradient


def test_gradcheck():
    (token_ids, embedding, vision, vision_index), _ = make()
    leaves = embedding.requires_grad_(), vision.requires_grad_()
    assert torch.autograd.gradcheck(lambda e, v: pack_embeddings(token_ids, e, v, vision_index), leaves)


def test_permuted_inputs_and_gradient():
    inputs, grad = make()
    expected = run(pack_embeddings, inputs, grad)
    actual = run(pack_embeddings, [permuted(each) for each in inputs], permuted(grad))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_expanded_inputs():
    (token_ids, embedding, vision, vision_index), grad = make()
    inputs = (token_ids, embedding[:, :1].expand_as(embedding), vision[:1].expand_as(vision), vision_index)
    check(pack_embeddings, naive, inputs, grad)


def test_no_vision_and_no_text():
    inputs, grad = make(num_vision=0)
    output, grad_embedding, grad_vision = run(pack_embeddings, inputs, grad)
    torch.testing.assert_close(output, F.embedding(inputs[0], inputs[1]), rtol=0, atol=0)
    assert grad_vision.shape == (0, 5)
    assert grad_embedding[-1].eq(0).all()
    vision = torch.randn(3, 5)
    index = torch.tensor([2, 2, 0], dtype=torch.int32)
    output = pack_embeddings(torch.full((3,), -1), torch.empty(0, 5), vision, index)
    torch.testing.assert_close(output, vision[[2, 2, 0]], rtol=0, atol=0)


def test_repeated_and_unused_rows():
    vision = torch.ones(3, 2, requires_grad=True)
    index = torch.tensor([1, -1, 1, 0, 1], dtype=torch.int32)
    pack_embeddings(torch.zeros(5, dtype=torch.int64), torch.ones(4, 2), vision, index).sum().backward()
    torch.testing.assert_close(vision.grad, torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.0, 0.0]]))


def test_long_sums_are_wide():
    """In bf16 adding ones stops at 256."""
    embedding = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    vision = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0, -1], dtype=torch.int32).repeat(1024)
    pack_embeddings(torch.zeros(2048, dtype=torch.int64), embedding, vision, index).sum().backward()
    assert embedding.grad.eq(1024).all()
    assert vision.grad.eq(1024).all()


def test_mixed_dtypes_follow_the_table():
    (token_ids, embedding, vision, vision_index), _ = make()
    embedding = embedding.bfloat16().requires_grad_()
    vision = vision.float().requires_grad_()
    output = pack_embeddings(token_ids, embedding, vision, vision_index)
    output.sum().backward()
    assert output.dtype == embedding.grad.dtype == torch.bfloat16
    assert vision.grad.dtype == torch.float32


@pytest.mark.parametrize("trained", ["embedding", "vision"])
def test_only_the_gradients_asked_for(trained, monkeypatch):
    (token_ids, embedding, vision, vision_index), grad = make()
    _, *expected = run(pack_embeddings, (token_ids, embedding, vision, vision_index), grad)
    sums = []
    sum_rows = reference._sum_rows
    monkeypatch.setattr(reference, "_sum_rows", lambda *args: sums.append(args) or sum_rows(*args))
    leaf = (embedding if trained == "embedding" else vision).requires_grad_()
    pack_embeddings(token_ids, embedding, vision, vision_index).backward(grad)
    torch.testing.assert_close(leaf.grad, expected[trained == "vision"])
    assert len(sums) == 1


@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
def test_opcheck(layout):
    (token_ids, embedding, vision, vision_index), grad = make(dtype=torch.float32)
    embedding, vision, grad = layout(embedding), layout(vision), layout(grad)
    needs = [True, True]
    torch.library.opcheck(BACKWARD, (grad, token_ids, vision_index, 11, 7, torch.float32, needs, "reference"))
    torch.library.opcheck(BACKWARD, (grad, token_ids, vision_index, 11, 7, torch.bfloat16, [False, True], "reference"))
    leaves = embedding.requires_grad_(), vision.requires_grad_()
    torch.library.opcheck(FORWARD, (token_ids, *leaves, vision_index, "reference"))


def test_compiles_twice_at_most():
    def leaves(rows, num_vision):
        (token_ids, embedding, vision, vision_index), _ = make(rows, num_vision=num_vision)
        return token_ids, embedding, vision.requires_grad_(), vision_index

    counts = count_compilations(
        pack_embeddings, [leaves(*sizes) for sizes in [(37, 7), (50, 9), (61, 4), (20, 30), (77, 5)]]
    )
    assert counts[-1] == counts[2] <= 3


def test_compiled_equals_eager():
    inputs, grad = make()
    compiled = torch.compile(pack_embeddings, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, inputs, grad), run(pack_embeddings, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_leaves_it_alone(compiled):
    (token_ids, embedding, vision, vision_index), _ = make(dtype=torch.float32)
    inputs = (token_ids, embedding, vision.bfloat16(), vision_index)
    function = torch.compile(pack_embeddings, backend="aot_eager", fullgraph=True) if compiled else pack_embeddings
    with torch.autocast("cpu", torch.bfloat16):
        output, grad_embedding, grad_vision = run(function, inputs, None)
    torch.testing.assert_close(output, naive(*inputs), rtol=0, atol=0)
    assert (grad_embedding.dtype, grad_vision.dtype) == (torch.float32, torch.bfloat16)


def test_indices_out_of_range():
    (token_ids, embedding, vision, vision_index), _ = make()
    text, picture = int((vision_index < 0).nonzero()[0]), int((vision_index >= 0).nonzero()[0])
    for wrong in (-1, 11):
        ids = token_ids.clone()
        ids[text] = wrong
        with pytest.raises(IndexError, match=rf"token_ids\[{text}\] is {wrong}, outside \[0, 11\)"):
            pack_embeddings(ids, embedding, vision, vision_index)
    index = vision_index.clone()
    index[picture] = 7
    with pytest.raises(IndexError, match=rf"vision_index\[{picture}\] is 7, outside \[0, 7\)"):
        pack_embeddings(token_ids, embedding, vision, index)


def test_a_device_asserts(monkeypatch):
    monkeypatch.setattr(reference, "_host_may_read", lambda tensor: False)
    inputs, _ = make()
    torch.testing.assert_close(pack_embeddings(*inputs), naive(*inputs))
    with pytest.raises(RuntimeError, match="vision_index has a value outside"):
        pack_embeddings(*inputs[:3], inputs[3] + 7)


def test_which_and_unknown_implementation():
    inputs, _ = make()
    assert str(dispatch.which(pack_embeddings, *inputs)) == "reference"
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


def test_dtensor_is_refused(tmp_path):
    (token_ids, embedding, vision, vision_index), _ = make()
    with dtensors(tmp_path) as distribute, pytest.raises(TypeError, match="embedding is a DTensor"):
        pack_embeddings(token_ids, distribute(embedding), vision, vision_index)
