"""Prefix attention in Triton over random forests of segments: values, leaks, NaN, packing, and what is left out."""

import random as python_random
from dataclasses import replace

import pytest
import torch

from lynx_kernels.ops.attention_common.triton.launches import Launch
from lynx_kernels.ops.prefix_attention import triton as implementation
from tests.interpreter.test_prefix_attention import FORKS, check, forest_of, make, use_launch
from tests.lynx_kernels.attention_helpers import run
from tests.lynx_kernels.forests import random_forest

LAUNCHES = [Launch(16, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)]
SEEDS = 200
LENGTHS = [(0, 1, 2, 3, 5), (0, 1, 4, 9), (1, 2, 17, 33)]  # of segments
DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16]

# Full segments of every length below, in every kind of locality.
FULL = [True, False, True, True, False, True]
LOCAL = {
    "plain": {},
    "window": {"window": 7},
    "window and full": {"window": 7, "full": FULL},
    "chunk and full": {"chunk": 6, "full": FULL},
}
every_locality = pytest.mark.parametrize("locality", LOCAL.values(), ids=LOCAL)


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_random_forests(first, monkeypatch):
    """Every combination of forest, locality, soft cap, sinks, head dimensions, heads, dtype and tiles is drawn."""
    for seed in range(first, first + 10):
        rng = python_random.Random(seed)
        forest = random_forest(rng, rng.choice(LENGTHS))
        while forest.num_tokens > 96:
            forest = random_forest(rng, rng.choice(LENGTHS))
        use_launch(monkeypatch, rng.choice(LAUNCHES))
        heads, kv_heads = rng.choice([(1, 1)] * 8 + [(2, 1), (6, 3)])
        dim, value_dim = rng.choice([(16, 16), (24, 8), (7, 5)])
        options = {"scale": rng.choice([None, None, -0.7]), "softcap": rng.choice([None, None, 2.0])}
        options |= {"sinks": rng.random() < 0.4, "dtype": rng.choice(DTYPES)}
        try:
            # For a token that sees only itself, the gradient of q cancels; its rounding errors are of dO V, about 4.
            check(forest, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, magnitude=4.0, **options)
        except Exception as error:
            error.add_note(f"seed {seed}: {forest}, {options}, {heads} of {kv_heads} heads, D = {dim}, {value_dim}")
            raise


@pytest.fixture
def _small_tiles(monkeypatch):
    use_launch(monkeypatch, Launch(16, 16, 4, 1))


def rows_that_differ(before, after):
    return (before != after).flatten(1).any(1)


@pytest.mark.usefixtures("_small_tiles")
@every_locality
@pytest.mark.parametrize("token", [18, 45])
def test_no_information_leaks(token, locality):
    """Forward, a token reaches only the tokens that see it. Backward, it reaches only the tokens that it sees."""
    forest = replace(FORKS, **locality)
    operation, _, inputs, grads = make(forest, sinks=token == 18, softcap=3.0 if token == 45 else None)
    visible = forest.visible()
    leaves = [each.requires_grad_() for each in inputs]
    outputs = operation(*leaves)
    changed = [each.detach().clone() for each in inputs]
    for each in changed[:3]:
        each[token] += 0.5
    out, lse = operation(*changed)
    for before, after in zip(outputs, (out, lse), strict=True):
        assert torch.equal(rows_that_differ(before, after), visible[:, token])
    only_of_token = [torch.zeros_like(grad) for grad in grads]
    for only, grad in zip(only_of_token, grads, strict=True):
        only[token] = grad[token]
    grad_q, grad_k, grad_v, *_ = torch.autograd.grad(outputs, leaves, only_of_token)
    none = torch.zeros(())
    seen = visible[token]
    assert torch.equal(rows_that_differ(grad_v, none), seen)
    if seen.sum() > 1 or len(inputs) > 3:  # else the softmax is constant
        assert torch.equal(rows_that_differ(grad_q, none), torch.arange(len(seen)) == token)
        assert torch.equal(rows_that_differ(grad_k, none), seen)


@pytest.mark.usefixtures("_small_tiles")
@every_locality
def test_nan_stays_in_its_tree(locality):
    """Between two other trees, whose tiles it shares if tiles start at aligned rows."""
    forest = forest_of((5, 3, 4, 20, 2, 3), (-1, 0, 0, -1, 3, -1), **locality)
    operation, _, inputs, grads = make(forest, sinks=True)
    tree, others = slice(12, 34), [*range(12), *range(34, 37)]
    expected = run(operation, inputs, grads)
    for each in [*inputs[:3], *grads]:
        each[tree] = torch.nan
    for ours, theirs in zip(run(operation, inputs, grads)[:5], expected, strict=False):
        assert torch.equal(ours[others], theirs[others])
        assert ours[tree].isnan().all()


