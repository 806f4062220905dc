"""What people run today where a row of samples, each a prefix and a text, attends to itself.

Every peer gets its inputs in the form it likes best, packed or padded: bringing them there is not timed, and in the
check it is part of what is differentiated, so that all answer for the same packed inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attention_workloads import Workload, rows_of
from lynx_kernels import PackedLayout

_NOT_REPEATED = ("eager", "flex and mask", "flex changing")  # each has a form that is faster by far
_CHANGES = 4  # batches of other lengths that "flex changing" takes in turn


@dataclass(frozen=True)
class Form:
    """How a peer's inputs lie in memory.

    Attributes:
        prepare: from the packed inputs of the operation to the peer's.
        restore: from the peer's output to the packed one.
    """

    name: str
    prepare: Callable[..., Sequence[Tensor]] = lambda *inputs: inputs
    restore: Callable[[Tensor], Tensor] = lambda output: output


PACKED = Form("packed")


@dataclass(frozen=True)
class Peer:
    """One way to compute a workload.

    Attributes:
        attend: from inputs in ``form`` to the output.
        pairs: scores it computes a head, those of masked pairs and pads included.
        held: scores a head that it writes to memory at one time; 0 for fused kernels.
    """

    attend: Callable[..., Tensor]
    pairs: int
    form: Form = PACKED
    held: int = 0


Peers = dict[str, Peer | str]  # by name; a string says why a peer is left out
# Given the lengths of queries and of keys of each block, and whether it is causal, aligned at the last query and key:
# attention of (Q, H, D) to (K, H, D).
MakeBlocks = Callable[[list[int], list[int], bool, str], Callable[..., Any]]


def prefix_peers(workload: Workload, *, requires_grad: bool, device: str, compiler: Callable = torch.compile) -> Peers:
    """All peers for a workload of prefix attention, the baseline first."""
    padded, mask = _padded(workload, device), _dense_mask(workload, device)
    num_padded = mask.numel()
    masked: dict[str, Any] = {"is_causal": True} if workload.is_causal else {"attn_mask": mask}
    found: Peers = {
        "sdpa padded": Peer(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), num_padded, padded),
        "eager": Peer(lambda q, k, v: eager(q, k, v, mask), num_padded, padded, held=num_padded),
        "sdpa split": Peer(sdpa_split(workload, device), workload.pairs),
    }
    if workload.is_causal:
        found["sdpa padded causal"] = Peer(lambda q, k, v: sdpa(q, k, v, is_causal=True), num_padded // 2, padded)
    elif not workload.shares_roots and len({root for root, _ in workload.groups}) == 1:
        found["sdpa split padded"] = Peer(sdpa_split_padded(workload, device), num_padded, padded)
    if requires_grad and device == "cpu":
        found |= dict.fromkeys(("flex", "flex and mask", "flex changing"), "FlexAttention has no backward on CPUs")
    else:
        found |= dict(_flex(workload, device, compiler))
    found["cudnn"] = only_on_gpus(device) or Peer(lambda q, k, v: cudnn(q, k, v, **masked), num_padded, padded)
    for name, make in BLOCKS.items():
        if why := missing(name, device):
            found[name] = why
        elif workload.shares_roots:
            found[name] = "cannot say that branches share a root"
        else:
            found[name] = Peer(two_calls(make, workload, device), workload.pairs)
    return found


def repeated_peers(workload: Workload, make: Callable[[Workload], Peers], device: str) -> Peers:
    """The faster of the peers that ``make`` gives for the workload with a copy of the root for every branch."""
    pieces, kept, start = [], [], 0
    for root, branches in workload.segments():
        for number, branch in enumerate(branches):
            pieces += [root, branch]
            skipped = len(root) if number else 0  # of the copies of a root only the first one's output is looked at
            kept.append(range(start + skipped, start + len(root) + len(branch)))
            start += len(root) + len(branch)
    rows, kept_rows = rows_of(pieces, device), rows_of(kept, device)

    def around(form: Form) -> Form:
        return Form(
            f"repeated {form.name}",
            lambda *inputs: form.prepare(*(each[rows] for each in inputs)),
            lambda output: form.restore(output)[kept_rows],
        )

    return {
        f"repeated {name}": replace(peer, form=around(peer.form))
        for name, peer in make(workload.repeated()).items()
        if isinstance(peer, Peer) and name not in _NOT_REPEATED  # who cannot run has said so already
    }


def _padded(workload: Workload, device: str) -> Form:
    """(T, H, D) to (B, H, L, D) as models have it, heads behind tokens in memory; pads hold any numbers."""
    lengths = torch.tensor(workload.lengths, device=device)
    starts, column = lengths.cumsum(0) - lengths, torch.arange(max(workload.lengths), device=device)
    rows = (starts[:, None] + column).clamp(max=sum(workload.lengths) - 1)  # (B, L)
    is_token = column < lengths[:, None]
    return Form(
        "padded",
        lambda *inputs: [each[rows].transpose(1, 2) for each in inputs],
        lambda output: output.transpose(1, 2)[is_token],
    )


def _dense_mask(workload: Workload, device: str) -> Tensor:
    """(B, 1, L, L) bool, True where a query sees a key; pads see themselves, no row of the softmax may be empty."""
    longest = max(workload.lengths)
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(workload.groups), 1, 1, 1)
    for rows, group, length in zip(mask, workload.groups, workload.lengths, strict=True):
        rows[0, :length, :length] = replace(workload, groups=(group,)).layout("cpu").visible()
    return mask.to(device)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as transformers writes it: the softmax in fp32, the rest in the dtype of the inputs."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def cudnn(q: Tensor, k: Tensor, v: Tensor, **masked: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, **masked)


def _causal_mask(queries: int, keys: int, device: str) -> Any:
    """The newest ``queries`` of ``keys`` tokens, causal; on a GPU in the form that SDPA's flash kernel understands."""
    if device == "cuda":
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def sdpa_split(workload: Workload, device: str) -> Callable[..., Tensor]:
    """Sample after sample: the root, then each branch against the root and itself; packed inputs, no pads."""
    calls: list[tuple[range, list[range], dict[str, Any]]] = []  # queries, keys, who sees whom
    for root, branches in workload.segments():
        if workload.is_causal:
            tokens = range(root.start, branches[0].stop)
            calls.append((tokens, [tokens], {"is_causal": True}))
            continue
        if root:
            calls.append((root, [root], {"is_causal": workload.root_is_causal}))
        for branch in branches:
            mask = _causal_mask(len(branch), len(root) + len(branch), device)
            keys = [range(root.start, branch.stop)] if root.stop == branch.start else [root, branch]
            calls.append((branch, keys, {"attn_mask": mask}))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_one(_part(q, [own]), _part(k, keys), _part(v, keys), how) for own, keys, how in calls])

    return attend


