import importlib.util
import sys
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lynx_kernels import PackedLayout, formats
from tests.lynx_kernels.attention_helpers import EXAMPLES, GROUPS, packed_visible
from tests.lynx_kernels.forests import forests

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
LENGTHS = st.lists(st.integers(0, 5), max_size=6)


def blocks(lengths, is_causal):
    """(T, T) bool: sequences of these lengths. Each sees only itself."""
    return packed_visible([(length, []) for length in lengths], is_causal)


def offsets_of(lengths):
    return [sum(lengths[:index]) for index in range(len(lengths) + 1)]


def expressible(visible):
    """The values of ``is_causal`` for which ``blocks`` gives this matrix; empty if there is none."""
    ends = [t for t in range(1, len(visible) + 1) if not visible[t:, :t].any() and not visible[:t, t:].any()]
    lengths = [end - start for start, end in pairwise([0, *ends])]
    return {is_causal for is_causal in (True, False) if torch.equal(visible, blocks(lengths, is_causal))}


@pytest.mark.parametrize("make", [list, torch.tensor, lambda offsets: torch.tensor(offsets, dtype=torch.int32)])
@EXAMPLES
@given(LENGTHS, st.booleans())
def test_cu_seqlens(make, lengths, is_causal):
    layout = formats.from_cu_seqlens(make(offsets_of(lengths)), is_causal=is_causal)
    assert torch.equal(layout.visible(), blocks(lengths, is_causal))
    cu_seqlens, max_seqlen, still_causal = formats.to_cu_seqlens(layout)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == offsets_of([length for length in lengths if length > 0])
    assert type(max_seqlen) is int
    assert max_seqlen == max(lengths, default=0)
    assert still_causal is (is_causal or max_seqlen < 2)


@EXAMPLES
@given(GROUPS, st.booleans())
@example([(1, [2]), (0, [3])], False)
@example([(1, []), (0, [2])], False)
@example([(1, []), (0, [1, 1]), (2, [])], False)
def test_to_cu_seqlens_keeps_the_layout_or_raises(groups, root_is_causal):
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    answers = expressible(packed_visible(groups, root_is_causal))
    if not answers:
        with pytest.raises(ValueError, match="cu_seqlens cannot express this layout"):
            formats.to_cu_seqlens(layout)
        return
    cu_seqlens, _, is_causal = formats.to_cu_seqlens(layout)
    assert is_causal in answers
    assert is_causal or len(answers) == 1  # if all sequences have one token, they are said to be causal
    again = formats.from_cu_seqlens(cu_seqlens, is_causal=is_causal)
    assert torch.equal(again.visible(), layout.visible())
    assert torch.equal(again.position_ids, layout.position_ids)


@pytest.mark.parametrize(
    ("groups", "root_is_causal", "why"),
    [
        ([(0, [3]), (2, [4, 1])], True, "the path through tokens 9 to 9 shares its first tokens with another"),
        ([(1, [1, 1])], False, "the path through tokens 2 to 2 shares its first tokens with another path"),
        ([(2, [1])], False, "the path through tokens 0 to 2 has full and causal segments"),
        ([(2, []), (0, [2])], False, "the path through tokens 2 to 3 is causal, .* tokens 0 to 1 is full"),
    ],
)
def test_errors_state_the_reason(groups, root_is_causal, why):
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    with pytest.raises(ValueError, match=f"cu_seqlens cannot express this layout: .*{why}"):
        formats.to_cu_seqlens(layout)
    with pytest.raises(ValueError, match=f"position_ids cannot express this layout: .*{why}"):
        formats.to_position_ids(layout)


def test_layouts_of_padded_batches():
    mask = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, 0]])
    for is_causal in (True, False):
        cu_seqlens, max_seqlen, still_causal = formats.to_cu_seqlens(
            PackedLayout.from_padding_mask(mask, is_causal=is_causal)
        )
        assert (cu_seqlens.tolist(), max_seqlen, still_causal) == ([0, 2, 3, 5, 6, 9], 3, is_causal)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([], ValueError, r"shape \(0,\), expected \(sequences \+ 1,\)"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
        ([1, 2], ValueError, "starts at 1, it must start at 0"),
        ([0, 3, 2], ValueError, "decreases after index 1: 3, 2"),
        ([0.0, 2.0], TypeError, "cu_seqlens is torch.float32, expected integers"),
        (torch.tensor([False, True]), TypeError, "cu_seqlens is torch.bool, expected integers"),
        (
            torch.zeros(2, dtype=torch.int32, device="meta"),
            ValueError,
            "cu_seqlens is on meta, where its last value is not read on the host: pass num_tokens",
        ),
    ],
)
def test_invalid_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        formats.from_cu_seqlens(cu_seqlens)


