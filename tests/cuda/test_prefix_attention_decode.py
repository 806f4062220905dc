"""The CUDA kernels of prefix_attention_decode, run on a CPU through the implementation that launches them."""

from functools import partial

import pytest
import torch

from lynx_kernels import prefix_attention_decode
from lynx_kernels.backends.dispatch import explain
from tests.cuda.host_kernels import KernelError, launches
from tests.lynx_kernels.attention_cases import (
    assert_case_within_budget,
    cache_case,
    nothing_to_decode,
    path_case,
    poison_beyond_lengths,
    without_shared_keys,
)
from tests.lynx_kernels.helpers import permuted, shifted

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Roots with several branches, one and none, with several tiles of keys and with none. The branches are in no order.
SEVERAL_TILES = [2, 0, 0, 1, 2, 0], [137, 0, 50, 5], [5, 40, 133, 17, 16, 18]


def case_of(queries, batch=SEVERAL_TILES, *shape, **options):
    return cache_case(queries, batch, *shape, impl="cuda", **options)


def check(*args, **options):
    assert_case_within_budget(case_of(*args, **options), gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 72, 128])
@pytest.mark.parametrize("queries", [1, 3])
def test_head_dims(queries, dim, dtype):
    """Head dimensions that use all lanes of a kernel, and some of them."""
    check(queries, dim=dim, dtype=dtype)


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "batch"),
    [
        (1, 2, 2, ([1, 0], [70, 3], [9, 1])),  # one row
        (1, 2, 2, ([0, 0, 0], [70], [9, 1, 40])),  # up to four
        (1, 1, 1, ([0] * 19, [40], list(range(1, 20)))),  # three tiles over the root
        (2, 3, 1, ([1, 0, 1, 1], [40, 9], [9, 2, 40, 33])),  # 6 rows a branch: one in a tile
        (3, 6, 2, ([0, 1, 0], [40, 9], [9, 3, 40])),  # 9 rows a branch: two tiles
        (5, 7, 1, ([0, 0], [35], [5, 70])),  # 35
        (1, 4, 1, ([0, 1, 0, 1, 0], [35, 40], [1, 2, 3, 4, 5])),  # two branches in a tile, and one
    ],
)
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_tiles_of_rows(queries, heads, kv_heads, batch, multiprocessors, on_host):
    """In one split and in as many as there are tiles of keys."""
    on_host.multiprocessors = multiprocessors
    check(queries, batch, heads, kv_heads)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7, 132])
@pytest.mark.parametrize("dim", [64, 128])
def test_splits(dim, multiprocessors, on_host):
    """Splits of several tiles, of one, and of none because other segments are longer."""
    on_host.multiprocessors = multiprocessors
    check(2, ([0, 1, 0], [300, 10], [5, 150, 2]), dim=dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 30.0])
def test_scales(scale):
    check(2, heads=4, kv_heads=2, dim=16, scale=scale, index_dtype=torch.int64)


def test_scores_for_which_exp_overflows():
    """Larger ones in later tiles and splits, and much smaller ones; then only very negative ones."""
    case = case_of(1, ([0], [200], [40]), dim=8)
    case.inputs[0] *= 100
    case.inputs[1][:100] *= -5
    assert_case_within_budget(case, gradients=False)
    case.inputs[0].abs_()
    for keys in (case.inputs[1], case.inputs[3]):
        keys.abs_().add_(1).neg_()
    assert_case_within_budget(case, gradients=False)


