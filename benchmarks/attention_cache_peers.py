"""What people run today where few queries see many keys: a resampler's latents, and beams that share a prefix."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attention_peers import BLOCKS, Form, Peer, Peers, cudnn, eager, missing, only_on_gpus
from benchmarks.attention_workloads import Workload


def cross_peers(workload: Workload, device: str) -> Peers:
    """All peers for queries (Q, H, D) that see the keys (K, H, D) of their sample, the baseline first.

    Raises:
        ValueError: the samples differ in length; the peers' batches have no pads.
    """
    if len(set(workload.groups)) != 1 or workload.shares_roots:
        raise ValueError(f"{workload.name}: all groups must have the same root and the same single branch")
    samples = len(workload.groups)
    batched = Form(
        "batched",
        lambda *inputs: [each.unflatten(0, (samples, -1)).transpose(1, 2) for each in inputs],  # (B, H, L, D)
        lambda output: output.transpose(1, 2).flatten(0, 1),
    )
    pairs = workload.pairs
    found: Peers = {
        "sdpa": Peer(sdpa, pairs, batched),
        "eager": Peer(lambda q, k, v: eager(q, k, v, None), pairs, batched, held=pairs),
        "cudnn": only_on_gpus(device) or Peer(cudnn, pairs, batched),
    }
    queries, keys = [query for _, (query,) in workload.groups], [root for root, _ in workload.groups]
    for name, make in BLOCKS.items():
        found[name] = missing(name, device) or Peer(make(queries, keys, False, device), pairs)
    return found


def decode_peers(workload: Workload, device: str) -> Peers:
    """All peers for one query a beam over a prefix and the beam's own cache, the baseline first.

    All but "eager shared" have a cache with a copy of the prefix for every beam, made before the clock starts.

    Raises:
        ValueError: prefixes differ in length, or in their number of beams.
    """
    if len({(root, len(branches)) for root, branches in workload.groups}) != 1:
        raise ValueError(f"{workload.name}: all groups must have the same root and as many branches")
    root, beams = workload.groups[0][0], len(workload.groups[0][1])
    own = torch.tensor([branch for _, branches in workload.groups for branch in branches], device=device)
    longest = int(own.max())
    filled = torch.arange(root + longest, device=device) < root + own[:, None]  # (B, L)
    lengths, pairs = filled.sum(1).tolist(), filled.numel()
    mask = None if filled.all() else filled[:, None, None]

    def caches(shared_k: Tensor, shared_v: Tensor, branch_k: Tensor, branch_v: Tensor) -> list[Tensor]:
        """(B, L, H, D) keys and values."""
        return [
            torch.cat([by_root(shared, root).repeat_interleave(beams, 0), branches], 1)
            for shared, branches in ((shared_k, branch_k), (shared_v, branch_v))
        ]

    padded = Form(
        "repeated",
        lambda q, *cache: [each.transpose(1, 2) for each in (q, *caches(*cache))],
        lambda output: output.transpose(1, 2),
    )
    packed = Form(
        "repeated packed",
        lambda q, *cache: [q[:, 0], *(each[filled] for each in caches(*cache))],
        lambda output: output[:, None],
    )
    found: Peers = {
        "sdpa repeated": Peer(lambda q, k, v: sdpa(q, k, v, attn_mask=mask), pairs, padded),
        "eager repeated": Peer(lambda q, k, v: eager(q, k, v, mask), pairs, padded, held=pairs),
        "eager shared": Peer(eager_shared(filled[:, root:], root, beams), pairs, held=pairs),
        "cudnn repeated": only_on_gpus(device) or Peer(lambda q, k, v: cudnn(q, k, v, attn_mask=mask), pairs, padded),
    }
    for name, make in BLOCKS.items():
        why = missing(name, device)
        found[f"{name} repeated"] = why or Peer(
            make([1] * len(lengths), lengths, False, device), workload.pairs, packed
        )
    return found


def by_root(shared: Tensor, root: int) -> Tensor:
    """(K, H, D) -> (R, root, H, D)."""
    return shared.reshape(len(shared) // root, root, *shared.shape[1:])


def eager_shared(filled: Tensor, root: int, beams: int) -> Callable[..., Tensor]:
    """The products with a prefix for all of its beams at once, those with their own caches one by one.

    Args:
        filled: (B, Lb) bool, which keys a beam has.
        root: the length of every prefix.
        beams: of each prefix, one after another.
    """
    bias = torch.zeros(filled.shape, device=filled.device).masked_fill(~filled, float("-inf"))
    bias = bias.unflatten(0, (-1, beams))[:, None]  # (R, 1, beams, Lb)

    def attend(q: Tensor, shared_k: Tensor, shared_v: Tensor, branch_k: Tensor, branch_v: Tensor) -> Tensor:
        q = q[:, 0].unflatten(0, (-1, beams)) * q.shape[-1] ** -0.5  # (R, beams, H, D)
        root_k, root_v = (by_root(each, root).transpose(1, 2) for each in (shared_k, shared_v))  # (R, H, Lr, D)
        branch_k, branch_v = (
            each.unflatten(0, (-1, beams)).permute(0, 3, 1, 2, 4)  # (R, H, beams, Lb, D)
            for each in (branch_k, branch_v)
        )
        q = q.transpose(1, 2)  # (R, H, beams, D)
        to_root = q @ root_k.mT  # (R, H, beams, Lr)
        to_branch = (branch_k @ q[..., None])[..., 0] + bias.to(q.dtype)  # (R, H, beams, Lb)
        weights = torch.cat([to_root, to_branch], -1).softmax(-1, dtype=torch.float32).to(q.dtype)
        of_root, of_branch = weights.split([to_root.shape[-1], to_branch.shape[-1]], -1)
        output = of_root @ root_v + (of_branch[..., None, :] @ branch_v)[..., 0, :]
        return output.transpose(1, 2).flatten(0, 1)[:, None]  # (B, 1, H, D)

    return attend
