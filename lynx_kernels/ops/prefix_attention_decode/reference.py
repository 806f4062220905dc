"""The reference of prefix_attention_decode, in plain PyTorch. attention_common/reference.py has the equation."""

import torch
from torch import Tensor

from lynx_kernels.ops.attention_common.reference import attend, attend_backward
from lynx_kernels.ops.prefix_attention_decode.call import DecodeBackwardCall, DecodeCall


def _decode_view(call: DecodeCall | DecodeBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, Lr + Lb, Hkv, D), the root's copied for every branch, and the visibility (B, Q, Lr + Lb).

    The queries of a branch are its last tokens: query i of Q does not see the Q - 1 - i newest keys of the branch. Keys
    and values beyond the lengths are replaced by 0, because the caches may hold anything there, including NaN.
    """
    branch_to_root, root_lengths, branch_lengths = call.branch_to_root, call.root_lengths, call.branch_lengths
    device, num_queries = call.q.device, call.q.shape[1]
    in_root = torch.arange(call.root_k.shape[1], device=device) < root_lengths[branch_to_root, None]  # (B, Lr)
    seen = branch_lengths[:, None] - torch.arange(num_queries - 1, -1, -1, device=device)  # (B, Q)
    in_branch = torch.arange(call.branch_k.shape[1], device=device) < seen[:, :, None]  # (B, Q, Lb)
    is_filled = torch.arange(call.branch_k.shape[1], device=device) < branch_lengths[:, None]  # (B, Lb)
    unread = ~torch.cat([in_root, is_filled], 1)[..., None, None]  # (B, Lr + Lb, 1, 1)
    keys = torch.cat([call.root_k[branch_to_root], call.branch_k], 1).masked_fill(unread, 0)
    values = torch.cat([call.root_v[branch_to_root], call.branch_v], 1).masked_fill(unread, 0)
    return keys, values, torch.cat([in_root[:, None].expand(-1, num_queries, -1), in_branch], 2)


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    return attend(call.q, *_decode_view(call), call.scale)


def backward(call: DecodeBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q and of the four caches. The gradient of a root sums over its branches."""
    q, root_k, root_v, branch_k, branch_v, branch_to_root = call[4:10]
    keys, values, visible = _decode_view(call)
    grad_q, grad_keys, grad_values = attend_backward(*call[:4], q, keys, values, visible, call.scale)
    split = [root_k.shape[1], branch_k.shape[1]]
    (to_root_k, to_branch_k), (to_root_v, to_branch_v) = grad_keys.split(split, 1), grad_values.split(split, 1)
    grad_root_k = to_root_k.new_zeros(root_k.shape).index_add_(0, branch_to_root, to_root_k)
    grad_root_v = to_root_v.new_zeros(root_v.shape).index_add_(0, branch_to_root, to_root_v)
    gradients = (grad_q, grad_root_k, grad_root_v, to_branch_k, to_branch_v)
    inputs = (q, root_k, root_v, branch_k, branch_v)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, inputs, strict=True))