def test_from_cu_seqlens_on_a_device():
    assert formats.from_cu_seqlens([0, 2], device="meta").runs.is_meta
    offsets = torch.zeros(4, dtype=torch.int32, device="meta")
    layout = formats.from_cu_seqlens(offsets, num_tokens=7)
    assert (layout.runs.is_meta, layout.runs.shape[0], layout.num_tokens) == (True, 4, 7)


@EXAMPLES
@given(LENGTHS, st.booleans())
def test_offsets_on_the_device_give_the_same_layout(lengths, is_causal):
    """What a GPU computes, computed here. Empty sequences stay in the table."""
    offsets = torch.tensor(offsets_of(lengths) if lengths else [0])
    layout = PackedLayout.from_offsets(offsets, sum(lengths), is_causal=is_causal)
    expected = formats.from_cu_seqlens(offsets, is_causal=is_causal)
    assert torch.equal(layout.visible(), expected.visible())
    assert torch.equal(layout.position_ids, expected.position_ids)
    assert torch.equal(layout.predictors, expected.predictors)


def test_wrong_offsets_on_the_device():
    for offsets in ([1, 3], [0, 2], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="must go from 0 to the number of tokens, 3, without decreasing"):
            PackedLayout.from_offsets(torch.tensor(offsets), 3)


def test_local_layouts_are_refused():
    for local in ({"window": 3}, {"chunk": 3}):
        layout = PackedLayout.causal([5]).with_local(**local)
        for convert in (formats.to_cu_seqlens, formats.to_position_ids):
            with pytest.raises(ValueError, match=r"it has (window|chunk)=3; convert layout.with_local\(\)"):
                convert(layout)


