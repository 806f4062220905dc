"""Attention over trees of segments against what people run today, who must repeat what branches share, or mask it.

Peers: ``sdpa dense mask`` (the whole row with a T x T mask, the baseline), ``sdpa per path`` (each path from a root to
a leaf alone, what it shares repeated), ``flex`` (FlexAttention with the layout's BlockMask; no backward on CPUs) and
our own kernel with each path repeated. Bringing inputs into a peer's form is not timed. Rates count the FLOP of visible
pairs only; ``bound`` in a shape says how many times the FLOP the repeated form takes, so the most that sharing can
gain. Floor: ``matmuls``, as many FLOP in products of large matrices.

Checked are the output and every gradient against SDPA in fp64, path by path, of the first and the last head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.adapter import DTYPES
from benchmarks.attention import matmuls, own_grad
from benchmarks.attention_peers import PACKED, Form, Peer
from benchmarks.checks import assert_near, forward, train
from benchmarks.harness import CALL_SECONDS, Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate
from lynx_kernels import PackedLayout, explain, prefix_attention
from lynx_kernels.formats import to_block_mask
from lynx_kernels.ops.prefix_attention import OPERATION

HEADS = {"cpu": (8, 64), "cuda": (32, 128)}  # heads, head dimension
NAMES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
_FLOP = {"forward": 4, "train": 14}
_MOST_PAIRS = {"cpu": 2**25, "cuda": 2**33}  # that a dense mask may have


@dataclass(frozen=True)
class Forest:
    """Segments as in ``PackedLayout.from_segments``, and the window of each layer of a model's pattern."""

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    full: tuple[bool, ...] | None = None
    windows: tuple[int | None, ...] = (None,)

    def layouts(self, device: str) -> list[PackedLayout]:
        """The layout of each layer."""
        tree = PackedLayout.from_segments(self.lengths, self.parents, full=self.full, device=device)
        return [tree.with_local(window=window) for window in self.windows]

    @cached_property
    def paths(self) -> list[list[int]]:
        """The segments from a root to each leaf."""
        found = []
        for segment in range(len(self.lengths)):
            if segment not in self.parents:
                path = [segment]
                while (above := self.parents[path[0]]) >= 0:
                    path.insert(0, above)
                found.append(path)
        return found

    def rows(self) -> list[Tensor]:
        """The rows of each path, (n,) int64."""
        starts = [0, *accumulate(self.lengths)]
        return [torch.cat([torch.arange(starts[s], starts[s + 1]) for s in path]) for path in self.paths]

    def repeated(self) -> "Forest":
        """Each path by itself."""
        order = [segment for path in self.paths for segment in path]
        places = [place for path in self.paths for place in range(len(path))]
        parents = [number - 1 if place else -1 for number, place in enumerate(places)]
        full = None if self.full is None else tuple(self.full[each] for each in order)
        return Forest(self.name, tuple(self.lengths[each] for each in order), tuple(parents), full, self.windows)

    @cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, summed over the layers."""
        return sum(_pairs(layout) for layout in self.layouts("cpu"))


def _pairs(layout: PackedLayout) -> int:
    first, last = layout.key_intervals()
    if layout.window is None:
        return int((last - first).sum())
    rows = torch.arange(layout.num_tokens).split(256)
    visible = layout.visible()  # the windows of these shapes are of few thousand tokens
    return sum(int(visible[each].sum()) for each in rows)


def _levels(root: int, *below: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents of a tree in which each segment of a level has so many children of a length."""
    lengths, parents = [root], [-1]

    def add(parent: int, levels: Sequence[tuple[int, int]]) -> None:
        if levels:
            count, length = levels[0]
            for _ in range(count):
                lengths.append(length)
                parents.append(parent)
                add(len(lengths) - 1, levels[1:])

    add(0, below)
    return tuple(lengths), tuple(parents)


