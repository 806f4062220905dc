"""Numbers, tables and states that cannot be right: refused by name, on every implementation.

- Layouts of 2^31 tokens or more, by any constructor: ValueError; they wrapped around in int32.
- NaN, negative and infinite numbers (`num_items`, `eps`, `mean`, `std`, `scale`): ValueError names the argument.
- More supervised labels than `max_supervised`: ValueError from every implementation.
- Tables of a layout made by hand and corrupt: ValueError or the right result, never a read outside of the tensors.
- A planner's state that no planner has: ValueError, and the planner goes on as it was.
- A C++ build that failed: `explain`, `impl="cpu"` and a warning at the first import say that it did, and how.
"""

import copy
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lynx_kernels
from lynx_kernels import (
    PackedLayout,
    PackPlanner,
    SpanLayout,
    adapter,
    cross_attention,
    linear_cross_entropy,
    nn,
    pack_frames,
    prefix_attention,
)

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpanLayout.from_equal_segments(torch.tensor([[0, 1]] * 4), 2**29, 2, max_span_length=1),
        lambda: SpanLayout.from_equal_segments(torch.zeros(1, 2, dtype=torch.int32), 1, 2**31, max_span_length=0),
        lambda: SpanLayout.from_spans([2**30, 2**30], [(0, 1)] * 2, 1),
        lambda: SpanLayout.from_spans([1], [(0, 1)], 2**31),
        lambda: PackedLayout.from_segments([2**31], [-1]),
        lambda: PackedLayout.equal(2**16, 2**15),
    ],
)
def test_layouts_past_int32_are_refused(make):
    with pytest.raises(ValueError, match="too many for int32 offsets"):
        make()


def test_equal_segments_are_checked():
    spans = torch.tensor([[0, 2], [1, 3]])
    layout = SpanLayout.from_equal_segments(spans, 2, 3, max_span_length=2)
    assert layout.segments.tolist() == [[0, 0, 2], [2, 1, 3], [4, 3, 3]]
    with pytest.raises(ValueError, match="one is longer than max_span_length, 1"):
        SpanLayout.from_equal_segments(spans, 2, 3, max_span_length=1)
    with pytest.raises(TypeError, match=r"key_spans are torch.float32, expected integers"):
        SpanLayout.from_equal_segments(spans.float(), 2, 3, max_span_length=2)
    with pytest.raises(ValueError, match="num_keys is -1"):
        SpanLayout.from_equal_segments(torch.zeros(0, 2, dtype=torch.int64), 2, -1, max_span_length=2)


