"""The activations of the adapter and their derivatives, in Triton. PyTorch's are in ops/adapter/activations.py."""

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_ROOT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        b_out = b_x * tl.sigmoid(b_x)
    elif ACTIVATION == "relu":
        b_out = tl.where(b_x < 0, 0.0, b_x)  # tl.maximum would drop a NaN
    elif ACTIVATION == "gelu":
        b_out = 0.5 * b_x * (1 + tl.erf(b_x * _ROOT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation; expected silu, relu, gelu or gelu_tanh")
        # (1 + tanh(u)) / 2 equals sigmoid(2u)
        b_out = b_x * tl.sigmoid(b_x * (1 + b_x * b_x * _CUBIC) * _TWICE_ROOT_TWO_OVER_PI)
    return b_out


@triton.jit
def act_grad(b_x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at b_x."""
    if ACTIVATION == "silu":
        b_gate = tl.sigmoid(b_x)
        b_out = b_gate * (1 + b_x * (1 - b_gate))
    elif ACTIVATION == "relu":
        b_out = tl.where(b_x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        b_out = 0.5 * (1 + tl.erf(b_x * _ROOT_HALF)) + b_x * _ROOT_HALF_OVER_PI * tl.exp(-0.5 * b_x * b_x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation; expected silu, relu, gelu or gelu_tanh")
        b_square = b_x * b_x * _CUBIC
        b_twice_u = b_x * (1 + b_square) * _TWICE_ROOT_TWO_OVER_PI
        b_gate = tl.sigmoid(b_twice_u)
        # sigmoid(-2u) instead of 1 - sigmoid(2u): at x = 3 the cancellation error would be 10 times as large.
        b_out = b_gate + b_x * b_gate * tl.sigmoid(-b_twice_u) * (1 + 3 * b_square) * _TWICE_ROOT_TWO_OVER_PI
    return b_out
