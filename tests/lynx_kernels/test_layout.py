import io
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_kernels import PackedLayout, SpanLayout
from lynx_kernels.layout import KEY_TILE
from tests.lynx_kernels.attention_helpers import EXAMPLES, GROUPS, packed_visible, span_visible, spans, tokens_of
from tests.lynx_kernels.helpers import count_compilations

LENGTHS = st.lists(st.integers(0, 6), max_size=6)


def assert_same(layout, expected):
    """Both layouts describe the same tokens. Their tables may differ."""
    assert torch.equal(layout.visible(), expected.visible())
    assert torch.equal(layout.position_ids, expected.position_ids)


def position_ids(groups):
    return [place + (groups[group][0] if part > 0 else 0) for group, part, place in tokens_of(groups)]


@EXAMPLES
@given(GROUPS, st.booleans())
def test_from_groups(groups, root_is_causal):
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    lengths = [sum([root, *branches]) for root, branches in groups]
    assert layout.num_tokens == sum(lengths)
    assert torch.equal(layout.visible(), packed_visible(groups, root_is_causal))
    assert layout.position_ids.tolist() == position_ids(groups)
    assert layout.position_ids.dtype == torch.int64
    assert layout.has_full is (not root_is_causal and any(root > 1 for root, _ in groups))
    assert layout.max_length == max((root + max([0, *branches]) for root, branches in groups), default=0)


@EXAMPLES
@given(GROUPS, st.booleans())
def test_every_key_is_seen_by_one_interval(groups, root_is_causal):
    first, last = PackedLayout.from_groups(groups, root_is_causal=root_is_causal).key_intervals()
    assert first.dtype == last.dtype == torch.int32
    for key, seen_by in enumerate(packed_visible(groups, root_is_causal).T):
        queries = seen_by.nonzero().flatten().tolist()
        assert queries == list(range(int(first[key]), int(last[key])))


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5), st.booleans())
def test_from_prefixes(samples, root_is_causal):
    prefixes, texts = [prefix for prefix, _ in samples], [text for _, text in samples]
    layout = PackedLayout.from_prefixes(prefixes, texts, root_is_causal=root_is_causal)
    groups = [(prefix, [text]) for prefix, text in samples]
    assert_same(layout, PackedLayout.from_groups(groups, root_is_causal=root_is_causal))


@EXAMPLES
@given(LENGTHS)
def test_causal_and_full(lengths):
    causal, full = PackedLayout.causal(lengths), PackedLayout.full(lengths)
    blocks = torch.block_diag(*[torch.ones(length, length) for length in lengths]).bool()
    blocks = blocks.reshape(sum(lengths), sum(lengths))
    assert torch.equal(full.visible(), blocks)
    assert torch.equal(causal.visible(), blocks.tril())
    positions = [place for length in lengths for place in range(length)]
    assert causal.position_ids.tolist() == full.position_ids.tolist() == positions


def test_equal_is_full_with_equal_lengths():
    for count, length in ((1, 5), (4, 7)):
        assert_same(PackedLayout.equal(count, length), PackedLayout.full([length] * count))
    assert torch.equal(PackedLayout.equal(0, 3).runs, PackedLayout.full([]).runs)
    with pytest.raises(ValueError, match="too many for int32 offsets"):
        PackedLayout.equal(2**16, 2**15, device="meta")


def test_lengths_may_be_any_integers():
    groups = [(np.int64(3), [np.int32(2), torch.tensor(4)]), (0, (5,))]
    layout = PackedLayout.from_groups(groups)
    assert_same(layout, PackedLayout.from_groups([(3, [2, 4]), (0, [5])]))
    spans = SpanLayout.from_spans(np.array([2, 1]), torch.tensor([[0, 3], [1, 3]]), np.int64(3))
    assert torch.equal(spans.visible(), span_visible([2, 1], [(0, 3), (1, 3)], 3))
    for each in (layout, spans):
        assert {type(getattr(each, f.name)) for f in fields(each)} <= {int, bool, type(None), torch.Tensor}


@pytest.mark.parametrize("groups", [[(1, [2]), (-1, [2])], [(1, [2]), (3, [2, -1])]])
def test_negative_lengths(groups):
    with pytest.raises(ValueError, match=r"group 1 is .* lengths must be >= 0"):
        PackedLayout.from_groups(groups)


def test_invalid_lengths():
    with pytest.raises(TypeError, match="float"):
        PackedLayout.from_groups([(1.5, [2])])
    with pytest.raises(TypeError, match="float"):
        SpanLayout.from_spans([1.0], [(0, 1)], 1)
    with pytest.raises(ValueError, match="2 prefix_lengths but 1 text_lengths"):
        PackedLayout.from_prefixes([1, 2], [3])


# A row length, and for each row the start and the end of its tokens.
PADDED = st.integers(0, 6).flatmap(
    lambda length: st.tuples(
        st.just(length), st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), max_size=5)
    )
)


