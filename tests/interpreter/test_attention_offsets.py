"""Attention with offsets beyond 32 bits, and over 128k tokens. Only the programs with the largest offsets run."""

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.ops.attention_common.triton import bwd as common_bwd
from lynx_kernels.ops.attention_common.triton import splits
from lynx_kernels.ops.attention_common.triton.launches import Launch
from lynx_kernels.ops.cross_attention import triton as cross
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall, CrossAttentionCall
from lynx_kernels.ops.prefix_attention import triton as prefix
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall
from lynx_kernels.ops.prefix_attention_decode import triton as decode_host
from tests.interpreter.sparse import run_only
from tests.lynx_kernels.attention_helpers import dense_attention, random, run
from tests.lynx_kernels.forests import Forest
from tests.numbers import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the LSE without keys is log 0

FP16, INT32 = torch.float16, torch.int32
# The largest row stride, in elements: the sixth tile of 32 rows starts beyond 2^31. It is full, and another follows.
FAR_ROWS = 2**24 - 8


def use_launches(monkeypatch, *launches, num_splits=1):
    for operation in (prefix, cross):
        monkeypatch.setattr(operation, "choose_launches", lambda *shape: launches)
    monkeypatch.setattr(cross, "choose_num_splits", lambda *shape: num_splits)


