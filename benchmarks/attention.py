"""The three attentions against what people run today; the lengths are fixed in ``workloads/``.

Rates count the FLOP of visible pairs only, 4 a pair and number of a head forward and 14 with backward, which computes
the scores again: two products and seven. Causal pairs count as causal, and pads and masked pairs do not count. Cross
attention and decoding, which mostly read, have rates in bytes. Floor of prefix attention: ``matmuls``, as many FLOP in
products of large matrices. Where branches share a root, peers also run with the root repeated for every branch;
``bound`` in the shape says how many times the FLOP that takes, so the most that sharing can gain where FLOP decide.

Checked are the output and every gradient, of the first and the last head, against the reference in fp64, which for all
heads would not fit; heads do not meet, and the tests look at all of ours.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapter import DTYPES
from benchmarks.attention_cache_peers import cross_peers, decode_peers
from benchmarks.attention_peers import Peer, Peers, prefix_peers, repeated_peers
from benchmarks.attention_workloads import Workload, workloads
from benchmarks.checks import assert_near, forward, train
from benchmarks.harness import CALL_SECONDS, Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import cold_copies, matmul_rate
from lynx_kernels import SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops import cross_attention as cross
from lynx_kernels.ops import prefix_attention as prefix
from lynx_kernels.ops import prefix_attention_decode as decode

# Files and how many of their groups: all that the GPU has room for, and what two cores do in some tenths of a second.
CPU = (
    ("lynx", 64), ("llava", 2), ("llava-long", 2), ("video", 1), ("questions", 1), ("long", 4), ("long-4k", 1),
    ("resampler", 1), ("resampler", 64), ("resampler-video", 1), ("resampler-video", 8), ("decode", 1), ("decode", 8),
)  # fmt: skip
CUDA = (
    ("lynx", 64), ("llava", 64), ("llava-long", 64), ("video", 16), ("questions", 1), ("questions", 16), ("long", 4),
    ("long-4k", 4), ("resampler", 1), ("resampler", 64), ("resampler-video", 1), ("resampler-video", 64),
    ("decode", 1), ("decode", 64),
)  # fmt: skip
QUICK = (("lynx", 64), ("questions", 1), ("resampler", 1), ("decode", 1))
HEADS = {"cpu": (16, 64), "cuda": (32, 128)}  # heads, head dimension
NAMES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
_FLOP = {"forward": 4, "train": 14}
# A score that is written to memory: in fp32 before and after the softmax, and its gradient. Such peers were seen to
# take up to four times as long as the products alone.
_HELD_BYTES, _HELD_SLOWNESS = 12, 4
# Providers that are expected to take longer are left out: on two cores all cases together have some ten minutes.
_MOST_SECONDS = {"cpu": 1.0, "cuda": CALL_SECONDS}
_MOST_HELD_BYTES = {"cpu": 2 * 2**30, "cuda": 40 * 2**30}
# Up to here launching from Python takes longer than running.
_CAPTURED_TOKENS = 8192
_REFERENCE_BATCH = 2**18  # scores a head that the reference holds at least
OPERATION = {each.OPERATION.name: each.OPERATION for each in (prefix, cross, decode)}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every workload, forward and with backward; decoding has no backward."""
    heads, dim = HEADS[device]
    for name in NAMES[device]:
        for file, samples in QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]:
            for workload in workloads(file, samples):
                for mode in ("forward",) if workload.operation == "prefix_attention_decode" else ("forward", "train"):
                    flops = _FLOP[mode] * workload.pairs * heads * dim
                    yield Case(
                        workload.operation,
                        mode,
                        f"{name} H={heads} D={dim} {workload.name} {_bound(workload)}B={samples}",
                        partial(setup, workload, mode, DTYPES[name], device, heads, dim),
                        _names(workload, mode, device),
                        flops / matmul_rate(device, DTYPES[name]),
                    )


def _bound(workload: Workload) -> str:
    if workload.operation != "prefix_attention" or not workload.shares_roots:
        return ""
    return f"bound={workload.repeated().pairs / workload.pairs:.2f} "


def _names(workload: Workload, mode: str, device: str) -> tuple[str, ...]:
    """Who may answer, from a workload of the same kind that takes no time to prepare."""
    root, branches = workload.groups[0]
    tiny = Workload("", workload.operation, ((min(root, 1), (1,) * len(branches)),), workload.root_is_causal)
    floors = ["matmuls"] if workload.operation == "prefix_attention" else []
    return (*candidates(tiny, mode, device, OPERATION[workload.operation].names), *floors)


