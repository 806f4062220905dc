"""prefix_attention over random forests, compared with brute force: values, LSE and every gradient.

``FORESTS=10000 pytest tests/lynx_kernels/test_forest_attention.py`` tries more of them. The forests of every run are
the same.
"""

import os
import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lynx_kernels import PackedLayout, explain, prefix_attention
from tests.lynx_kernels.attention_helpers import dense_attention, run
from tests.lynx_kernels.attention_helpers import random as normal
from tests.lynx_kernels.forests import Forest, random_forest
from tests.lynx_kernels.helpers import count_compilations
from tests.numbers import assert_within_budget

FORESTS = int(os.environ.get("FORESTS", 1000))
BATCHES = 10  # tests that share them
LONG = (0, 1, 17, 40, 130)  # lengths that make several tiles


@dataclass
class Call:
    """A call of prefix_attention over a forest: shapes and options."""

    forest: Forest
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float | None
    softcap: float | None
    has_sinks: bool

    @classmethod
    def draw(cls, rng: random.Random, forest: Forest) -> "Call":
        kv_heads, dim = rng.choice([1, 2, 3]), rng.choice([1, 5, 16, 24, 64])
        return cls(
            forest,
            kv_heads * rng.choice([1, 2]),
            kv_heads,
            dim,
            rng.choice([dim, dim, max(1, dim // 2)]),
            rng.choice([None, None, 0.3, -0.2, 0.0]),
            rng.choice([None, None, None, 1.5]),
            rng.random() < 0.3,
        )

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v and, if there are, the sinks."""
        tokens = self.forest.num_tokens
        shapes = [(tokens, self.heads, self.dim), (tokens, self.kv_heads, self.dim)]
        shapes += [(tokens, self.kv_heads, self.value_dim), *([(self.heads,)] if self.has_sinks else [])]
        return [normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]

    def grads(self) -> list[Tensor]:
        tokens = self.forest.num_tokens
        return [normal(tokens, self.heads, self.value_dim, seed=8), normal(tokens, self.heads, seed=9)]

    def operation(self, q, k, v, sinks=None, *, impl="cpu", layout=None):
        layout = self.forest.layout() if layout is None else layout
        options = {"scale": self.scale, "softcap": self.softcap, "sinks": sinks}
        return prefix_attention(q, k, v, layout, **options, return_lse=True, impl=impl)

    def naive(self, visible, q, k, v, sinks=None):
        return dense_attention(q, k, v, visible, self.scale, self.softcap, sinks)

    def magnitude(self, inputs: list[Tensor], grads: list[Tensor]) -> float:
        """The size of the terms dO V^T - delta of the gradients. Where a query sees one key they cancel to 0."""
        q, k, v = (each.double() for each in inputs[:3])
        if not q.numel():
            return 1.0
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        terms = torch.einsum("qhd,khd->hqk", grads[0], v).abs().max().item() + grads[1].abs().max().item()
        scale = self.dim**-0.5 if self.scale is None else abs(self.scale)
        return terms * max(1.0, scale * max(q.abs().max().item(), k.abs().max().item()))

    def check(self, dtype: torch.dtype, impl: str) -> None:
        visible, grads, inputs = self.forest.visible(), self.grads(), self.inputs(dtype)
        actual = run(partial(self.operation, impl=impl), inputs, grads)
        exact, plain = (
            run(partial(self.naive, visible), [each.to(precision) for each in inputs], grads)
            for precision in (torch.float64, dtype)
        )
        magnitude = self.magnitude(inputs, grads)
        names = ["output", "lse", "dq", "dk", "dv", "dsinks"][: len(actual)]
        for name, ours, truth, theirs in zip(names, actual, exact, plain, strict=True):
            assert_within_budget(ours.to(theirs.dtype), truth, theirs, f"{name} of {self}", magnitude)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_forests(batch):
    rng = random.Random(batch)
    for _ in range(FORESTS // BATCHES):
        Call.draw(rng, random_forest(rng)).check(torch.float32, "cpu")


def test_random_forests_of_several_tiles():
    rng = random.Random(100)
    for _ in range(FORESTS // 50):
        Call.draw(rng, random_forest(rng, LONG)).check(torch.float32, "cpu")


def test_random_forests_in_bf16():
    rng = random.Random(200)
    for _ in range(FORESTS // 50):
        replace(Call.draw(rng, random_forest(rng, LONG)), scale=None).check(torch.bfloat16, "cpu")


def test_the_reference():
    rng = random.Random(300)
    for _ in range(FORESTS // 20):
        call = Call.draw(rng, random_forest(rng))
        inputs, grads = call.inputs(), call.grads()
        expected = run(partial(call.naive, call.forest.visible()), inputs, grads)
        for ours, theirs in zip(run(partial(call.operation, impl="reference"), inputs, grads), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [256, 320, 512])
def test_wide_heads(dim):
    forest = Forest([20, 13, 9], [-1, 0, 0], [True, False, False], window=11)
    call = Call(forest, 2, 1, dim, dim - 64, None, 20.0, True)
    assert explain(prefix_attention, *call.inputs(torch.float32)[:3], forest.layout()).name == "cpu"
    call.check(torch.float32, "cpu")
    call.check(torch.bfloat16, "cpu")


def may_differ(actual: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """For each result the rows (T,) that are not bit for bit the same."""
    return [
        (ours != theirs).flatten(1).any(1) | (ours.isnan() != theirs.isnan()).flatten(1).any(1)
        for ours, theirs in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_information_leaks(impl):
    """A token that changes, changes exactly what may see it. The bits of everything else stay."""
    rng = random.Random(400)
    for _ in range(60):
        forest = random_forest(rng)
        if not forest.num_tokens:
            continue
        call = Call(forest, 2, 1, 8, 8, None, None, False)
        visible, token = forest.visible(), rng.randrange(forest.num_tokens)
        inputs, grads = call.inputs(torch.float32), call.grads()
        before = run(partial(call.operation, impl=impl), inputs, grads)
        changed = [each.clone() for each in inputs]
        for each in changed[1:]:
            each[token] += 1
        out, lse, *_ = may_differ(run(partial(call.operation, impl=impl), changed, grads)[:2], before[:2])
        sees = visible[:, token]
        assert torch.equal(out, sees)
        assert not (lse & ~sees).any()
        grads[0][token] += 1  # of the output of one query: only that query, and what it sees, notice
        _, _, dq, dk, dv = may_differ(run(partial(call.operation, impl=impl), inputs, grads), before)
        assert not (dq & (torch.arange(len(dq)) != token)).any()
        assert not ((dk | dv) & ~visible[token]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_branch(dtype):
    """It reaches neither another tree nor a sibling, forward or backward."""
    rng = random.Random(500)
    for _ in range(60):
        forest = random_forest(rng)
        segment_of = [segment for segment, _, _ in forest.tokens()]
        if not segment_of:
            continue
        poisoned = rng.choice(segment_of)
        family = {poisoned, *forest.ancestors(poisoned)}
        family |= {each for each in range(len(forest.lengths)) if poisoned in forest.ancestors(each)}
        is_family = torch.tensor([segment in family for segment in segment_of])
        is_poisoned = torch.tensor(segment_of) == poisoned
        call = Call(forest, 2, 1, 8, 8, None, None, False)
        inputs, grads = call.inputs(dtype), call.grads()
        for each in [*inputs, *grads]:
            each[is_poisoned] = float("nan")
        for result in run(call.operation, inputs, grads):
            assert result[~is_family].isfinite().all(), (forest, poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_alone_is_bitwise_the_same_in_any_pack(dtype):
    rng = random.Random(600)
    for number in range(30):
        lengths = LONG if number % 3 == 0 else (0, 0, 1, 2, 3, 5, 7, 9)
        alone = random_forest(rng, lengths)
        alone = replace(alone, parents=[-1, *(max(0, parent) for parent in alone.parents[1:])])  # one tree
        before, after = (random_forest(rng, lengths, local=False) for _ in range(2))
        shift = len(before.parents)
        packed = Forest(
            before.lengths + alone.lengths + after.lengths,
            before.parents
            + [p + shift if p >= 0 else -1 for p in alone.parents]
            + [p + shift + len(alone.parents) if p >= 0 else -1 for p in after.parents],
            before.full + alone.full + after.full,
            alone.window,
            alone.chunk,
        )
        start, end = before.num_tokens, before.num_tokens + alone.num_tokens
        call = Call(packed, 4, 2, 16, 16, None, None, False)
        inputs, grads = call.inputs(dtype), call.grads()
        whole = run(call.operation, inputs, grads)
        single = replace(call, forest=alone)
        part = run(single.operation, [each[start:end] for each in inputs], [each[start:end] for each in grads])
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[start:end]), alone


def test_shared_is_repeated():
    """A shared prompt gives what it gives when it stands before each branch, gradients summed."""
    root, branches = 70, [30, 1, 45]
    shared = Call(Forest([root, *branches], [-1, 0, 0, 0], [False] * 4), 4, 2, 16, 16, None, None, True)
    inputs, grads = shared.inputs(torch.float32), shared.grads()
    grads[0][:root] = grads[1][:root] = 0
    rows, start = [], root
    for length in branches:
        rows += [*range(root), *range(start, start + length)]
        start += length
    repeated = replace(shared, forest=Forest([root + each for each in branches], [-1] * 3, [False] * 3))
    grads_of_rows = [each[rows].clone() for each in grads]

    def by_repeating(q, k, v, sinks):
        out, lse = repeated.operation(q[rows], k[rows], v[rows], sinks)
        return out, lse

    ours = run(shared.operation, inputs, grads)
    theirs = run(by_repeating, inputs, grads_of_rows)
    for result, of_rows in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(result[rows], of_rows, rtol=2e-5, atol=2e-6)
    for result, expected in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_one_graph_for_all_forests():
    rng = random.Random(700)
    forests = [random_forest(rng, (1, 2, 3, 5, 9), local=False) for _ in range(300)]
    layouts = [each.layout() for each in forests if each.num_tokens > 2]

    def attend(q, layout):
        return prefix_attention(q, q, q, layout, impl="reference")

    counts = count_compilations(
        attend, [(normal(each.num_tokens, 2, 4, dtype=torch.float32).requires_grad_(), each) for each in layouts]
    )
    assert counts[-1] <= 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number or None"),
        ({"softcap": float("nan")}, ValueError, "softcap is nan"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\), expected \(2,\), one a head"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, TypeError, "sinks"),
    ],
)
def test_invalid_options(options, error, message):
    q = torch.zeros(4, 2, 8)
    with pytest.raises(error, match=f"prefix_attention: .*{message}|prefix_attention: {message}"):
        prefix_attention(q, q, q, PackedLayout.causal([4]), **options)
    with pytest.raises(ValueError, match="v has head dimension 9, q has 8; it may be from 1 to that"):
        prefix_attention(q, q, torch.zeros(4, 2, 9), PackedLayout.causal([4]))