@EXAMPLES
@given(forests())
def test_block_mask(forest):
    """FlexAttention's mask allows what the layout says, and no block that it skips is seen."""
    layout = forest.layout()
    mask = formats.to_block_mask(layout, block_size=4)
    token = torch.arange(layout.num_tokens)
    assert torch.equal(mask.mask_mod(None, None, token[:, None], token), forest.visible())
    blocks = torch.zeros(mask.kv_num_blocks.shape[-1], mask.kv_indices.shape[-1], dtype=torch.int32)
    for number, indices, kind in (
        (mask.kv_num_blocks, mask.kv_indices, 1),
        (mask.full_kv_num_blocks, mask.full_kv_indices, 2),
    ):
        for row, (count, found) in enumerate(zip(number[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
            blocks[row, found[:count]] = kind
    of_pair = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[: layout.num_tokens, : layout.num_tokens]
    assert (of_pair[forest.visible()] > 0).all()
    assert forest.visible()[of_pair == 2].all()


@EXAMPLES
@given(LENGTHS, st.booleans())
def test_position_ids(lengths, two_dimensional):
    positions = torch.tensor([place for length in lengths for place in range(length)], dtype=torch.int64)
    layout = formats.from_position_ids(positions[None] if two_dimensional else positions)
    assert torch.equal(layout.visible(), blocks(lengths, True))
    assert torch.equal(formats.to_position_ids(layout), positions[None])


def test_position_ids_of_prefixes_and_single_tokens():
    assert formats.to_position_ids(PackedLayout.from_prefixes([2, 0], [1, 2])).tolist() == [[0, 1, 2, 0, 1]]
    assert formats.to_position_ids(PackedLayout.full([1, 1])).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="they describe causal sequences, and these are full"):
        formats.to_position_ids(PackedLayout.full([1, 2]))


@pytest.mark.parametrize(
    ("position_ids", "error", "message"),
    [
        (torch.tensor([1, 2]), ValueError, r"position_ids\[0\] is 1 and is the first"),
        (torch.tensor([[0, 1, 3, 4]]), ValueError, r"position_ids\[2\] is 3 and follows 1"),
        (torch.tensor([0, 1, 1]), ValueError, r"position_ids\[2\] is 1 and follows 1"),
        (torch.tensor([0, -1]), ValueError, r"position_ids\[1\] is -1 and follows 0"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"shape \(2, 1\), expected \(T,\) or \(1, T\)"),
        (torch.tensor(0), ValueError, r"shape \(\), expected"),
        (torch.zeros(2), TypeError, "position_ids is torch.float32, expected integers"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "position_ids is on meta"),
    ],
)
def test_invalid_position_ids(position_ids, error, message):
    with pytest.raises(error, match=message):
        formats.from_position_ids(position_ids)


@pytest.mark.parametrize("convert", [formats.to_cu_seqlens, formats.to_position_ids, formats.to_xformers])
def test_layouts_on_a_device_raise(convert):
    with pytest.raises(ValueError, match=r"on meta, but is read on the host; convert it before .to\(device\)"):
        convert(PackedLayout.causal([2]).to("meta"))


@pytest.fixture(scope="module")
def attn_bias():
    if not HAS_XFORMERS:
        pytest.skip("xformers is not installed")
    return importlib.import_module("xformers.ops.fmha.attn_bias")


class BlockDiagonalMask:
    """Replaces xformers' class on machines without xformers; it has only what we use."""

    is_causal = False

    def __init__(self, lengths):
        starts = [0, *accumulate(lengths)]
        self.q_seqinfo = SimpleNamespace(seqstart_py=starts, intervals=lambda: pairwise(starts))
        self.k_seqinfo = self.q_seqinfo

    @classmethod
    def from_seqlens(cls, lengths, device):
        return cls(lengths)

    def materialize(self, shape):
        blocks = [torch.ones(end - start, end - start) for start, end in self.q_seqinfo.intervals()]
        return torch.block_diag(*(block.tril() if self.is_causal else block for block in blocks)).log()


class BlockDiagonalCausalMask(BlockDiagonalMask):
    is_causal = True


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalCausalMask):
    pass


@pytest.fixture(scope="module")
def either_attn_bias():
    if HAS_XFORMERS:
        yield importlib.import_module("xformers.ops.fmha.attn_bias")
        return
    masks = (BlockDiagonalMask, BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask)
    stand_in = SimpleNamespace(**{each.__name__: each for each in masks})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
            patch.setitem(sys.modules, name, SimpleNamespace(attn_bias=stand_in))
        yield stand_in


@EXAMPLES
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), is_causal=st.booleans())
def test_xformers(either_attn_bias, lengths, is_causal):
    attn_bias = either_attn_bias
    mask_type = attn_bias.BlockDiagonalCausalMask if is_causal else attn_bias.BlockDiagonalMask
    mask = mask_type.from_seqlens(lengths, device=torch.device("cpu"))
    layout = formats.from_xformers(mask)
    assert torch.equal(layout.visible(), mask.materialize((sum(lengths),) * 2) == 0)
    again = formats.to_xformers(layout)
    if max(lengths) > 1:
        assert type(again) is mask_type
    assert again.q_seqinfo.seqstart_py == formats.to_cu_seqlens(layout)[0].tolist()
    assert torch.equal(again.materialize((sum(lengths),) * 2), mask.materialize((sum(lengths),) * 2))


def test_xformers_without_tokens(attn_bias):
    for is_causal in (True, False):
        mask = formats.to_xformers(formats.from_cu_seqlens([0], is_causal=is_causal))
        assert formats.from_xformers(mask).num_tokens == 0


def test_xformers_bottom_right(attn_bias):
    cpu = torch.device("cpu")
    mask = attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens([3, 2], device=cpu)
    assert torch.equal(formats.from_xformers(mask).visible(), mask.materialize((5, 5)) == 0)
    with pytest.raises(ValueError, match="blocks of queries and of keys differ or leave gaps"):
        formats.from_xformers(attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens([1], [3], device=cpu))


def test_xformers_refusals(attn_bias):
    cpu = torch.device("cpu")
    block_diagonal = attn_bias.BlockDiagonalMask
    with pytest.raises(ValueError, match="use a SpanLayout for cross-attention"):
        formats.from_xformers(block_diagonal.from_seqlens([2, 2], [1, 3], device=cpu))
    gaps = attn_bias._GappySeqInfo.from_seqlens_gappy([0, 3, 5], [2, 2], True, device=cpu)
    with pytest.raises(ValueError, match="leave gaps"):
        formats.from_xformers(block_diagonal(q_seqinfo=gaps, k_seqinfo=gaps))
    for mask in (block_diagonal.from_seqlens([4], device=cpu).make_local_attention(2), attn_bias.LowerTriangularMask()):
        with pytest.raises(
            TypeError, match=f"cannot convert a {type(mask).__name__} to a PackedLayout; .*: BlockDiagonal"
        ):
            formats.from_xformers(mask)
    with pytest.raises(ValueError, match=r"an xformers mask cannot express this layout: .* 2 branches share a root"):
        formats.to_xformers(PackedLayout.from_groups([(1, [1, 1])]))