def forests() -> list[Forest]:
    """One image, many questions; many images, many answers; a prompt's completions; levels; Gemma 3's pattern."""
    gemma = tuple(length for _ in range(4) for length in (256, 768))
    return [
        Forest("image-8-questions", *_levels(576, (8, 64))),
        Forest("8-images-8-completions", *_levels(8 * 576, (8, 128))),
        Forest("prompt-16-completions", *_levels(1100, (16, 1000))),
        Forest("3-levels", *_levels(576, (4, 64), (4, 64))),
        Forest("gemma3-4k", gemma, tuple(range(-1, 7)), (True, False) * 4, (1024,) * 5 + (None,)),
    ]


QUICK = [Forest("image-4-questions", *_levels(144, (4, 16))), Forest("levels", *_levels(64, (2, 16), (2, 16)))]


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every tree, forward and with backward."""
    heads, dim = HEADS[device]
    names = ["sdpa dense mask", "sdpa per path", "flex", "matmuls"]
    names += [f"{how}{OURS}{impl}" for how in ("", "repeated ") for impl in OPERATION.names]
    for name in NAMES[device]:
        for forest in QUICK if quick else forests():
            for mode in ("forward", "train"):
                bound = "" if len(forest.paths) == 1 else f" bound={forest.repeated().pairs / forest.pairs:.2f}"
                yield Case(
                    "forest",
                    mode,
                    f"{name} H={heads} D={dim} {forest.name}{bound} T={sum(forest.lengths)}",
                    partial(setup, forest, mode, DTYPES[name], device, heads, dim),
                    tuple(names),
                    _FLOP[mode] * forest.pairs * heads * dim / matmul_rate(device, DTYPES[name]),
                )


def _one(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """SDPA of (T, H, D)."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return sdpa(q, k, v, **how)[0].transpose(0, 1)


def _sum(calls: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """A pattern's layers: the sum of their outputs, so that one number of each is looked at."""
    if len(calls) == 1:
        return calls[0]
    return lambda *inputs: torch.stack([call(*inputs) for call in calls]).sum(0)


def _per_path(forest: Forest, device: str) -> tuple[Callable[..., Tensor], Form]:
    """Every path alone by SDPA, packed one behind the other, and the form of their inputs."""
    rows = forest.rows()
    sizes = [len(each) for each in rows]
    layouts = forest.layouts("cpu")
    if forest.full is None and forest.windows == (None,):
        hows: list[list[dict[str, Any]]] = [[{"is_causal": True}] for _ in rows]
    else:
        hows = [[{"attn_mask": layout.visible(each).to(device)} for layout in layouts] for each in rows]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), hows, strict=True)
        return torch.cat([_sum([partial(_one, **how) for how in all_hows])(*qkv) for *qkv, all_hows in parts])

    return attend, _repeated_form(rows, device)


def _repeated_form(rows: Sequence[Tensor], device: str) -> Form:
    """Paths one behind the other. Of the copies of a row only the first one's output is looked at."""
    order = torch.cat(list(rows))
    copy_of = torch.full((int(order.max()) + 1,), len(order))
    copy_of.scatter_reduce_(0, order, torch.arange(len(order)), "amin")
    order, copy_of = order.to(device), copy_of.to(device)
    return Form("repeated", lambda *inputs: [each[order] for each in inputs], lambda output: output[copy_of])


def _ours(forest: Forest, device: str, impl: str) -> Callable[..., Tensor]:
    return _sum([partial(prefix_attention, layout=each, impl=impl) for each in forest.layouts(device)])


