"""The reference of prefix_attention_decode, in plain PyTorch. attention_common/reference.py has the equation."""

import torch
from torch import Tensor

from lynx_kernels.ops.attention_common.reference import attend, attend_backward, sinks_backward
from lynx_kernels.ops.prefix_attention_decode.call import DecodeBackwardCall, DecodeCall


def _paths(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the shared keys that each branch reads, in path order, (B, L), and how many they are, (B,)."""
    ranges = ranges.long()
    ends = (ranges[..., 1] - ranges[..., 0]).cumsum(1)  # places along the path, (B, P)
    lengths = ends[:, -1] if ends.shape[1] else ends.new_zeros(len(ends))
    place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=ranges.device)
    number = (place >= ends[..., None]).sum(1).clamp(max=max(0, ends.shape[1] - 1))  # of the range, (B, L)
    rows = place + (ranges[..., 1] - ends).gather(1, number) if ends.shape[1] else place.expand(len(ends), -1)
    return rows.masked_fill(place >= lengths[:, None], 0), lengths


def _decode_view(call: DecodeCall | DecodeBackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shared rows (B, L), keys (B, L + Lb, Hkv, D) and values, and the visibility (B, Q, L + Lb).

    The queries of a branch are its last tokens: query i of Q does not see the Q - 1 - i newest keys of the branch. Keys
    and values beyond the lengths are replaced by 0, because the caches may hold anything there, including NaN.
    """
    device, num_queries, room = call.q.device, call.q.shape[1], call.branch_k.shape[1]
    rows, shared_lengths = _paths(call.ranges)
    in_shared = torch.arange(rows.shape[1], device=device) < shared_lengths[:, None]  # (B, L)
    in_branch = torch.arange(room, device=device) < call.branch_lengths[:, None]  # (B, Lb)
    place = torch.cat(  # of each key along the path, (B, L + Lb)
        [
            torch.arange(rows.shape[1], device=device).expand(len(rows), -1),
            shared_lengths[:, None] + torch.arange(room, device=device),
        ],
        1,
    )
    newer = torch.arange(num_queries - 1, -1, -1, device=device)
    query = (shared_lengths + call.branch_lengths - 1)[:, None] - newer  # (B, Q)
    filled = torch.cat([in_shared, in_branch], 1)
    visible = filled[:, None] & (place[:, None] <= query[..., None])
    if call.window is not None:
        visible &= place[:, None] > query[..., None] - call.window
    if call.chunk is not None:
        visible &= place[:, None] >= (query - query % call.chunk)[..., None]
    unread = ~filled[..., None, None]
    keys = torch.cat([call.shared_k[rows], call.branch_k], 1).masked_fill(unread, 0)
    values = torch.cat([call.shared_v[rows], call.branch_v], 1).masked_fill(unread, 0)
    return rows, keys, values, visible


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, Dv) and the LSE (B, Q, H)."""
    return attend(call.q, *_decode_view(call)[1:], call.scale, call.softcap, call.sinks)


def backward(call: DecodeBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, of the four caches and of the sinks. That of a shared key sums over its branches."""
    grad, grad_lse, out, lse, q, *caches, sinks = call[:10]
    rows, keys, values, visible = _decode_view(call)
    grad_q, *both = attend_backward(*call[:4], q, keys, values, visible, call.scale, call.softcap)
    gradients = [grad_q]
    for shared, gradient in zip(caches[:2], both, strict=True):
        to_rows = gradient[:, : rows.shape[1]].flatten(0, 1)
        gradients.append(to_rows.new_zeros(shared.shape).index_add_(0, rows.flatten(), to_rows))
    gradients += [gradient[:, rows.shape[1] :] for gradient in both]
    return (
        *(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, (q, *caches), strict=True)),
        sinks_backward(grad, grad_lse, out, lse, sinks),
    )