def candidates(
    workload: Workload, mode: str, device: str, impls: Sequence[str] = (), compiler: Callable = torch.compile
) -> Peers:
    """Peers, then those of ours that ``impls`` names; the baseline is the first."""

    def make(workload: Workload) -> Peers:
        return prefix_peers(workload, requires_grad=mode == "train", device=device, compiler=compiler)

    ours = _ours(workload, impls, device)
    if workload.operation == "cross_attention":
        return cross_peers(workload, device) | ours
    if workload.operation == "prefix_attention_decode":
        return decode_peers(workload, device) | ours
    if not workload.shares_roots:
        return make(workload) | ours
    repeated = repeated_peers(workload, lambda changed: make(changed) | _ours(changed, impls, device), device)
    return make(workload) | ours | repeated


def _ours(workload: Workload, impls: Sequence[str], device: str) -> Peers:
    run, pairs = operation(workload, device), workload.pairs
    found: Peers = {OURS + impl: Peer(partial(run, impl=impl), pairs) for impl in impls}
    if "reference" in impls:  # computes what is masked too, in fp32, and holds whole groups, at most these scores
        scores = pairs if workload.operation != "prefix_attention" else sum(each**2 for each in workload.lengths)
        largest = max(_REFERENCE_BATCH, max(each**2 for each in workload.lengths))
        found[OURS + "reference"] = Peer(partial(run, impl="reference"), scores, held=min(scores, largest))
    return found


def operation(workload: Workload, device: str) -> Callable[..., Any]:
    """Our function for the workload: from its inputs, and ``impl``, to the output."""
    if workload.operation == "prefix_attention":
        return partial(prefix_attention, layout=workload.layout(device))
    if workload.operation == "cross_attention":
        ends = [sum(root for root, _ in workload.groups[: i + 1]) for i in range(len(workload.groups))]
        spans = [(end - root, end) for end, (root, _) in zip(ends, workload.groups, strict=True)]
        layout = SpanLayout.from_spans([query for _, (query,) in workload.groups], spans, ends[-1], device=device)
        return partial(cross_attention, layout=layout)
    stops = accumulate(root for root, _ in workload.groups)
    read = [((end - root, end), own) for end, (root, all_) in zip(stops, workload.groups, strict=True) for own in all_]
    ranges = torch.tensor([[bounds] for bounds, _ in read], dtype=torch.int32, device=device)
    branch_lengths = torch.tensor([own for _, own in read], dtype=torch.int32, device=device)
    return partial(prefix_attention_decode, ranges=ranges, branch_lengths=branch_lengths)