def spread(tensor, *strides):
    """The same values with these strides, in memory of which only the accessed pages exist."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    assert extent > 2**31
    return torch.empty(extent, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def assert_equal(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def _sparse(monkeypatch):
    run_only(monkeypatch, lambda kernel, programs: range(programs))


@pytest.mark.usefixtures("_sparse")
@pytest.mark.parametrize(
    ("tokens", "heads", "strides"),
    [(20, 2, (16, 2**31, 1)), (193, 1, (FAR_ROWS, 16, 1))],
    ids=["heads", "rows"],
)
def test_large_strides(tokens, heads, strides, monkeypatch):
    use_launches(monkeypatch, *[Launch(32, 32, 4, 1)] * 3)
    packed, spans = PackedLayout.causal([tokens]), SpanLayout.from_spans([tokens], [(0, tokens)], tokens)
    *inputs, grad = (random(tokens, heads, 16, dtype=FP16, seed=seed) for seed in range(4))
    for function, layout in [(prefix_attention, packed), (cross_attention, spans)]:
        expected, actual = (
            run(lambda *leaves, f=function, of=layout: (f(*leaves, of, impl="triton"),), each[:3], each[3:])
            for each in ([*inputs, grad], [spread(each, *strides) for each in (*inputs, grad)])
        )
        assert_equal(actual, expected)


@pytest.mark.usefixtures("_sparse")
@pytest.mark.parametrize(
    ("keys", "strides"),
    [(20, (2**31, 32, 16, 1)), (20, (16 * 20, 16, 2**31, 1)), (200, (16, FAR_ROWS, 16, 1))],
    ids=["sequences", "heads", "rows"],
)
def test_caches_with_large_strides(keys, strides, monkeypatch):
    monkeypatch.setattr(decode_host, "choose_launch", lambda *shape: Launch(16, 32, 4, 1))
    heads, sequences = (1, 1) if keys > 20 else (2, 2)
    shapes = [(sequences, 1), *[(sequences * keys,)] * 2, *[(sequences, keys)] * 2]
    q, *caches = (random(*shape, heads, 16, dtype=FP16, seed=i) for i, shape in enumerate(shapes))
    starts = torch.arange(sequences)[:, None, None] * keys
    indices = [torch.cat([starts, starts + keys], 2), torch.full((sequences,), keys)]

    def decode(*caches):
        return prefix_attention_decode(q, *caches, *indices, return_lse=True, impl="triton")

    expected = decode(*caches)
    assert_equal(decode(*caches[:2], *(spread(each, *strides) for each in caches[2:])), expected)
    if strides[0] < 2**31:
        assert_equal(decode(*(spread(each, *strides[1:]) for each in caches[:2]), *caches[2:]), expected)


def last_programs(kernel, programs):
    return range(max(programs - 3, 0), programs)


def large(tokens, *last):
    """Tensors in which only the last tokens are set, to the given values."""
    tensors = [torch.empty(tokens, *each.shape[1:], dtype=each.dtype) for each in last]
    for tensor, values in zip(tensors, last, strict=True):
        tensor[-len(values) :] = values
    return tensors


@pytest.mark.parametrize("window", [None, 3])
def test_many_tokens(window, monkeypatch):
    """The last sequence of a row of 2^31 values: 2^26 tokens and two heads."""
    use_launches(monkeypatch, *[Launch(16, 16, 4, 1)] * 3)
    run_only(monkeypatch, last_programs)
    tokens, last = 2**26 + 5, slice(-5, None)
    inputs = [random(5, 2, 16, dtype=FP16, seed=seed) for seed in range(4)]
    runs = torch.tensor([[0, 0, 1], [tokens - 5, tokens - 5, 2], [tokens, 0, 2]], dtype=INT32)
    token_table = torch.empty(3, tokens, dtype=INT32)
    token_table[:, last] = torch.arange(tokens - 5, tokens)
    token_table[1, last] += 1
    token_table[2, last] = tokens
    options = None, runs, token_table, runs[:, 0], window, None, 0.25, None
    q, k, v, grad = large(tokens, *inputs)
    out, lse = prefix.forward(PrefixAttentionCall(q, k, v, *options))
    *gradients, _ = prefix.backward(PrefixAttentionBackwardCall(grad, None, out, lse, q, k, v, *options))
    visible = Forest([5], [-1], [False], window).visible()
    check_last([out, *gradients], inputs, visible, last)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_many_keys(num_splits, monkeypatch):
    """A span at the end of 2^26 keys."""
    use_launches(monkeypatch, *[Launch(16, 16, 4, 1)] * 3, num_splits=num_splits)
    run_only(monkeypatch, last_programs)
    keys = 2**26 + 5
    q, k, v, grad = (random(size, 2, 16, dtype=FP16, seed=seed) for seed, size in enumerate((3, 5, 5, 3)))
    tile_offsets = torch.zeros(2**20 + 2, dtype=INT32)
    tile_offsets[-1] = 1
    table = torch.tensor([[0, keys - 5, keys], [3, keys, keys]], dtype=INT32), tile_offsets, torch.zeros(1, dtype=INT32)
    far_k, far_v = large(keys, k, v)
    out, lse = cross.forward(CrossAttentionCall(q, far_k, far_v, *table, 0.25))
    grad_q, grad_k, grad_v = cross.backward(
        CrossAttentionBackwardCall(grad, None, out, lse, q, far_k, far_v, *table, 0.25)
    )
    check_last([out, grad_q, grad_k[-5:], grad_v[-5:]], [q, k, v, grad], torch.ones(3, 5, dtype=torch.bool))


def check_last(actual, inputs, visible, last=slice(None)):
    """Check the output and the gradients of the rows that were set."""

    def results(dtype):
        *leaves, grad = (each.to(dtype) for each in inputs)
        return run(lambda q, k, v: dense_attention(q, k, v, visible, 0.25)[:1], leaves, [grad])

    for ours, truth, theirs in zip(actual, results(torch.float64), results(FP16), strict=True):
        assert_within_budget(ours[last], truth, theirs)


def test_combine_of_many_rows(monkeypatch):
    """Two splits of 2^27 rows of 16 values."""
    run_only(monkeypatch, last_programs)
    rows = 2**27 + 1
    num_splits, lse = torch.empty(2, rows, 16), torch.empty(2, rows)
    num_splits[0, -1], num_splits[1, -1], lse[0, -1], lse[1, -1] = 1.0, 4.0, 0.5, 0.5
    splits.combine(num_splits, lse, out := torch.empty(rows, 16), merged := torch.empty(rows))
    torch.testing.assert_close(out[-1], torch.full((16,), 2.5))
    torch.testing.assert_close(merged[-1], torch.tensor(0.5).exp().mul(2).log())


def test_128k_tokens(monkeypatch):
    """One causal sequence: output and gradient of its last queries, and gradients of its first keys."""
    use_launches(monkeypatch, Launch(16, 4096, 4, 1), Launch(16, 4096, 4, 1), Launch(4096, 16, 4, 1))
    monkeypatch.setattr(common_bwd, "_PREPROCESS_ROWS", 8192)
    run_only(
        monkeypatch, lambda kernel, programs: range(programs if kernel == "attention_bwd_preprocess_kernel" else 1)
    )
    tokens, scale = 2**17 + 5, 0.25
    q, k, v, grad, out = (random(tokens, 1, 16, dtype=torch.float32, seed=seed) for seed in range(5))
    lse = torch.arange(1.0, tokens + 1).log()[:, None] + 0.5  # any values will do
    layout = PackedLayout.causal([tokens])
    last = tokens - (tokens - 1) // 16 * 16  # queries of the last tile
    visible = torch.arange(tokens) <= torch.arange(tokens)[-last:, None]
    options = None, layout.runs, layout.tokens, layout.key_runs, None, None, scale, None
    ours, our_lse = prefix.forward(PrefixAttentionCall(q, k, v, *options))
    out[-last:], lse[-last:] = ours[-last:], our_lse[-last:]
    grad_q, grad_k, grad_v, _ = prefix.backward(PrefixAttentionBackwardCall(grad, None, out, lse, q, k, v, *options))

    def of_last_queries(dtype):
        outputs = run(
            lambda *leaves: dense_attention(*leaves, visible, scale),
            [each.to(dtype) for each in (q[-last:], k, v)],
            [grad[-last:].to(dtype), torch.zeros(last, 1)],
        )
        return outputs[:3]

    def of_first_keys(dtype):
        """Computed by P = exp(S - LSE), dV = P^T dO, dK = scale (P * (dO V^T - rowsum(dO * O)))^T Q."""
        rows, columns = [each[:, 0].to(dtype) for each in (q, grad, out)], [each[:16, 0].to(dtype) for each in (k, v)]
        weights = torch.exp(scale * rows[0] @ columns[0].T - lse.to(dtype))
        weights[:16] = weights[:16].tril()
        delta = (rows[1] * rows[2]).sum(1, keepdim=True)
        return (weights * (rows[1] @ columns[1].T - delta)).T @ rows[0] * scale, weights.T @ rows[1]

    actual = [ours[-last:], our_lse[-last:], grad_q[-last:], grad_k[:16, 0], grad_v[:16, 0]]
    exact, plain = ([*of_last_queries(dtype), *of_first_keys(dtype)] for dtype in (torch.float64, torch.float32))
    for ours, truth, theirs in zip(actual, exact, plain, strict=True):
        assert_within_budget(ours, truth, theirs)