@pytest.mark.parametrize("queries", [2, 5, 40])
def test_newest_keys_are_seen_by_their_own_query_on(queries):
    """As many keys as queries, and a few more, so that some queries see nothing of a tile or a split."""
    check(queries, ([0, 0, 1], [0, 3], [queries, queries + 1, queries + 33]), dim=8, heads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", DTYPES)
def test_queries_of_another_dtype(dtype, narrow):
    """Only the output is rounded. Tiles of wider caches have fewer keys."""
    case = case_of(2, ([0, 1, 0], [20, 3], [5, 2, 19]), dim=16, dtype=dtype)
    q = case.inputs[0].to(narrow)
    out, lse = case.operation(q, *case.inputs[1:])
    expected, expected_lse = case.operation(q.float(), *(each.float() for each in case.inputs[1:]))
    torch.testing.assert_close(out, expected.to(narrow), rtol=0, atol=4 * torch.finfo(narrow).eps)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """The same numbers for caches with the heads outside, as transformers keeps them, for other strides, for keys and
    values of different strides, and for rows that do not start at 16 bytes. The sanitizer stops wide accesses at other
    addresses."""
    case = case_of(2, ([0, 1, 0], [20, 3], [5, 2, 19]), kv_heads=2, dim=16, dtype=dtype)
    expected = case.operation(*case.inputs)
    q, *caches = case.inputs
    heads_outside = [each.transpose(-3, -2).contiguous().transpose(-3, -2) for each in caches]
    mixed = [each if i % 2 else permuted(caches[i]) for i, each in enumerate(heads_outside)]
    spread = [torch.cat([each + 1, each], -1)[..., each.shape[-1] :] for each in caches]
    behind = [torch.cat([each[..., :1], each, each[..., :7]], -1)[..., 1:17] for each in caches]
    odd, half_a_load = ([torch.cat([each, each[..., :by]], -1)[..., :16] for each in caches] for by in (1, 4))
    entries_apart = [
        torch.cat([each.flatten(1), each.flatten(1)[:, :1]], 1)[:, :-1].unflatten(1, each.shape[1:]) for each in caches
    ]
    every_other = [torch.stack([each, each + 1], -1)[..., 0] for each in caches]
    all_permuted = [permuted(each) for each in caches]
    for changed in (
        heads_outside, mixed, spread, behind, odd, half_a_load, entries_apart, every_other, all_permuted
    ):  # fmt: skip
        for ours, theirs in zip(case.operation(permuted(q), *changed), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()
    for ours, theirs in zip(case.operation(shifted(q, 1), *caches), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_strides_of_indices():
    case = case_of(1, ([1, 0], [20, 3], [3, 9]))
    expected = case.operation(*case.inputs)
    indices = case.table
    call = partial(prefix_attention_decode, return_lse=True, impl="cuda")
    for given in (map(permuted, indices), [indices[0], indices[1].long()]):
        for ours, theirs in zip(call(*case.inputs, *given), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "place", "rows"),
    [
        (0, (1, 0, 3), [(1, 0, 3)]),  # a query, by itself
        (1, (2 * 138 + 45, 0), [(branch, query, head) for branch in (0, 4) for query in (0, 1) for head in (0, 1)]),
        (
            2,
            (2 * 138, 1),
            [(branch, query, head) for branch in (0, 4) for query in (0, 1) for head in (2, 3)],
        ),  # a value
        (3, (3, 16, 1), [(3, 1, 2), (3, 1, 3)]),  # a key that the last query alone sees
    ],
)
def test_rows_do_not_affect_each_other(position, place, rows):
    """NaN reaches only the rows that see it."""
    case = case_of(2, heads=4, kv_heads=2)
    expected, expected_lse = case.operation(*case.inputs)
    for row in rows:
        expected[row] = torch.nan
        expected_lse[row] = expected_lse[row] if position == 2 else torch.nan
    case.inputs[position][place] = torch.nan
    for ours, theirs in zip(case.operation(*case.inputs), (expected, expected_lse), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_scores_of_minus_infinity():
    """They give what a query that sees no key gets."""
    case = case_of(1, ([0], [40], [3]), dim=8)
    case.inputs[0].abs_()
    for keys in (case.inputs[1], case.inputs[3]):
        keys.fill_(-torch.inf)
    out, lse = case.operation(*case.inputs)
    assert not out.any()
    assert lse.isneginf().all()


def test_no_shared_keys():
    for case in without_shared_keys(case_of, "cuda"):
        assert_case_within_budget(case, gradients=False)


@pytest.mark.parametrize(("branches", "queries"), [(0, 1), (2, 0)])
def test_nothing_to_decode(branches, queries):
    inputs = nothing_to_decode(branches, queries)
    assert prefix_attention_decode(*inputs, impl="cuda").shape == inputs[0].shape


def test_the_order_of_threads_changes_nothing(on_host):
    case = case_of(3, heads=4, kv_heads=2)
    results = []
    for seed in range(3):
        on_host.seed = seed
        results.append(case.operation(*case.inputs))
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ranges", [[[-1, 2]], [[0, 2]]], "a range is not within the shared keys"),
        ("ranges", [[[0, 2]], [[3, 2]]], "a range is not within the shared keys"),
        ("ranges", [[[0, 2]], [[0, 11]]], "a range is not within the shared keys"),
        ("ranges", [[[0, 2]], [[0, 2**32 + 1]]], "a range is not within the shared keys"),
        ("branch_lengths", [1, 5], "a length exceeds the cache"),
        ("branch_lengths", [1, -1], "a length is negative"),
        ("branch_lengths", [1, 1 - 2**32], "a length exceeds the cache"),
    ],
)
def test_indices_out_of_range(name, value, message, on_host):
    """As on a GPU, the kernel asserts."""
    indices = {"ranges": [[[0, 5]], [[5, 7]]], "branch_lengths": [1, 4]} | {name: value}
    shared, branch, q = torch.ones(10, 1, 8), torch.ones(2, 4, 1, 8), torch.ones(2, 1, 1, 8)
    with pytest.raises(KernelError, match=message):
        on_host.prefix_attention_decode(q, shared, shared, branch, branch, *map(torch.tensor, indices.values()), 1.0)


def test_compiled():
    case = case_of(1, ([1, 0], [20, 3], [3, 9]), dim=16)
    torch._dynamo.reset()
    compiled = torch.compile(prefix_attention_decode, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        compiled(*case.inputs, *case.table, return_lse=True), case.operation(*case.inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


FEW_ROWS = [0, 0], [20], [3, 9]


def reason(inputs, table=None, **options):
    table = case_of(1, FEW_ROWS).table if table is None else table
    return explain(prefix_attention_decode, *inputs, *table, **options).reasons.get("cuda")


def test_what_is_refused():
    inputs = case_of(1, FEW_ROWS).inputs
    assert reason(inputs) is None
    assert reason([each.double() for each in inputs]).endswith("an argument is fp64")
    assert reason(case_of(1, FEW_ROWS, dim=20).inputs).endswith("is a multiple of 8, up to 128, and it is 20")
    assert reason(case_of(1, FEW_ROWS, dim=136).inputs).endswith("is a multiple of 8, up to 128, and it is 136")
    assert reason(case_of(1, FEW_ROWS, value_dim=16).inputs).endswith(
        "need values as wide as keys, and they are 16 and 24"
    )
    for options in ({"window": 3}, {"chunk": 3}, {"softcap": 3.0}, {"sinks": torch.zeros(2)}):
        assert reason(inputs, **options) == f"the CUDA kernels for decoding have no {next(iter(options))}"
    mixed = [*inputs[:4], inputs[4].half()]
    assert reason(mixed) == "the CUDA kernels need caches of one dtype, and these are torch.float16, torch.float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(mixed) is None
    for tensor in inputs:
        tensor.requires_grad_()
        assert reason(inputs) == "the CUDA kernels for decoding have no gradient, and an argument requires one"
        with torch.no_grad():
            assert reason(inputs) is None
        tensor.requires_grad_(False)


def test_more_rows_than_plain_products_are_for():
    """The rows of all branches count, since which of them share a range is known on the device only."""

    def asked(branches, **heads):
        case = case_of(1, ([0] * branches, [4], [1] * branches), **heads)
        return reason(case.inputs, case.table)

    assert asked(8, heads=1) is None
    assert asked(9, heads=1).startswith("9 rows may share a range of keys, and above 8 tensor cores")
    assert asked(8, heads=2, kv_heads=1).endswith("tensor cores are expected to be faster")
    assert asked(8, heads=2, kv_heads=2) is None


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_several_ranges(queries, multiprocessors, on_host):
    """Shared by all, by two and by none, in the same place or another; empty ones; ranges that overlap."""
    on_host.multiprocessors = multiprocessors
    fork = [[0, 90], [90, 131], [0, 0]], [[0, 90], [131, 140], [140, 141]], [[0, 90], [90, 131], [60, 200]]
    other = [[90, 131], [0, 90], [7, 7]]
    case = path_case(queries, 210, [*fork, other], [5, 3, 40, 9], 4, 2, 16, torch.float32, impl="cuda")
    assert_case_within_budget(poison_beyond_lengths(case), gradients=False)


def test_autocast():
    """As transformers calls it: queries and keys in fp32, values in bf16. The same as all in bf16."""
    case = case_of(1, ([0, 1, 0], [20, 3], [5, 2, 19]), dim=16)
    narrow = [each.bfloat16() for each in case.inputs]
    mixed = [each.bfloat16() if i in (2, 4) else each for i, each in enumerate(case.inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.operation(*mixed)
    for ours, theirs in zip(actual, case.operation(*narrow), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# Branches, queries, heads, key heads, head_dim, ranges, shared keys, keys that a branch has room for.
SHAPES = [
    (5, 1, 32, 32, 128, 1, 577, 128), (1, 1, 32, 8, 128, 1, 576, 512), (80, 1, 32, 32, 128, 2, 16 * 577, 128),
    (8, 1, 32, 32, 128, 1, 577, 64), (1, 1, 1, 1, 8, 1, 0, 1), (320, 4, 64, 8, 64, 4, 2**17, 4096),
    (3, 1, 14, 2, 64, 5, 40, 2**20), (32, 1, 1, 1, 64, 1, 2**14, 64), (2, 1, 1, 1, 64, 0, 50, 64),
]  # fmt: skip
NAMES = ("branches", "queries", "heads", "kv_heads", "dim", "ranges", "num_shared", "branch_capacity")


@pytest.mark.parametrize("multiprocessors", [1, 82, 108, 132, 148])
@pytest.mark.parametrize("dtype", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_launches(shape, dtype, multiprocessors):
    """Every row has a place and every key a split. More than one split is made only while all blocks fit on the GPU,
    those of ranges that all branches read."""
    branches, queries, heads, kv_heads, _, ranges, num_shared, branch_capacity = shape
    [[blocks, block_m, tile_branches, m_tiles, range_splits, branch_splits, block_n]] = launches(
        "decode_driver.cpp", **dict(zip(NAMES, shape, strict=True)), cache_dtype=dtype, multiprocessors=multiprocessors
    )
    rows = queries * heads // kv_heads
    assert tile_branches * rows <= block_m or tile_branches == 1
    assert m_tiles == -(-rows // block_m)
    assert blocks == branches * m_tiles * kv_heads * (ranges * range_splits + branch_splits)
    fitting = (3 if block_m == 8 else 4) * multiprocessors
    for splits, capacity, working in (
        (range_splits, num_shared if ranges else 0, ranges * -(-branches // tile_branches) * m_tiles * kv_heads),
        (branch_splits, branch_capacity, branches * m_tiles * kv_heads),
    ):
        assert (splits == 0) == (capacity == 0)
        tiles = -(-capacity // block_n)
        assert splits <= 1 or (splits - 1) * -(-tiles // splits) < tiles  # the last one has a tile, too
        assert splits <= 1 or splits * working <= fitting


def test_blocks_of_beams_occupy_an_h200():
    """Five beams of one image of 576 tokens: the image alone has two blocks a multiprocessor."""
    [[_, block_m, tile_branches, _, range_splits, _, _]] = launches(
        "decode_driver.cpp", **dict(zip(NAMES, SHAPES[0], strict=True)), cache_dtype=2, multiprocessors=132
    )
    assert (block_m, tile_branches) == (8, 8)
    assert 32 * range_splits >= 2 * 132


def test_sizes_that_do_not_fit():
    shape = (2**15, 1, 64, 64, 128, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match=r"the number of blocks is \d+, and the CUDA kernels take less than 2\^30"):
        launches(
            "decode_driver.cpp",
            **dict(zip(NAMES, (2**25, *shape[1:]), strict=True)),
            cache_dtype=2,
            multiprocessors=132,
        )