def numbers(x=None):
    """Every number that is not a count: where it goes, its name in the message, and the values that are refused."""
    hidden, labels = torch.ones(2, 4), torch.tensor([0, 1])
    weights = torch.ones(4), torch.ones(4), torch.ones(2, 4), None, torch.ones(4, 2), None, torch.ones(1)
    frame = [torch.zeros(2, 2, 3, dtype=torch.uint8)]
    sides = {"size": 2, "patch_size": 2}
    rows = torch.ones(3, 1, 4)
    packed, spans = PackedLayout.from_segments([3], [-1]), SpanLayout.from_spans([3], [(0, 3)], 3)

    def loss(n):
        return linear_cross_entropy(hidden, torch.ones(3, 4), labels, num_items=n)

    return {
        "num_items": (loss, "num_items", (*NOT_FINITE, -1, -0.5)),
        "num_items in a tensor": (lambda n: loss(torch.tensor(n)), "num_items", (*NOT_FINITE, -1)),
        "eps": (lambda n: adapter(hidden, *weights, eps=n), "eps", (*NOT_FINITE, -1e-9)),
        "mean": (
            lambda n: pack_frames(frame, **sides, mean=(0.5, n, 0.5), std=(1.0,) * 3), r"mean\[1\]", NOT_FINITE
        ),
        "std": (
            lambda n: pack_frames(frame, **sides, mean=(0.5,) * 3, std=(1.0, 1.0, n)), "std", (*NOT_FINITE, 0, 1e-99)
        ),
        "scale": (lambda n: prefix_attention(rows, rows, rows, packed, scale=n), "scale", NOT_FINITE),
        "scale of cross_attention": (lambda n: cross_attention(rows, rows, rows, spans, scale=n), "scale", NOT_FINITE),
        "Adapter": (lambda n: nn.Adapter(4, 2, eps=n), "Adapter: eps", (*NOT_FINITE, -1)),
        "Adapter's scale": (lambda n: nn.Adapter(4, 2, scale=n), "Adapter: scale", NOT_FINITE),
        "PerceiverAttention": (lambda n: nn.PerceiverAttention(4, eps=n), "PerceiverAttention: eps", (*NOT_FINITE, -1)),
        "GatedCrossAttention": (
            lambda n: nn.GatedCrossAttention(4, eps=n), "GatedCrossAttention: eps", (*NOT_FINITE, -1)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", numbers())
def test_numbers_that_cannot_be_used_are_refused(name):
    call, named, refused = numbers()[name]
    call(0.5)
    for number in refused:
        with pytest.raises(ValueError, match=named):
            call(number)
    if "tensor" not in name:
        with pytest.raises(TypeError, match=f"{named}.* is a str, expected a finite number"):
            call("0.5")


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_labels_than_max_supervised_are_refused(impl, reduction):
    hidden, weight, labels = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([1, -100, 3, 0])
    options = {"reduction": reduction, "impl": impl}
    expected = linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, max_supervised=3, **options), expected)
    for predictors in (None, torch.tensor([1, 0, 1, 1])):
        with pytest.raises(ValueError, match="3 entries are supervised, more than max_supervised=2"):
            linear_cross_entropy(hidden, weight, labels, predictors=predictors, max_supervised=2, **options)


FOREST = ([3, 2, 0, 4, 1, 2], [-1, 0, 0, 0, 3, -1])
CORRUPT = (-(2**31), -1, 1, 5, 2**31 - 1)


def corrupted(layout, names):
    """The layout with one number of one table changed, or a table of another shape or dtype."""
    for name in names:
        table = getattr(layout, name)
        for place in range(table.numel()):
            for value in CORRUPT:
                changed = table.clone().flatten()
                changed[place] = value
                yield f"{name}[{place}]={value}", replace(layout, **{name: changed.view(table.shape)})
        for what, changed in (("int64", table.long()), ("short", table[..., :-1]), ("flat", table.flatten())):
            yield f"{name} {what}", replace(layout, **{name: changed})
        yield f"{name} empty", replace(layout, **{name: table[:0]})


@pytest.mark.parametrize("kind", ["packed", "spans"])
def test_corrupt_tables_are_refused(kind):
    if kind == "packed":
        layout, operation = PackedLayout.from_segments(*FOREST, full=[True, *[False] * 5]), prefix_attention
        names, size, keys = ("runs", "tokens", "key_runs"), layout.num_tokens, layout.num_tokens
    else:
        layout = SpanLayout.from_spans([2, 0, 3, 2], [(0, 70), (1, 2), (60, 129), (5, 5)], 130)
        operation, names, size, keys = cross_attention, ("segments", "tile_offsets", "tile_segments"), 7, 130
    layout.check()
    q, k, v = (torch.randn(rows, 2, 8, requires_grad=True) for rows in (size, keys, keys))

    def run(layout, impl):
        """The output and the gradients, or None where the layout is refused."""
        try:
            out = operation(q, k, v, layout, impl=impl)
        except (ValueError, TypeError) as error:
            if "layout" not in str(error):
                raise
            return None
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    def dense(layout):
        """What the keys that ``layout.visible()`` shows give."""
        rows = [each.transpose(0, 1) for each in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*rows, layout.visible()).transpose(0, 1)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    refused = total = 0
    for what, wrong in corrupted(layout, names):
        found, expected = run(wrong, "cpu"), run(wrong, "reference")
        total += 1
        refused += expected is None
        assert expected is None or found is not None, f"{what}: only C++ refuses it"
        if found is not None:  # what it reads is that of another layout, or what is wrong only GPUs read
            right = dense(wrong)
            for each, other in zip((*found, *(expected or ())), right * 2, strict=False):
                torch.testing.assert_close(each, other, msg=lambda text, what=what: f"{what}: {text}")
    assert refused > 0.75 * total