def peers_of(forest: Forest, mode: str, device: str, impls: Sequence[str], compiler: Callable) -> dict[str, Peer | str]:
    """By name, the baseline first; a string says why a peer is left out."""
    tokens, repeated = sum(forest.lengths), forest.repeated()
    found: dict[str, Peer | str] = {}
    dense = len(forest.windows) * tokens**2
    if dense <= _MOST_PAIRS[device] or len(forest.paths) == 1:
        visible = [layout.visible().to(device) for layout in forest.layouts("cpu")]
        found["sdpa dense mask"] = Peer(_sum([partial(_one, attn_mask=each) for each in visible]), dense)
    else:
        found["sdpa dense mask"] = f"its masks have {dense / 2**20:.0f} M pairs"
    attend, form = _per_path(forest, device)
    found["sdpa per path"] = Peer(attend, repeated.pairs, form)
    if mode == "train" and device == "cpu":
        found["flex"] = "FlexAttention has no backward on CPUs"
    else:
        attention = compiler(flex_attention, dynamic=False)
        masks = cache(lambda: [to_block_mask(each) for each in forest.layouts(device)])

        def flex(*inputs: Tensor) -> Tensor:
            q, k, v = (each.transpose(0, 1)[None] for each in inputs)
            return _sum([partial(attention, block_mask=mask) for mask in masks()])(q, k, v)[0].transpose(0, 1)

        found["flex"] = Peer(flex, forest.pairs)
    for impl in impls:
        found[OURS + impl] = Peer(_ours(forest, device, impl), forest.pairs)
        if len(forest.paths) > 1:
            found[f"repeated {OURS}{impl}"] = Peer(_ours(repeated, device, impl), repeated.pairs, form)
    return found


def setup(
    forest: Forest,
    mode: str,
    dtype: torch.dtype,
    device: str,
    heads: int,
    dim: int,
    compiler: Callable = torch.compile,
) -> Setup:
    """The providers of one case on random inputs, and a check of each against SDPA in fp64."""
    torch._dynamo.reset()  # every shape is compiled for itself: the compiler at its best
    run = train if mode == "train" else forward
    torch.manual_seed(0)
    shape = sum(forest.lengths), heads, dim
    packed = [torch.randn(shape, device=device).to(dtype).requires_grad_(mode == "train") for _ in range(3)]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(packed[0])
    refused = explain(prefix_attention, *packed, forest.layouts(device)[0]).reasons
    refused = {**refused, "reference": "the definition: it computes what is masked, too"}
    impls = [impl for impl in OPERATION.names if impl not in refused]
    found = peers_of(forest, mode, device, impls, compiler)
    peers: dict[str, Peer] = {}
    left_out = {OURS + impl: why for impl, why in refused.items() if impl in OPERATION.names}
    for name, peer in found.items():
        if isinstance(peer, str):
            left_out[name] = peer
        elif (seconds := _FLOP[mode] * peer.pairs * heads * dim / matmul_rate(device, dtype)) > 2 * CALL_SECONDS:
            left_out[name] = f"a call would take about {seconds:.1f} s"
        else:
            peers[name] = peer
    forms = {PACKED.name: PACKED} | {peer.form.name: peer.form for peer in peers.values()}
    inputs = {
        name: [each.detach().requires_grad_(mode == "train") for each in form.prepare(*packed)]
        for name, form in forms.items()
    }
    few = [0, heads - 1]

    @cache
    def exact() -> list[Tensor]:
        attend, form = _per_path(forest, device)
        doubled = [each.detach()[..., few, :].double().requires_grad_(mode == "train") for each in packed]
        return run(lambda *each: form.restore(attend(*form.prepare(*each))), grad[..., few, :].double(), doubled)

    def check(name: str) -> None:
        if name == "matmuls":
            return
        form, attend = peers[name].form, peers[name].attend
        values = run(lambda *each: form.restore(attend(*form.prepare(*each))), grad, packed)
        assert_near([each[..., few, :] for each in values], exact())

    def provider(peer: Peer) -> Callable[[Any], object]:
        its_grad = cache(lambda: own_grad(peer, inputs[peer.form.name], grad) if mode == "train" else grad)
        return lambda copies: run(peer.attend, its_grad(), copies[peer.form.name])

    flops = _FLOP[mode] * forest.pairs * heads * dim
    providers = {name: provider(peer) for name, peer in peers.items()}
    providers["matmuls"] = matmuls(flops, dtype, device)
    return Setup(
        providers=providers,
        copies=[inputs],
        check=check,
        floors=("matmuls",),
        flops=flops,
        device=device,
        parameters=[each for copies in inputs.values() for each in copies] if mode == "train" else (),
        left_out=left_out,
    )