def _part(tensor: Tensor, tokens: list[range]) -> Tensor:
    parts = [tensor[each.start : each.stop] for each in tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
    """SDPA of (Q, H, D) to (K, H, D)."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return sdpa(q, k, v, **how)[0].transpose(0, 1)


def sdpa_split_padded(workload: Workload, device: str) -> Callable[..., Tensor]:
    """All samples at once: full roots of one length, then padded texts against their root and themselves."""
    root = workload.groups[0][0]
    longest = max(workload.lengths)
    mask = _causal_mask(longest - root, longest, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        to_root = sdpa(q[:, :, :root], k[:, :, :root], v[:, :, :root], is_causal=workload.root_is_causal)
        return torch.cat([to_root, sdpa(q[:, :, root:], k, v, attn_mask=mask)], 2)

    return attend


def _flex(workload: Workload, device: str, compiler: Callable) -> Iterator[tuple[str, Peer]]:
    """FlexAttention over the packed row: its block mask at hand, built at every call, and for changing lengths."""

    def attend_with(attention: Callable, mask: Any, *inputs: Tensor) -> Tensor:
        output = attention(*(each.transpose(0, 1)[None] for each in inputs), block_mask=mask)
        return output[0].transpose(0, 1)

    attention, build = compiler(flex_attention, dynamic=False), compiler(create_block_mask, dynamic=False)
    layout = workload.layout(device)
    made = cache(lambda: _block_mask(build, layout, device))  # not before the check: what fails there fails alone
    yield "flex", Peer(lambda *qkv: attend_with(attention, made(), *qkv), workload.pairs)
    yield (
        "flex and mask",
        Peer(lambda *qkv: attend_with(attention, _block_mask(build, layout, device), *qkv), workload.pairs),
    )

    # At every call the last text is one token longer than at the last, then as long as at first.
    *others, (root, (*branches, last)) = workload.groups
    turn = cycle(
        replace(workload, groups=(*others, (root, (*branches, last + more)))).layout(device)
        for more in range(_CHANGES)
    )  # fmt: skip
    tokens = sum(workload.lengths)
    dynamic, dynamic_build = compiler(flex_attention, dynamic=True), compiler(create_block_mask, dynamic=True)
    longer = Form(
        "longer", lambda *inputs: [torch.cat([each, each[-1:].expand(_CHANGES - 1, -1, -1)]) for each in inputs]
    )

    def attend_changing(*inputs: Tensor) -> Tensor:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("other lengths at every call")
        changed = next(turn)
        mask = _block_mask(dynamic_build, changed, device)
        return attend_with(dynamic, mask, *(each[: changed.num_tokens] for each in inputs))[:tokens]

    yield "flex changing", Peer(attend_changing, workload.pairs, longer)


def _block_mask(build: Callable, layout: PackedLayout, device: str) -> Any:
    first, last = layout.key_intervals()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= query) & (query < last[key])

    return build(sees, None, None, layout.num_tokens, layout.num_tokens, device=device)


def two_calls(make: MakeBlocks, workload: Workload, device: str) -> Callable[..., Tensor]:
    """Block-diagonal attention: one call for causal sequences; roots, then texts against all of their sample."""
    lengths = workload.lengths
    if workload.is_causal:
        return make(lengths, lengths, True, device)
    roots, texts = [root for root, _ in workload.groups], [text for _, (text,) in workload.groups]
    to_root = make(roots, roots, workload.root_is_causal, device)
    to_sample = make(texts, lengths, True, device)
    root_rows = rows_of([root for root, _ in workload.segments()], device)
    text_rows = rows_of([text for _, (text,) in workload.segments()], device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        output.index_copy_(0, root_rows, to_root(q[root_rows], k[root_rows], v[root_rows]))
        return output.index_copy_(0, text_rows, to_sample(q[text_rows], k, v))

    return attend


def _offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def _torch_varlen(queries: list[int], keys: list[int], is_causal: bool, device: str) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    where = _offsets(queries, device), _offsets(keys, device), max(queries), max(keys)
    window = (-1, 0) if is_causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, *where, window_size=window)


def _flash_attn(queries: list[int], keys: list[int], is_causal: bool, device: str) -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    where = _offsets(queries, device), _offsets(keys, device), max(queries), max(keys)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, *where, causal=is_causal)


def _xformers(queries: list[int], keys: list[int], is_causal: bool, device: str) -> Callable[..., Any]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalMask

    kind = BlockDiagonalCausalFromBottomRightMask if is_causal else BlockDiagonalMask
    bias = kind.from_seqlens(queries, keys, device=torch.device(device))
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


BLOCKS: dict[str, MakeBlocks] = {"varlen": _torch_varlen, "flash-attn": _flash_attn, "xformers": _xformers}
_MODULES = {"varlen": "torch.nn.attention.varlen", "flash-attn": "flash_attn", "xformers": "xformers"}


def only_on_gpus(device: str) -> str | None:
    return None if device == "cuda" else "runs on GPUs only"


def missing(name: str, device: str) -> str | None:
    """Why one of ``BLOCKS`` cannot run here, or None."""
    if why := only_on_gpus(device):
        return why
    return None if find_spec(_MODULES[name]) else f"{_MODULES[name]} is not installed"