@pytest.mark.usefixtures("_small_tiles")
@every_locality
@pytest.mark.parametrize("branch", [slice(17, 26), slice(43, 59)], ids=str)
def test_nan_in_a_branch_stays_on_its_path(branch, locality):
    """It never reaches a token that is on no path with it. The first branch goes on in the run of the root."""
    forest = replace(FORKS, **locality)
    paths = [[segment, *forest.ancestors(segment)] for segment, _, _ in forest.tokens()]
    segments = {path[0] for path in paths[branch]}
    others = [
        row for row, path in enumerate(paths)
        if not segments & set(path) and not any(path[0] in forest.ancestors(each) for each in segments)
    ]  # fmt: skip
    assert others
    operation, _, inputs, grads = make(forest)
    expected = run(operation, inputs, grads)
    for each in [*inputs, *grads]:
        each[branch] = torch.nan
    for name, ours, theirs in zip(["out", "lse", "q", "k", "v"], run(operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours[others], theirs[others]), name
        assert ours[branch].isnan().all(), name


PACKED = {
    "one range": forest_of((40, 3), (-1, 0)),
    "two ranges": forest_of((20, 9, 18), (-1, 0, 0)),
    "three ranges": forest_of((5, 2, 9, 4, 19), (-1, 0, 0, 2, 2)),
    "window": forest_of((20, 9, 18), (-1, 0, 0), window=11),
    "chunk and full": forest_of((20, 9, 18), (-1, 0, 0), (True, False, True), chunk=8),
}


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("forest", PACKED.values(), ids=PACKED)
def test_packing_changes_no_bit(forest):
    """A sample alone, and the same between others that make the table wider."""
    before, after = forest_of((1, 6), (-1, 0)), forest_of((2, 1, 2, 1, 2, 1, 2), (-1, 0, 0, 2, 2, 4, 4))
    parts, lengths, parents, full = [before, forest, after], [], [], []
    for part in parts:
        parents += [each if each < 0 else each + len(lengths) for each in part.parents]
        lengths += part.lengths
        full += part.full
    pack = replace(forest, lengths=lengths, parents=parents, full=full)
    rows = slice(before.num_tokens, before.num_tokens + forest.num_tokens)
    assert pack.layout().max_ranges == 4
    operation, _, inputs, grads = make(pack, sinks=True)
    alone, *_ = make(forest, sinks=True)
    own = [each if each.dim() == 1 else each[rows] for each in inputs]
    for ours, theirs in zip(
        run(alone, own, [each[rows] for each in grads])[:5], run(operation, inputs, grads), strict=False
    ):
        assert torch.equal(ours, theirs[rows])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("locality", [{"window": 9}, {"chunk": 9}], ids=str)
@pytest.mark.parametrize(
    ("hidden", "others"), [(slice(0, 32), slice(48, None)), (slice(64, None), slice(0, 32))], ids=str
)
def test_tiles_beyond_a_window_are_not_visited(hidden, others, locality):
    """NaN there changes nothing, though 0 * NaN is NaN in tiles that are masked."""
    operation, _, inputs, grads = make(forest_of((64, 5, 40), (-1, 0, 0), **locality))
    expected = run(operation, inputs, grads)
    for each in [*inputs, *grads]:
        each[hidden] = torch.nan
    for ours, theirs in zip(run(operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours[others], theirs[others])


@pytest.mark.usefixtures("_small_tiles")
def test_subtrees_beyond_a_window_are_skipped(monkeypatch):
    """The first keys of the trunk look at their own run and at one that starts too late, not at the eleven below it."""
    visited = []
    visit = implementation.bwd.bwd_dkdv_queries
    monkeypatch.setattr(implementation.bwd, "bwd_dkdv_queries", lambda *a: (visited.append(1), visit(*a))[1])
    operation, _, inputs, grads = make(forest_of((32, 1, 1, *[1] * 12), (-1, 0, 0, *[2] * 12), window=4))
    run(operation, inputs, grads)
    # Two tiles of the trunk, of which all twelve other runs see the last; its first child; the second with eleven runs
    # below; and twelve that no other run sees.
    assert len(visited) == 2 + 13 + 1 + 12 + 12