def test_check_of_a_layout_made_by_hand():
    forest = PackedLayout.from_segments(*FOREST, full=[True, *[False] * 5])
    with pytest.raises(ValueError, match="max_length, 3, is less than a path"):
        replace(forest, max_length=3).check()
    with pytest.raises(ValueError, match="has_full is False"):
        replace(forest, has_full=False).check()
    spans = SpanLayout.from_spans([2], [(0, 3)], 3)
    with pytest.raises(ValueError, match="max_span_length, 2, is less"):
        replace(spans, max_span_length=2).check()
    rows = torch.ones(12, 1, 4)
    with pytest.raises(ValueError, match="window is -1, must be at least 1"):
        prefix_attention(rows, rows, rows, replace(forest, window=-1))


def edited(state, path, value):
    state = copy.deepcopy(state)
    *outer, last = path
    inner = state
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (["waiting", 0, 1], 11, r"waiting\[0\]: tokens is 11"),  # `flush` made empty steps for ever
        (["waiting", 0, 1], 0, r"waiting\[0\]: tokens is 0"),
        (["waiting", 0, 1], 2.0, r"waiting\[0\]: tokens is 2.0"),
        (["waiting", 0, 2], -1, r"waiting\[0\]: patches is -1"),
        (["waiting", 1, 0], 0, r"waiting\[1\]: number is 0"),
        (["waiting", 1, 0], 99, r"waiting\[1\]: number is 99"),
        (["waiting", 0], [0, 1], r"waiting\[0\] is \[0, 1\]"),
        (["waiting"], None, "waiting is None"),
        (["waiting"], [[number, 10, 0] for number in range(3)], "30 tokens wait, but 20 make a step"),
        (["num_seen"], 1, "num_seen is 1"),
        (["num_seen"], True, "num_seen is True"),
        (["skipped"], -1, "skipped is -1"),
        (["skipped"], 3, "skipped is 3"),
    ],
)
def test_states_that_no_planner_has_are_refused(path, value, problem):
    planner = PackPlanner(10, lookahead=1)
    planner.push([4, 5, 4])
    state = planner.state_dict()
    with pytest.raises(ValueError, match=f"not one of a planner: {problem}"):
        planner.load_state_dict(edited(state, path, value))
    assert planner.state_dict() == state
    assert sorted(number for step in planner.flush() for pack in step for number in pack) == [0, 1, 2]
    lacking = {name: each for name, each in state.items() if name != path[0]}
    with pytest.raises(ValueError, match="not one of a planner"):
        planner.load_state_dict(lacking)


def test_a_failed_build_is_told_at_use(tmp_path):
    """setup.py with a compiler that fails, then the package that it leaves."""
    root = Path(lynx_kernels.__file__).parents[1]
    shutil.copytree(root / "lynx_kernels", tmp_path / "lynx_kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'odd.h:3:1: error: no such thing' >&2\nexit 7\n")
    compiler.chmod(0o755)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(
        build, cwd=tmp_path, env={"CXX": str(compiler), "PATH": "/usr/bin:/bin"}, check=True, capture_output=True
    )
    use = """
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in str(each)]  # finds another _host
import torch, lynx_kernels
frame = [torch.zeros(2, 2, 3, dtype=torch.uint8)]
options = {"size": 2, "patch_size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
print(lynx_kernels.explain(lynx_kernels.pack_frames, frame, **options))
try:
    lynx_kernels.pack_frames(frame, **options, impl="cpu")
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, check=True)
    failed = f"its build failed ({compiler} ended with status 7: odd.h:3:1: error: no such thing)"
    explained, refused = [line for line in result.stdout.splitlines() if "cpu:" in line or "'cpu'" in line]
    assert failed in explained
    assert refused.startswith("pack_frames: impl='cpu' cannot run this call:")
    assert failed in refused
    assert f"lynx_kernels runs in plain PyTorch on CPUs: the compiled module is missing: {failed}" in result.stderr
