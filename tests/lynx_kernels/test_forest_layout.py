"""PackedLayout as a forest of segments, compared with brute force over the segments' lists."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given

from lynx_kernels import PackedLayout
from tests.lynx_kernels.attention_helpers import EXAMPLES
from tests.lynx_kernels.forests import Forest, forests
from tests.lynx_kernels.helpers import count_compilations


@EXAMPLES
@given(forests())
def test_who_sees_whom(forest):
    layout = forest.layout()
    assert torch.equal(layout.visible(), forest.visible())
    assert layout.position_ids.tolist() == [position for _, _, position in forest.tokens()]
    assert layout.position_ids.dtype == torch.int64
    assert layout.max_length == max(
        (forest.lengths[s] + sum(forest.lengths[a] for a in forest.ancestors(s)) for s in range(len(forest.lengths))),
        default=0,
    )
    assert layout.has_full is any(f and n > 1 for f, n in zip(forest.full, forest.lengths, strict=True))


@EXAMPLES
@given(forests(local=False))
def test_every_key_is_seen_by_one_interval(forest):
    first, last = forest.layout().key_intervals()
    for key, seen_by in enumerate(forest.visible().T):
        assert seen_by.nonzero().flatten().tolist() == list(range(int(first[key]), int(last[key])))


@EXAMPLES
@given(forests(local=False))
def test_tables_are_as_documented(forest):
    layout, visible = forest.layout(), forest.visible()
    assert {each.dtype for each in (layout.runs, layout.tokens, layout.key_runs, layout.segments)} == {torch.int32}
    positions = [position for _, _, position in forest.tokens()]
    leaves = 0
    last = layout.tokens[2].tolist()
    for number, (row, (end, *_)) in enumerate(pairwise(layout.runs.tolist())):
        start, offset, behind, *ranges = row
        assert [place - offset for place in range(start, end)] == positions[start:end]
        assert layout.runs[behind, 0] == last[start]
        assert behind > number
        seen = [key for begin, stop, _ in zip(*[iter(ranges)] * 3, strict=True) for key in range(begin, stop)]
        assert seen == visible[start, :start].nonzero().flatten().tolist()
        for begin, stop, its_offset in zip(*[iter(ranges)] * 3, strict=True):
            assert [place - its_offset for place in range(begin, stop)] == positions[begin:stop]
        # A run ends in a leaf: its last token is seen by no later one.
        leaves += last[end - 1] == end
    assert leaves == layout.runs.shape[0] - 1
    assert layout.max_ranges == 1 + layout.runs.shape[1] // 3 - 1
    runs, key_runs = layout.runs[:, 0].tolist(), layout.key_runs.tolist()
    borders = {row for row in range(1, len(last)) if last[row] != last[row - 1] or row in runs}
    assert key_runs == sorted({0, *borders, len(last)} if last else {0})


def test_a_chat_of_alternating_segments_is_one_run():
    layout = PackedLayout.from_segments([3, 5] * 20, range(-1, 39), full=[False, True] * 20)
    assert layout.runs.tolist() == [[0, 0, 1], [160, 0, 1]]
    assert layout.key_runs.tolist() == [0, 160]


@EXAMPLES
@given(forests())
def test_predictors_and_select(forest):
    layout, predictors = forest.layout(), forest.predictors()
    assert layout.predictors.tolist() == predictors
    visible = forest.visible()
    assert not any(visible[row, token] for token, row in enumerate(predictors) if row >= 0), "it would see the answer"
    can_be_supervised = [place == 0 or not forest.full[segment] for segment, place, _ in forest.tokens()]
    labels = torch.tensor([100 + row if can else -100 for row, can in enumerate(can_be_supervised)], dtype=torch.int64)
    selected, rows = layout.select(labels)
    expected = [(100 + t, p) for t, p in enumerate(predictors) if p >= 0 and can_be_supervised[t]]
    assert list(zip(selected.tolist(), rows.tolist(), strict=True)) == expected
    all_labels, all_rows = layout.to("meta").select(labels.to("meta"))
    assert all_labels.shape == all_rows.shape == labels.shape


def test_the_first_token_of_every_branch_is_predicted_by_the_prompt():
    layout = PackedLayout.from_groups([(3, [2, 0, 2])])
    labels, rows = layout.select(torch.tensor([1, 2, 3, 4, 5, 6, 7]), ignore_index=5)
    assert (labels.tolist(), rows.tolist()) == ([2, 3, 4, 6, 7], [0, 1, 2, 2, 5])


def test_a_supervised_token_that_its_predictor_sees_is_refused():
    layout = PackedLayout.from_segments([2, 3], [-1, 0], full=[False, True])
    labels = torch.full((5,), -100)
    labels[2] = 1  # the first token of the full segment
    assert layout.select(labels)[1].tolist() == [1]
    labels[3] = 1
    with pytest.raises(ValueError, match="a token inside a full segment is supervised"):
        layout.select(labels)
    with pytest.raises(ValueError, match=r"labels must be \(5,\) like the layout, got \(4,\)"):
        layout.select(labels[:4])


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([2, -1], [-1, 0], "segment 1 has length -1: lengths must be >= 0"),
        ([2, 1, 1], [-1, 0], "3 lengths but 2 parents"),
        ([1, 1, 1, 1], [-1, 0, 0, 1], "segment 3 has parent 1, but segments must be in depth-first order.*-1, 0, 2"),
        ([1, 1], [-1, 1], "segment 1 has parent 1.*here -1, 0"),
        ([1, 1], [-1, -2], "segment 1 has parent -2"),
        ([1, 1, 1], [-1, -1, 0], "segment 2 has parent 0.*here -1, 1"),
        ([1], [0], "segment 0 has parent 0.*here -1$"),
        ([2**30, 2**30], [-1, 0], "too many for int32 offsets"),
    ],
)
def test_invalid_segments(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_segments(lengths, parents)


def test_invalid_options():
    def make(**options):
        PackedLayout.from_segments([2, 3], [-1, 0], **options)

    with pytest.raises(ValueError, match="2 lengths but 3 values of full"):
        make(full=[True, False, True])
    with pytest.raises(ValueError, match="window=3 and chunk=4: a layer has one of them"):
        make(window=3, chunk=4)
    for name in ("window", "chunk"):
        with pytest.raises(ValueError, match=f"{name} is 0, must be >= 1"):
            make(**{name: 0})
        with pytest.raises(TypeError):
            make(**{name: 1.5})
    with pytest.raises(TypeError):
        PackedLayout.from_segments([2.0], [-1])


def test_with_local_shares_the_tree():
    layout = PackedLayout.from_segments([3, 2], [-1, 0])
    local = layout.with_local(window=2)
    assert local.window == 2
    assert local.runs is layout.runs
    assert local.with_local().window is None
    assert torch.equal(local.with_local(chunk=2).visible(), Forest([3, 2], [-1, 0], [False] * 2, chunk=2).visible())


@EXAMPLES
@given(forests())
def test_drawings_show_what_is_seen(forest):
    drawing = forest.layout().draw()
    lines = str(drawing).splitlines()
    drawn = [[cell != " " for cell in line.split("|")[1][::2]] for line in lines]
    assert drawn == forest.visible().tolist()
    starts = [line.split("|")[0].strip() for line in lines]
    assert [name for name in starts if name] == [str(s) for s, n in enumerate(forest.lengths) if n > 0]
    assert drawing.svg().count("fill-opacity") == int(forest.visible().sum())


def test_drawings_of_long_rows_share_cells(tmp_path):
    layout = PackedLayout.from_segments([5000, 300, 300], [-1, 0, 0])
    drawing = layout.draw(["an image", "<first>", "second"])
    assert len(str(drawing).splitlines()) == 64
    assert 0 < drawing.seen[0, 0] < 1
    assert drawing.seen[-1, 0] == pytest.approx(1)
    drawing.save(tmp_path / "layout.svg")
    assert "&lt;first&gt;" in (tmp_path / "layout.svg").read_text()
    with pytest.raises(ValueError, match="2 names but 3 segments"):
        layout.draw(["a", "b"])


def test_forests_as_inputs_of_compiled_code():
    def use(x, layout):
        return x + layout.predictors

    batches = [([3, 2], [-1, 0]), ([4, 2, 3], [-1, 0, 0]), ([2, 2, 2, 2, 2], [-1, 0, 1, 1, 0]), ([5] * 9, [-1] * 9)]
    layouts = [PackedLayout.from_segments(*each) for each in batches]
    counts = count_compilations(use, [(torch.ones(each.num_tokens, requires_grad=True), each) for each in layouts])
    assert counts[-1] <= 3


def test_blocks_are_full_segments():
    """A number per token says what lengths say: a chain of causal and full segments, on any path."""
    lengths, parents = [3, 4, 2, 5, 3, 2], [-1, 0, 1, 2, 0, 4]
    full = [False, True, False, True, True, False]
    expected = PackedLayout.from_segments(lengths, parents, full=full, window=2)
    numbers = [7 * index if is_full else -1 for index, is_full in enumerate(full)]
    blocks = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
    layout = PackedLayout.from_segments(lengths, parents, window=2).with_full(blocks)
    for name in ("runs", "tokens", "key_runs", "position_ids"):
        assert torch.equal(getattr(layout, name), getattr(expected, name)), name
    assert layout.has_full
    assert torch.equal(layout.visible(), expected.visible())
    assert torch.equal(layout.predictors, expected.predictors)
    empty = PackedLayout.causal([]).with_full(torch.zeros(0, dtype=torch.int64))
    assert empty.num_tokens == 0
    first = PackedLayout.causal([3, 2]).with_full(torch.zeros(5, dtype=torch.int64))  # one number, two samples
    assert torch.equal(first.visible(), PackedLayout.full([3, 2]).visible())


@pytest.mark.parametrize(
    ("layout", "blocks", "message"),
    [
        (PackedLayout.from_groups([(2, [2, 2])]), [-1, 0, 0, 0, -1, -1], "goes on where paths fork"),
        (PackedLayout.from_groups([(2, [2, 2])]), [-1, 0, -1, -1, 0, 0], "goes on where paths fork"),
        (PackedLayout.full([3]), [-1, 0, 0], "lies in a full segment"),
        (PackedLayout.causal([3]), [0, 0], r"blocks must be \(3,\)"),
    ],
)
def test_blocks_that_no_forest_has(layout, blocks, message):
    with pytest.raises(ValueError, match=message):
        layout.with_full(torch.tensor(blocks))
