"""Our operations under torch.func.

- `grad`, `vjp` and `grad_and_value` of every differentiable operation: the gradients of `backward`.
- `vmap`, `jacrev`, `jvp`, `jacfwd`, `hessian`, dual tensors and second derivatives: NotImplementedError in our name.
"""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from lynx_kernels import (
    PackedLayout,
    SpanLayout,
    adapter,
    cross_attention,
    linear_cross_entropy,
    pack_embeddings,
    prefix_attention,
    prefix_attention_decode,
    token_log_probs,
)

T, D = 5, 8


def cases():
    """Operation -> a function of its differentiable tensors, and these."""
    torch.manual_seed(0)
    rows = [torch.randn(T, 2, D) for _ in range(3)]
    packed, spans = PackedLayout.from_segments([2, 3], [-1, 0]), SpanLayout.from_spans([2, 3], [(0, 3), (1, 5)], T)
    labels, hidden, head = torch.tensor([1, 2, -100, 0, 3]), torch.randn(T, D), torch.randn(4, D)
    weights = [torch.randn(shape) for shape in ((T, D), (D,), (D,), (3, D), (3,), (D, 3), (D,), (1,))]
    caches = [torch.randn(shape) for shape in ((2, 1, 2, D), (3, 2, D), (3, 2, D), (2, 4, 2, D), (2, 4, 2, D))]
    ids, index = torch.tensor([0, 1, 2, 1]), torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    lengths = torch.tensor([[[0, 3]], [[0, 2]]]), torch.tensor([2, 4])
    return {
        "adapter": (lambda *each: adapter(*each), weights),
        "cross_attention": (lambda *each: cross_attention(*each, spans), rows),
        "prefix_attention": (lambda *each: prefix_attention(*each, packed), rows),
        "prefix_attention_decode": (lambda *each: prefix_attention_decode(*each, *lengths), caches),
        "linear_cross_entropy": (
            lambda h, w: linear_cross_entropy(h, w, labels, num_items=torch.tensor(4)),
            (hidden, head),
        ),
        "linear_cross_entropy, each": (
            lambda h, w: linear_cross_entropy(h, w, labels, reduction="none"),
            (hidden, head),
        ),
        "pack_embeddings": (lambda table, vision: pack_embeddings(ids, table, vision, index), (head, hidden)),
        "token_log_probs": (lambda h, w: token_log_probs(h, w, labels.clamp(min=0)), (hidden, head)),
    }


@pytest.fixture(params=cases())
def case(request):
    function, tensors = cases()[request.param]
    return request.param.partition(",")[0], lambda *each: function(*each).square().sum(), tuple(tensors)


def test_grad_is_that_of_backward(case):
    _, loss, tensors = case
    leaves = [each.clone().requires_grad_() for each in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    places = tuple(range(len(tensors)))
    gradients, value = func.grad_and_value(loss, places)(*tensors)
    torch.testing.assert_close(value, loss(*tensors))
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(func.grad(loss, places)(*tensors), expected)
    torch.testing.assert_close(func.vjp(loss, *tensors)[1](torch.ones(())), expected)
    first = func.grad(lambda first: loss(first, *tensors[1:]))(tensors[0])  # the others do not train
    torch.testing.assert_close(first, expected[0])


@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        (lambda f, x: func.vmap(f)(x[None]), "torch.func.vmap cannot batch it"),
        (lambda f, x: func.vmap(func.grad(f))(x[None]), "torch.func.vmap cannot batch it"),
        (lambda f, x: func.jvp(f, (x,), (x,)), "no forward-mode derivative"),
        (lambda f, x: func.jacfwd(f)(x), "torch.func.vmap cannot batch it|no forward-mode derivative"),
        (lambda f, x: func.hessian(f)(x), "torch.func.vmap cannot batch it|no forward-mode derivative"),
        (lambda f, x: func.grad(lambda x: func.grad(f)(x).sum())(x), "no second derivatives"),
    ],
    ids=["vmap", "vmap of grad", "jvp", "jacfwd", "hessian", "grad of grad"],
)
def test_what_cannot_be_is_refused_by_name(case, transform, problem):
    name, loss, (first, *others) = case
    with pytest.raises(NotImplementedError, match=f"{name}.*({problem})"):
        transform(lambda x: loss(x, *others), first)


def test_jacrev_of_rows_is_refused():
    function, (first, *others) = cases()["adapter"]
    with pytest.raises(NotImplementedError, match="vmap cannot batch it"):
        func.jacrev(lambda x: function(x, *others))(first)


def test_dual_tensors_and_second_derivatives_are_refused(case):
    name, loss, (first, *others) = case
    with forward_ad.dual_level():
        loss(first, *others)  # no tangent
        with pytest.raises(NotImplementedError, match=f"{name}: there is no forward-mode derivative"):
            loss(forward_ad.make_dual(first, first), *others)
    leaf = first.clone().requires_grad_()
    [gradient] = torch.autograd.grad(loss(leaf, *others), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}.*no second derivatives"):
        torch.autograd.grad(gradient.sum(), leaf)
