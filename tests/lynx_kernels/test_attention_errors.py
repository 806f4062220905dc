"""Invalid calls of the attention operations, and their error messages."""

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, explain, prefix_attention, prefix_attention_decode
from tests.lynx_kernels.helpers import dtensors

LAYOUT = PackedLayout.from_groups([(3, [2])])
SPAN_LAYOUT = SpanLayout.from_spans([2, 3], [(0, 3), (1, 7)], 7)


def as_tensor(each):
    return torch.zeros(each) if type(each) is tuple else each


def run(operation, *args, ask=False, **options):
    return explain(operation, *args, **options) if ask else operation(*args, **options)


def packed(q=(5, 4, 6), k=(5, 2, 6), v=(5, 2, 6), layout=LAYOUT, **options):
    return run(prefix_attention, *map(as_tensor, (q, k, v)), layout, **options)


def spanned(q=(5, 4, 6), k=(7, 2, 6), v=(7, 2, 6), layout=SPAN_LAYOUT, **options):
    return run(cross_attention, *map(as_tensor, (q, k, v)), layout, **options)


def decoded(q=(3, 1, 4, 6), shared=(16, 2, 6), branch=(3, 9, 2, 6), **changes):
    inputs = {
        "q": q, "shared_k": shared, "shared_v": shared, "branch_k": branch, "branch_v": branch,
        "ranges": torch.tensor([[[0, 8]], [[8, 10]], [[8, 10]]]), "branch_lengths": torch.tensor([9, 1, 5]),
    } | changes  # fmt: skip
    return run(prefix_attention_decode, **{name: as_tensor(each) for name, each in inputs.items()})


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("attend", "name", "shape"),
    [
        (packed, "prefix_attention", (5, 4, 6)),
        (spanned, "cross_attention", (5, 4, 6)),
        (decoded, "prefix_attention_decode", (3, 1, 4, 6)),
    ],
)
def test_explain_and_impl(attend, name, shape):
    assert attend(impl="reference", ask=True).name == "reference"
    assert attend(ask=True).name
    assert attend(impl="reference").shape == shape
    with pytest.raises(ValueError, match=f"{name}: impl='nope' is not an implementation; choose one of .*'reference'"):
        attend(impl="nope")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: packed(layout=SPAN_LAYOUT), TypeError, "layout is a SpanLayout, expected a PackedLayout"),
        (lambda: spanned(layout=LAYOUT), TypeError, "layout is a PackedLayout, expected a SpanLayout"),
        (lambda: packed(q=(1, 5, 4, 6)), ValueError, r"q has shape \(1, 5, 4, 6\), expected 3 dimensions"),
        (lambda: spanned(k=(7, 12)), ValueError, r"k has shape \(7, 12\), expected 3 dimensions"),
        (lambda: decoded(q=(3, 4, 6)), ValueError, r"q has shape \(3, 4, 6\), expected 4 dimensions"),
        (lambda: decoded(branch_v=(9, 2, 6)), ValueError, r"branch_v has shape \(9, 2, 6\), expected 4 dimensions"),
        (
            lambda: packed(v=torch.zeros(5, 2, 6).long()),
            TypeError,
            "v is torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: spanned(q=torch.zeros(5, 4, 6).to(torch.complex64)),
            TypeError,
            "q is torch.complex64, expected a float",
        ),
        (
            lambda: packed(k=torch.zeros(5, 2, 6).double()),
            TypeError,
            "k is torch.float64 and q is torch.float32; fp64",
        ),
        (
            lambda: spanned(q=torch.zeros(5, 4, 6).double()),
            TypeError,
            "k is torch.float32 and q is torch.float64; fp64",
        ),
        (lambda: packed(k=meta(5, 2, 6)), ValueError, "k is on meta, expected cpu like the other arguments"),
        (lambda: spanned(q=meta(5, 4, 6)), ValueError, "k is on cpu, expected meta like the other arguments"),
        (
            lambda: decoded(shared_v=meta(16, 2, 6)),
            ValueError,
            "shared_v is on meta, expected cpu like the other arguments",
        ),
        (
            lambda: packed(layout=LAYOUT.to("meta")),
            ValueError,
            "layout is on meta, expected cpu like the other arguments",
        ),
        (
            lambda: spanned(layout=SPAN_LAYOUT.to("meta")),
            ValueError,
            "layout is on meta, expected cpu like the other arguments",
        ),
        (
            lambda: decoded(branch_lengths=meta(3, dtype=torch.int32)),
            ValueError,
            "branch_lengths is on meta, expected cpu like the other arguments",
        ),
        (lambda: packed(v=(5, 2, 7)), ValueError, "v has head dimension 7, q has 6"),
        (lambda: spanned(q=(5, 4, 5)), ValueError, "k has head dimension 6, q has 5"),
        (lambda: packed(v=(5, 1, 6)), ValueError, "v has 1 heads, the other keys have 2"),
        (lambda: decoded(branch=(3, 9, 4, 6)), ValueError, "branch_k has 4 heads, the other keys have 2"),
        (lambda: packed(q=(5, 3, 6)), ValueError, "q has 3 heads, which is not a multiple of the 2 heads of the keys"),
        (
            lambda: spanned(k=(7, 0, 6), v=(7, 0, 6)),
            ValueError,
            "q has 4 heads, which is not a multiple of the 0 heads of the keys",
        ),
        (lambda: packed(q=(6, 4, 6)), ValueError, "q has 6 rows, but the layout describes 5"),
        (lambda: packed(k=(4, 2, 6)), ValueError, "k has 4 rows, but the layout describes 5"),
        (lambda: packed(v=(4, 2, 6)), ValueError, "v has 4 rows, but the layout describes 5"),
        (lambda: spanned(q=(7, 4, 6)), ValueError, "q has 7 rows, but the layout describes 5"),
        (lambda: spanned(k=(5, 2, 6), v=(5, 2, 6)), ValueError, "k has 5 rows, but the layout describes 7"),
        (
            lambda: decoded(shared_v=(15, 2, 6)),
            ValueError,
            r"keys and values differ in number: shared \(16, 2, 6\) and \(15, 2, 6\)",
        ),
        (lambda: decoded(branch_v=(3, 8, 2, 6)), ValueError, r"branch \(3, 9, 2, 6\) and \(3, 8, 2, 6\)"),
        (lambda: decoded(branch=(2, 9, 2, 6)), ValueError, "branch_k has 2 branches, but q has 3"),
        (
            lambda: decoded(q=(3, 10, 4, 6)),
            ValueError,
            "branch_k has room for 9 keys per branch, fewer than the 10 queries",
        ),
        (
            lambda: decoded(ranges=torch.zeros(3, 1, 2)),
            TypeError,
            "ranges is torch.float32, expected int32 or int64",
        ),
        (
            lambda: decoded(branch_lengths=torch.zeros(3).bool()),
            TypeError,
            "branch_lengths is torch.bool, expected int",
        ),
        (lambda: decoded(ranges=torch.zeros(3, 1, 2).short()), TypeError, "ranges is torch.int16, expected int32"),
        (
            lambda: decoded(ranges=torch.tensor([[[0, 1]], [[2, 3]], [[-1, 3]]])),
            ValueError,
            r"ranges\[2, 0\] is \[-1, 3\], expected 0 <= start <= end <= 16",
        ),
        (
            lambda: decoded(ranges=torch.tensor([[[0, 0], [3, 2]]] * 3)),
            ValueError,
            r"ranges\[0, 1\] is \[3, 2\], expected 0 <= start",
        ),
        (
            lambda: decoded(ranges=torch.tensor([[[0, 17]]] * 3)),
            ValueError,
            r"ranges\[0, 0\] is \[0, 17\], expected 0 <= start",
        ),
        (
            lambda: decoded(branch_lengths=torch.tensor([1, 0, 9])),
            ValueError,
            r"branch_lengths\[1\] is 0, expected 1 to 9",
        ),
        (lambda: packed(q=(5, 4, 0), k=(5, 2, 0), v=(5, 2, 0)), ValueError, "q has head dimension 0"),
        (
            lambda: decoded(branch_lengths=torch.zeros(2).int()),
            ValueError,
            r"branch_lengths has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: decoded(ranges=torch.zeros(3, 2).int()),
            ValueError,
            r"ranges has shape \(3, 2\), expected \(3, P, 2\)",
        ),
        (lambda: decoded(ranges=torch.zeros(2, 1, 2).int()), ValueError, r"ranges has shape \(2, 1, 2\), expected \(3"),
        (lambda: decoded(ranges=torch.zeros(3, 1, 3).int()), ValueError, r"ranges has shape \(3, 1, 3\), expected \(3"),
        (lambda: decoded(shared=(2, 8, 2, 6)), ValueError, r"shared_k has shape \(2, 8, 2, 6\), expected 3 dimensions"),
        (lambda: decoded(shared_v=(16, 2, 5)), ValueError, "shared_v has head dimension 5, branch_v has 6"),
        (
            lambda: decoded(branch_v=(3, 9, 2, 7)),
            ValueError,
            "branch_v has head dimension 7, q has 6; it may be from 1",
        ),
        (lambda: decoded(window=3, chunk=4), ValueError, "window=3 and chunk=4: a layer has one of them"),
        (lambda: decoded(window=0), ValueError, "window is 0, must be >= 1"),
        (lambda: decoded(chunk=-1), ValueError, "chunk is -1, must be >= 1"),
        (lambda: decoded(window=2.5), TypeError, "float"),
        (lambda: decoded(softcap=0.0), ValueError, "softcap is 0.0, expected a positive number"),
        (lambda: decoded(sinks=(3,)), ValueError, r"sinks has shape \(3,\), expected \(4,\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=rf"^(prefix|cross)_attention(_decode)?: .*{message}"):
        call()


def test_dtensors_raise(tmp_path):
    with dtensors(tmp_path) as distribute:
        for attend, shape in ((packed, (5, 4, 6)), (spanned, (5, 4, 6)), (decoded, (3, 1, 4, 6))):
            with pytest.raises(TypeError, match="q is a DTensor"):
                attend(q=distribute(torch.zeros(shape)))
