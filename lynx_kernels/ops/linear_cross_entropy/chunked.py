"""linear_cross_entropy in one pass over chunks of logits: the sum of the losses and its gradients, in plain PyTorch.

Once the losses are known, the gradient of their sum is known up to a factor. So forward computes it from the logits it
already has, one chunk of rows at a time, and backward only multiplies by the factor. This takes two products with a
frozen head and three with a trained one. Recomputing the logits in backward would take three and four. From forward to
backward the gradients are kept instead of the arguments, or nothing if no gradient is needed. Shapes: T rows, width d,
vocabulary V, n rows in a chunk.

On CPUs, bf16 products use oneDNN, which rounds the logits to bf16 like a plain head. Converted to fp32 they took 2.5 to
3 times as long (Zen 4, one thread, V=32000, d=512 and 1024, 128 to 1024 rows).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends import onednn
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.linear_cross_entropy import rows as supervised_rows
from lynx_kernels.ops.linear_cross_entropy.call import LossCall, LossSumCall

CHUNK = 512  # rows; 65 MB of logits in fp32 with 32000 tokens


def unsupported_reason(call: LossCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    return "it returns only the sum of the losses, not reduction='none'" if call.reduction == "none" else None


def forward(call: LossSumCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses () and its gradients: hidden's (T, d) in its dtype, and the weight's (V, d) in
    ``summed_dtype``. A gradient that is not needed is (0,)."""
    hidden, weight, labels, label_smoothing, ignore_index, max_supervised, needs = call
    supervised_rows.check_labels(labels, weight.shape[0], ignore_index)
    compute = supervised_rows.compute_dtype(hidden, weight)
    needs_hidden, needs_weight = needs
    total = hidden.new_zeros((), dtype=acc_dtype(compute))
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    grad_weight = None
    grad_weight_dtype, weight = summed_dtype(weight), weight.to(compute)
    for rows in supervised_rows.chunks(labels, ignore_index, CHUNK, max_supervised):
        supervised = (labels[rows] != ignore_index)[:, None]  # (n, 1)
        label = torch.where(supervised, labels[rows][:, None], 0)
        x = torch.where(supervised, hidden[rows], 0).to(compute)  # (n, d); unsupervised rows may hold NaN
        log_probs = F.log_softmax(_times_weight(x, weight.t()), -1, dtype=total.dtype)  # (n, V)
        losses = (label_smoothing - 1) * log_probs.gather(1, label)
        if label_smoothing:
            losses -= label_smoothing * log_probs.mean(-1, keepdim=True)
        total += torch.where(supervised, losses, 0).sum()
        if not (needs_hidden or needs_weight):
            continue
        grad_logits = log_probs.exp_().sub_(label_smoothing / weight.shape[0])
        grad_logits.scatter_add_(1, label, torch.full_like(losses, label_smoothing - 1))
        grad_logits = grad_logits.mul_(supervised).to(compute)
        del log_probs  # frees the chunk in the accumulation dtype
        if needs_hidden:
            grad_hidden[rows] = _times_weight(grad_logits, weight).to(hidden.dtype)
        if needs_weight:
            grad_weight = _add_product(grad_weight, grad_logits.t(), x)
    if grad_weight is None:
        return total, grad_hidden, weight.new_zeros(weight.shape if needs_weight else 0, dtype=grad_weight_dtype)
    return total, grad_hidden, grad_weight.to(grad_weight_dtype)


def summed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the weight's summed gradient: the weight's dtype, but fp32 for fp16, which a sum may overflow."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _times_weight(left: Tensor, right: Tensor) -> Tensor:
    # Like _product, but right must be the weight or its transpose. In fp32 on CPUs oneDNN is faster then (Zen 4, 52 and
    # 512 rows, V=32000, d=512: logits 2.8 and 1.2 times as fast, hidden's gradient 1.2 and 1.1 times). It is not faster
    # for the weight's gradient.
    if onednn.is_quicker(left, right):
        return onednn.linear(left, right.t())
    return _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # left @ right for factors of one dtype, accumulated in at least fp32.
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.bfloat16 and left.is_cpu and onednn.HAS_BF16:
        return left @ right
    return left.to(acc_dtype(left.dtype)) @ right.to(acc_dtype(right.dtype))


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    # The first product becomes the total. So with one chunk, no tensor of the weight's size is zeroed, added or cast.
    if total is None:
        return _product(left, right)
    total = total.to(acc_dtype(total.dtype))
    if left.dtype == total.dtype:
        return total.addmm_(left, right)  # needs no second tensor of the weight's size
    return total.add_(_product(left, right))