@EXAMPLES
@given(
    PADDED,
    st.booleans(),
    st.sampled_from([torch.bool, torch.int64, torch.float32]),
)
def test_from_padding_mask(batch, is_causal, dtype):
    length, rows = batch
    mask = torch.zeros(len(rows), length, dtype=dtype)
    lengths = []
    for row, (begin, end) in zip(mask, rows, strict=True):
        row[begin:end] = 1
        tokens = max(0, end - begin)
        begin = begin if tokens else 0
        lengths += [begin, tokens, length - begin - tokens]
    layout = PackedLayout.from_padding_mask(mask, is_causal=is_causal)
    groups = [(0, [each]) if is_causal else (each, []) for each in lengths]
    assert layout.num_tokens == mask.numel()
    assert torch.equal(layout.visible(), packed_visible(groups, is_causal))
    assert layout.position_ids.tolist() == position_ids(groups)
    assert layout.max_length == length
    assert layout.has_full is not is_causal


@EXAMPLES
@given(PADDED, st.data())
def test_from_padding_mask_with_full_roots(batch, data):
    length, rows = batch
    mask = torch.zeros(len(rows), length)
    roots, groups = [], []
    for row, (begin, end) in zip(mask, rows, strict=True):
        row[begin:end] = 1
        tokens = max(0, end - begin)
        begin = begin if tokens else 0
        roots.append(data.draw(st.integers(0, tokens)))
        groups += [(0, [begin]), (roots[-1], [tokens - roots[-1]]), (0, [length - begin - tokens])]
    layout = PackedLayout.from_padding_mask(mask, root_lengths=torch.tensor(roots, dtype=torch.int64))
    assert torch.equal(layout.visible(), packed_visible(groups, root_is_causal=False))
    assert layout.position_ids.tolist() == position_ids(groups)
    assert layout.has_full
    assert layout.max_length == length


def test_invalid_padding_masks():
    with pytest.raises(ValueError, match="a row has padding between tokens"):
        PackedLayout.from_padding_mask(torch.tensor([[1, 1, 1], [1, 0, 1]]))
    with pytest.raises(ValueError, match=r"\(batch, length\), got shape \(3,\)"):
        PackedLayout.from_padding_mask(torch.ones(3))
    with pytest.raises(ValueError, match="a root is negative or longer than its row"):
        PackedLayout.from_padding_mask(torch.tensor([[0, 1, 1]]), root_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="a root is negative or longer than its row"):
        PackedLayout.from_padding_mask(torch.ones(1, 3), root_lengths=torch.tensor([-1]))
    for options in ({"is_causal": False, "root_lengths": torch.ones(1)}, {"root_lengths": torch.ones(2)}):
        with pytest.raises(
            ValueError, match=r"root_lengths has shape .*; it must have shape \(1,\) and needs is_causal=True"
        ):
            PackedLayout.from_padding_mask(torch.ones(1, 3), **options)


def test_select_across_padding():
    layout = PackedLayout.from_padding_mask(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]))
    labels = torch.tensor([-100, -100, 12, 13, 14, 20, 21, -100, -100, -100, *[-100] * 5])
    selected, predictors = layout.select(labels)
    assert selected.tolist() == [13, 14, 21]
    assert predictors.tolist() == [2, 3, 5]


@EXAMPLES
@given(spans(max_keys=3 * KEY_TILE + 1))
def test_spans_and_their_inverse_table(arguments):
    query_lengths, key_spans, num_keys = arguments
    layout = SpanLayout.from_spans(*arguments)
    visible = span_visible(*arguments)
    assert torch.equal(layout.visible(), visible)
    assert (layout.num_queries, layout.num_keys) == tuple(visible.shape)
    assert layout.max_query_length == max(query_lengths, default=0)
    assert layout.max_span_length == max((end - start for start, end in key_spans), default=0)
    assert layout.segments.dtype == layout.tile_offsets.dtype == layout.tile_segments.dtype == torch.int32
    segments = np.cumsum([0, *query_lengths]).tolist()
    assert layout.segments[:, 0].tolist() == segments
    seen_by = [
        [i for i, (a, b) in enumerate(pairwise(segments)) if visible[a:b, tile].any()]
        for tile in (slice(key, key + KEY_TILE) for key in range(0, num_keys, KEY_TILE))
    ]
    offsets = layout.tile_offsets.tolist()
    assert len(offsets) == len(seen_by) + 1
    assert [layout.tile_segments[a:b].tolist() for a, b in pairwise(offsets)] == seen_by
    assert offsets[0] == 0
    assert offsets[-1] == len(layout.tile_segments)


