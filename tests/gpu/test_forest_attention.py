"""prefix_attention in Triton over forests of real lengths: each variant of its kernels, and packing."""

from dataclasses import replace

import pytest
import torch

from lynx_kernels import prefix_attention
from tests.gpu import bench
from tests.lynx_kernels.attention_cases import Case, assert_results_within_budget, grads_of
from tests.lynx_kernels.attention_helpers import dense_attention, random, run
from tests.lynx_kernels.forests import Forest

pytestmark = pytest.mark.usefixtures("cuda")

# Tiles of every kind: a chain; brothers; forks in forks, with empty segments. By the most ranges that a run has.
FORESTS = {
    1: Forest([300, 129, 0, 70], [-1, 0, 1, -1], [False, True, False, False]),
    2: Forest([257, 64, 190, 1, 33], [-1, 0, 0, 0, -1], [False] * 5),
    3: Forest([130, 0, 65, 200, 3, 77, 150], [-1, 0, 1, 0, 3, 3, 5], [True, False, False, True, False, False, True]),
}
VARIANTS = {
    "plain": {},
    "narrow values": {"dim": 192, "value_dim": 128},
    "widest": {"dim": 512},
    "window": {"window": 100},
    "window and sinks": {"window": 100, "sinks": True},
    "window and soft cap": {"window": 100, "softcap": 5.0},
    "chunk": {"chunk": 100},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def make(forest, dtype, *, dim=64, value_dim=None, sinks=False, softcap=None, impl="triton", **local):
    """The operation and plain attention over a forest, and their inputs."""
    forest = replace(forest, **local)
    layout, visible = forest.layout(bench.DEVICE), forest.visible().to(bench.DEVICE)
    shapes = [(layout.num_tokens, 4, dim), (layout.num_tokens, 2, dim), (layout.num_tokens, 2, value_dim or dim), (4,)]
    inputs = [random(*shape, dtype=dtype, seed=i, device=bench.DEVICE) for i, shape in enumerate(shapes)]
    return Case(
        lambda q, k, v, s=None: prefix_attention(q, k, v, layout, softcap=softcap, sinks=s, return_lse=True, impl=impl),
        lambda q, k, v, s=None: dense_attention(q, k, v, visible, softcap=softcap, sinks=s),
        inputs if sinks else inputs[:3],
        [],
    )


def results(case, rows=slice(None)):
    inputs = [each[rows] if each.dim() == 3 else each for each in case.inputs]
    grads = [grad.to(inputs[0].dtype)[rows] for grad in grads_of(case.operation(*case.inputs))]
    return run(case.operation, inputs, grads), grads


@every_variant
@pytest.mark.parametrize("forest", FORESTS.values(), ids=[f"{each} ranges" for each in FORESTS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values(dtype, forest, variant):
    case = make(forest, dtype, **variant)
    actual, grads = results(case)
    # The gradient of a sink sums rowsum(dO * O), which may cancel.
    assert_results_within_budget(actual, case, grads, [0.0] * 5 + [8.0] * (len(actual) - 5))


@every_variant
def test_a_sample_alone_is_bitwise_the_same_in_a_pack(variant):
    """The other sample makes the table of runs wider, so that other kernels run."""
    forest, other = FORESTS[2], FORESTS[3]
    pack = Forest(
        forest.lengths + other.lengths,
        forest.parents + [each if each < 0 else each + len(forest.parents) for each in other.parents],
        forest.full + other.full,
    )
    packed = make(pack, torch.bfloat16, **variant)
    in_pack, grads = results(packed)
    rows = slice(forest.num_tokens)
    alone = make(forest, torch.bfloat16, **variant)
    inputs = [each[rows] if each.dim() == 3 else each for each in packed.inputs]
    for ours, theirs in zip(run(alone.operation, inputs, [each[rows] for each in grads])[:5], in_pack, strict=False):
        assert torch.equal(ours, theirs[rows])


@every_variant
def test_two_runs_agree_bit_by_bit(variant):
    case = make(FORESTS[3], torch.bfloat16, **variant)
    for ours, theirs in zip(results(case)[0], results(case)[0], strict=True):
        assert torch.equal(ours, theirs)
