"""Logits to losses, entropies and the gradient of the logits: a program for each row of a chunk."""

import triton
import triton.language as tl


@triton.jit
def tanh_and_slope(b_x):
    """tanh(b_x) and its derivative. 2 * sigmoid(2x) - 1 would cancel near 0, and 1 - tanh^2 at large x."""
    b_exp = tl.exp(-2 * tl.abs(b_x))
    b_far = (1 - b_exp) / (1 + b_exp)
    b_square = b_x * b_x
    # The Taylor series; up to 0.25 the next term is below 1e-8 of the result.
    b_near = 1 + b_square * (
        -0.3333333333333333
        + b_square * (0.13333333333333333 + b_square * (-0.05396825396825397 + b_square * 0.021869488536155203))
    )
    b_tanh = tl.where(b_square < 0.0625, b_x * b_near, tl.where(b_x < 0, -b_far, b_far))
    return b_tanh, 4 * b_exp / ((1 + b_exp) * (1 + b_exp))


@triton.jit
def _logits(p_products, p_bias, o_v, m_v, scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """The logits at the columns o_v of a row, and their derivatives by the products."""
    b_logits = tl.load(p_products + o_v, mask=m_v, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_logits += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_logits *= scale
    b_slope = scale * inverse_temperature
    if HAS_SOFTCAP:
        b_tanh, b_tanh_slope = tanh_and_slope(b_logits / softcap)
        b_logits = softcap * b_tanh
        b_slope *= b_tanh_slope
    return b_logits * inverse_temperature, b_slope


@triton.jit
def _entry(p_entries, p_labels, p_factors, i):
    """The number of an entry, its label, and its factor in the sum that is differentiated: 0 if it is not counted."""
    i_entry = tl.load(p_entries + i)
    i_label = tl.load(p_labels + i_entry)
    m_counted = i_label >= 0
    b_factor = m_counted.to(tl.float32)
    if p_factors is not None:
        b_factor = tl.load(p_factors + i_entry, mask=m_counted, other=0.0)
    return i_entry, i_label, b_factor


@triton.jit
def head_fwd_kernel(
    p_products,  # (n, V), hidden W^T
    p_bias,  # (V,) or None
    p_labels,  # (N,), -1 where an entry is not counted
    p_factors,  # (N,) or None: 1
    p_entries,  # (m,)
    p_edges,  # (n + 1,): row i predicts the entries edges[i] to edges[i + 1] - 1 of the m. None: m = n, and entry i
    p_losses,  # (N,)
    p_entropies,  # (N,) or None
    p_grad,  # (n, V) or None; may be p_products
    V,
    scale,
    softcap,
    inverse_temperature,
    label_smoothing,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row: the log of its softmax denominator, then its entries, then the gradient of its products.

    With m the largest logit, the loss is m - logit[label] + log(sum(exp(logit - m))).
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_products += i_row * V
    o_n = tl.arange(0, BLOCK_N)

    b_max = float("-inf")
    b_sum = 0.0  # of exp(logit - max)
    b_moment = 0.0  # of exp(logit - max) * (logit - max)
    b_total = 0.0  # of logits
    for i_v in range(0, V, BLOCK_N):
        m_v = i_v + o_n < V
        b_logits, _ = _logits(p_products, p_bias, i_v + o_n, m_v, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            b_total += tl.sum(tl.where(m_v, b_logits, 0.0), 0)
        b_logits = tl.where(m_v, b_logits, float("-inf"))  # [BLOCK_N]
        b_new = tl.maximum(b_max, tl.max(b_logits, 0))
        b_new_or_0 = tl.where(b_new == float("-inf"), 0.0, b_new)  # a bias may be -inf
        b_logits -= b_new_or_0
        b_exp = tl.exp(b_logits)
        b_rescale = tl.exp(b_max - b_new_or_0)
        if p_entropies is not None:
            b_moved = tl.where(b_max == float("-inf"), 0.0, b_max - b_new_or_0)
            b_moment = (b_moment + b_moved * b_sum) * b_rescale + tl.sum(b_exp * tl.where(b_exp > 0, b_logits, 0.0), 0)
        b_sum = b_sum * b_rescale + tl.sum(b_exp, 0)
        b_max = b_new
    b_log_sum = tl.log(b_sum)

    i_first = i_row
    i_last = i_row + 1
    if p_edges is not None:
        i_first = tl.load(p_edges + i_row)
        i_last = tl.load(p_edges + i_row + 1)
    b_factor = 0.0  # the sum over the entries
    for i in range(i_first, i_last):
        i_entry, i_label, b_entry_factor = _entry(p_entries, p_labels, p_factors, i)
        m_counted = i_label >= 0
        b_label, _ = _logits(p_products, p_bias, i_label, m_counted, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        b_loss = b_max - b_label + b_log_sum
        if HAS_SMOOTHING:
            b_loss += label_smoothing * (b_label - b_total / V)
        tl.store(p_losses + i_entry, b_loss, mask=m_counted)
        if p_entropies is not None:
            tl.store(p_entropies + i_entry, b_log_sum - b_moment / b_sum, mask=m_counted)
        b_factor += b_entry_factor

    if p_grad is not None:
        p_grad += i_row * V
        tl.debug_barrier()  # where the gradient replaces the products, some threads may still read the label's
        for i_v in range(0, V, BLOCK_N):
            o_v = i_v + o_n
            m_v = o_v < V
            b_logits, b_slope = _logits(p_products, p_bias, o_v, m_v, scale, softcap, inverse_temperature, HAS_SOFTCAP)
            b_probs = tl.exp(b_logits - b_max - b_log_sum)  # [BLOCK_N]
            if HAS_SMOOTHING:
                b_probs -= label_smoothing / V
            b_grad = b_probs * b_factor
            for i in range(i_first, i_last):
                _, i_label, b_entry_factor = _entry(p_entries, p_labels, p_factors, i)
                b_grad -= tl.where(o_v == i_label, (1 - label_smoothing) * b_entry_factor, 0.0)
            tl.store(p_grad + o_v, (b_grad * b_slope).to(p_grad.dtype.element_ty), mask=m_v)