@EXAMPLES
@given(spans(max_keys=3 * KEY_TILE + 1), st.integers(1, 3))
def test_equal_segments(arguments, query_length):
    """from_equal_segments gives the same layout as from_spans."""
    _, key_spans, num_keys = arguments
    expected = SpanLayout.from_spans([query_length] * len(key_spans), key_spans, num_keys)
    layout = SpanLayout.from_equal_segments(
        torch.tensor(key_spans, dtype=torch.int32).reshape(-1, 2), query_length, num_keys, max_span_length=num_keys
    )
    for name in ("segments", "tile_offsets"):
        ours, theirs = getattr(layout, name), getattr(expected, name)
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.int32
    assert torch.equal(layout.tile_segments[: layout.tile_offsets[-1]], expected.tile_segments)
    assert layout.tile_segments.dtype == torch.int32
    assert (layout.num_queries, layout.num_keys) == (expected.num_queries, num_keys)
    assert (layout.max_query_length, layout.max_span_length) == (query_length, num_keys)


def test_invalid_equal_segments():
    def make(key_spans, query_length=1):
        return SpanLayout.from_equal_segments(torch.tensor(key_spans), query_length, 4, max_span_length=4)

    assert make([[0, 4], [2, 2]]).num_queries == 2
    for key_spans in ([[-1, 2]], [[0, 5]], [[3, 2]]):
        with pytest.raises(ValueError, match=r"key_spans must lie in \[0, 4\]"):
            make(key_spans)
    for bad in (([[0, 1, 2]],), ([0, 1],), ([[0, 1]], 0)):
        with pytest.raises(ValueError, match="query_length at least 1, got"):
            make(*bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [(0, 1)], 4), "2 query_lengths but 1 key_spans"),
        (([1, -2], [(0, 1), (0, 1)], 4), r"query_lengths\[1\] is -2"),
        (([1, 2], [(0, 1), (0, 5)], 4), r"key_spans\[1\] is \(0, 5\); it must lie in \[0, 4\]"),
        (([1], [(-1, 1)], 4), r"key_spans\[0\] is \(-1, 1\)"),
        (([1], [(2, 1)], 4), r"key_spans\[0\] is \(2, 1\); it must lie in \[0, 4\], and its start must not"),
        (([], [], -1), "num_keys is -1, must be >= 0"),
    ],
)
def test_invalid_spans(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_spans(*arguments)


LAYOUTS = [
    PackedLayout.from_groups([(3, [2, 0, 4]), (0, [5])], root_is_causal=False),
    SpanLayout.from_spans([2, 0, 3], [(0, 70), (1, 2), (5, 5)], 80),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_moves_all_tensors_and_only_them(layout):
    moved = layout.to("meta", non_blocking=True)
    assert type(moved) is type(layout)
    for each in fields(layout):
        before, after = getattr(layout, each.name), getattr(moved, each.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        else:
            assert after == before


def test_device_argument():
    assert PackedLayout.from_groups([(1, [2])], device="meta").runs.is_meta
    assert PackedLayout.from_prefixes([1], [2], device="meta").position_ids.is_meta
    assert PackedLayout.causal([1], device="meta").runs.is_meta
    assert PackedLayout.full([1], device="meta").tokens.is_meta
    assert SpanLayout.from_spans([1], [(0, 1)], 1, device="meta").tile_segments.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pin_memory(layout):
    pinned = layout.pin_memory()
    tensors = [getattr(pinned, each.name) for each in fields(pinned)]
    assert all(each.is_pinned() for each in tensors if isinstance(each, torch.Tensor))
    assert torch.equal(pinned.visible(), layout.visible())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_with_weights_only(layout):
    file = io.BytesIO()
    torch.save(layout, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).visible(), layout.visible())


def test_layout_as_input_of_compiled_code():
    def use(x, layout):
        first, last = layout.key_intervals()
        return x * (last - first + layout.position_ids) * layout.max_length

    batches = [[(3, [4])], [(2, [4, 1]), (0, [5])], [(7, [2])] * 3, [(0, [11])], [(2, [2] * 3)] * 9]
    layouts = [PackedLayout.from_groups(groups) for groups in batches]
    counts = count_compilations(use, [(torch.ones(each.num_tokens, requires_grad=True), each) for each in layouts])
    assert counts[-1] <= 3
    assert counts[2:] == [counts[-1]] * 3
    for layout in layouts:
        x = torch.ones(layout.num_tokens)
        torch.testing.assert_close(torch.compile(use, backend="aot_eager", fullgraph=True)(x, layout), use(x, layout))


def test_layout_built_inside_compiled_code():
    def shift(mask, labels):
        return torch.stack(PackedLayout.from_padding_mask(mask).select(labels))

    mask, labels = torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([-100, 1, 2, 3, 4, -100])
    compiled = torch.compile(shift, backend="aot_eager", fullgraph=True)
    assert compiled(mask, labels).tolist() == [[-100, -100, 2, -100, 4, -100], [-1, -1, 1, -1, 3, -1]]
    with pytest.raises(RuntimeError, match="a row has padding between tokens"):
        compiled(torch.tensor([[0, 1, 1], [1, 0, 1]]), labels)
