import pytest
import torch

from lynx_kernels import PackedLayout, prefix_attention
from lynx_kernels.attention import triton as implementation
from lynx_kernels.attention.triton import Launch
from tests.lynx_kernels.attention_cases import GROUPS_OF_A_BATCH, grads_of
from tests.lynx_kernels.attention_helpers import dense_attention, packed_visible, random, run
from tests.numbers import assert_within_budget

SEVERAL_TILES = [(40, [21, 0, 18]), (0, [35]), (33, []), (0, [3, 19])]


def check_prefix(groups, root_is_causal, dtype, *, heads=4, kv_heads=2, dim=24, scale=None):
    """Output, LSE and gradients through both are within the budget."""
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    visible = packed_visible(groups, root_is_causal)
    inputs = [random(layout.num_tokens, h, dim, dtype=dtype, seed=i) for i, h in enumerate([heads, *[kv_heads] * 2])]

    def ours(q, k, v):
        return prefix_attention(q, k, v, layout, scale=scale, return_lse=True, impl="triton")

    def naive(q, k, v):
        return dense_attention(q, k, v, visible, scale)

    exact_inputs = [each.double() for each in inputs]
    grads = [grad.to(dtype) for grad in grads_of(naive(*exact_inputs))]
    actual, exact, plain = run(ours, inputs, grads), run(naive, exact_inputs, grads), run(naive, inputs, grads)
    plain[1] = naive(*(each.float() for each in inputs))[1]  # the LSE promises fp32
    names = ["output", "lse", "gradient of q", "gradient of k", "gradient of v"]
    for name, value, truth, theirs in zip(names, actual, exact, plain, strict=True):
        assert value.dtype == (torch.float32 if name == "lse" else dtype)
        assert_within_budget(value, truth, theirs, name)


@pytest.mark.parametrize("launch", [Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("root_is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles(dtype, root_is_causal, launch, monkeypatch):
    """Several tiles a segment, ragged ones, in both shapes that make the diagonal cross several tiles."""
    monkeypatch.setattr(implementation, "choose_launches", lambda *shape: (launch,) * 3)
    check_prefix(SEVERAL_TILES, root_is_causal, dtype)


@pytest.mark.parametrize("root_is_causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "scale"), [(3, 1, 7, -0.3), (1, 1, 88, None), (2, 2, 33, 0.0)])
def test_heads_and_scales(heads, kv_heads, dim, scale, root_is_causal):
    check_prefix(GROUPS_OF_A_BATCH, root_is_causal, torch.float32, heads=heads, kv_heads=kv_heads, dim=dim, scale=scale)


def test_no_tokens():
    layout = PackedLayout.from_groups([(0, []), (0, [0])])
    q = torch.empty(0, 2, 16)
    assert prefix_attention(q, q, q, layout, impl="triton").shape == q.shape