def inputs_of(
    workload: Workload, dtype: torch.dtype, device: str, heads: int, dim: int, *, requires_grad: bool
) -> list[Tensor]:
    """Random q, k and v (T, H, D).

    For decoding q (B, 1, H, D), the roots' keys and values (K, H, D) end to end, and the branches' (B, L, H, D).
    """
    roots, branches = [root for root, _ in workload.groups], [each for _, some in workload.groups for each in some]
    shapes: list[tuple[int, ...]]
    if workload.operation == "prefix_attention":
        shapes = [(sum(workload.lengths),)] * 3
    elif workload.operation == "cross_attention":
        shapes = [(sum(branches),), (sum(roots),), (sum(roots),)]
    else:
        shapes = [(len(branches), 1), *[(sum(roots),)] * 2, *[(len(branches), max(branches))] * 2]
    torch.manual_seed(0)
    return [torch.randn(*shape, heads, dim, device=device).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def setup(
    workload: Workload,
    mode: str,
    dtype: torch.dtype,
    device: str,
    heads: int,
    dim: int,
    compiler: Callable = torch.compile,
) -> Setup:
    """The providers of one case on random inputs, and a check of each against the reference in fp64."""
    torch._dynamo.reset()  # every shape is compiled for itself: the compiler at its best
    requires_grad = mode == "train"
    run = train if requires_grad else forward
    packed = inputs_of(workload, dtype, device, heads, dim, requires_grad=requires_grad)
    function = operation(workload, device)
    refused = explain(function, *packed).reasons
    impls = OPERATION[workload.operation].names
    peers: dict[str, Peer] = {}
    left_out: dict[str, str] = {}
    for name, peer in candidates(workload, mode, device, impls, compiler).items():
        why = peer if isinstance(peer, str) else refused.get(name.rpartition(OURS)[2])
        if isinstance(peer, Peer) and why is None:
            why = _too_large(peer, mode, dtype, device, heads, dim)
        if isinstance(peer, Peer) and why is None:
            peers[name] = peer
        else:
            left_out[name] = str(why)

    grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1)).to(packed[0])
    is_prefix = workload.operation == "prefix_attention"
    forms = {peer.form.name: peer.form for peer in peers.values()}
    copies = [
        {
            name: [each.detach().requires_grad_(requires_grad) for each in form.prepare(*inputs)]
            for name, form in forms.items()
        }
        for inputs in ([packed] if is_prefix else cold_copies(packed, device))
    ]
    few = [0, heads - 1]

    @cache
    def exact() -> list[Tensor]:
        doubled = [each.detach()[..., few, :].double().requires_grad_(requires_grad) for each in packed]
        return run(partial(function, impl="reference"), grad[..., few, :].double(), doubled)

    def check(name: str) -> None:
        if name == "matmuls":
            return
        form, attend = peers[name].form, peers[name].attend
        values = run(lambda *inputs: form.restore(attend(*form.prepare(*inputs))), grad, packed)
        assert_near([each[..., few, :] for each in values], exact())

    def provider(peer: Peer) -> Callable[[Any], object]:
        its_grad = cache(lambda: own_grad(peer, copies[0][peer.form.name], grad) if requires_grad else grad)
        return lambda inputs: run(peer.attend, its_grad(), inputs[peer.form.name])

    providers = {name: provider(peer) for name, peer in peers.items()}
    flops = _FLOP[mode] * workload.pairs * heads * dim
    if is_prefix:
        providers["matmuls"] = matmuls(flops, dtype, device)
    return Setup(
        providers=providers,
        copies=copies,
        check=check,
        floors=("matmuls",) if is_prefix else (),
        flops=flops if is_prefix else 0,
        traffic=0 if is_prefix else _traffic(workload, mode, packed),
        device=device,
        captured=not is_prefix or sum(workload.lengths) <= _CAPTURED_TOKENS,
        parameters=[each for inputs in copies[0].values() for each in inputs] if requires_grad else (),
        left_out=left_out,
    )


def _too_large(peer: Peer, mode: str, dtype: torch.dtype, device: str, heads: int, dim: int) -> str | None:
    """Why a peer does not fit this machine, or None."""
    held = peer.held * heads * _HELD_BYTES
    if held > _MOST_HELD_BYTES[device]:
        return f"its scores would take {held / 2**30:.0f} GiB, more than {_MOST_HELD_BYTES[device] / 2**30:.0f}"
    seconds = _FLOP[mode] * peer.pairs * heads * dim / matmul_rate(device, dtype) * (_HELD_SLOWNESS if held else 1)
    most = _MOST_SECONDS[device]
    return None if seconds <= most else f"a call would take about {seconds:.1f} s, more than {most:g}"


def own_grad(peer: Peer, inputs: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The gradient of the packed output as one of the peer's output: 0 at pads and at repeated roots."""
    with torch.no_grad():
        output = torch.empty_like(peer.attend(*inputs))
    output.requires_grad_()
    return torch.autograd.grad(peer.form.restore(output), output, grad)[0]


def _traffic(workload: Workload, mode: str, inputs: Sequence[Tensor]) -> int:
    """The least that any implementation moves: bytes of keys that are seen, queries, outputs and their gradients."""
    q = inputs[0]
    if workload.operation == "prefix_attention_decode":
        row = q.nbytes // q.shape[0]  # of one token
        return 2 * q.nbytes + 2 * row * sum(workload.lengths)
    read = sum(each.nbytes for each in inputs)
    if mode == "forward":  # and writes the output
        return read + q.nbytes
    return 3 * read + 3 * q.nbytes  # backward reads inputs, output and its gradient, and writes those of the inputs


def matmuls(flops: int, dtype: torch.dtype, device: str) -> Callable[[Any], object]:
    """As many FLOP in products with a 2048 x 2048 matrix."""
    rows = max(1, round(flops / (2 * 2048**2)))
    times = -(-rows // 65536)
    left, right = (torch.randn(size, 2048, device=device).to(dtype) for size in (-(-rows // times), 2048))

    def run(inputs: Any) -> None:
        with torch.no_grad():
            for _ in range(times):
                left @ right

    return run
