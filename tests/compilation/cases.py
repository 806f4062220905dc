"""The launches compiled without a GPU: every launch that an operation ships, at the sizes it is meant for.

Each operation has a function that calls its launchers on meta tensors, and its cases in ``CASES``. The tests and
compiled.csv use these cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lynx_kernels import PackedLayout, SpanLayout
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.adapter import OPERATION as ADAPTER
from lynx_kernels.ops.cross_attention import OPERATION as CROSS
from lynx_kernels.ops.head_common.chunked import CHUNK, Scoring
from lynx_kernels.ops.head_common.entries import Chunk
from lynx_kernels.ops.head_common.head import HeadCall
from lynx_kernels.ops.head_common.operator import triton_score
from lynx_kernels.ops.pack_embeddings import OPERATION as EMBEDDINGS
from lynx_kernels.ops.prefix_attention import OPERATION as PREFIX
from lynx_kernels.ops.prefix_attention_decode import OPERATION as DECODE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Case:
    """Launches of one operation. ``launch()`` makes them on meta tensors.

    Attributes:
        kernels: the kernels that are launched, in order.
        compute: the dtype of the products, or of the sums if there are no products.
    """

    operation: str
    shape: str
    dtype: str
    launch: Callable[[], None]
    kernels: tuple[str, ...]
    compute: torch.dtype

    def __str__(self) -> str:
        return f"{self.operation} {self.shape}, {self.dtype}"


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _assert_alike(results, expected) -> None:
    assert [(each.shape, each.dtype) for each in results] == [(each.shape, each.dtype) for each in expected]


# The adapter, with the paper's sizes unless stated otherwise.

FWD = {
    "tiled": ("adapter_fwd_stats_kernel", "adapter_fwd_down_kernel", "adapter_fwd_up_kernel"),
    "fused": ("adapter_fwd_fused_kernel",),
    "small_m": ("adapter_fwd_small_m_kernel", "adapter_fwd_small_m_combine_kernel", "adapter_fwd_up_kernel"),
}
BACKWARD = {
    "tiled": ("adapter_bwd_weight_rows_kernel", "adapter_bwd_bottleneck_kernel", "adapter_bwd_input_kernel"),
    "fused": ("adapter_bwd_weight_rows_kernel", "adapter_bwd_fused_kernel"),
}


def adapter(tokens, width, bottleneck, stream, weights, activation):
    """The adapter and all its gradients. ``weights`` is the dtype of the weights, ``stream`` that of x."""
    meta = partial(_meta, dtype=weights)
    inputs = [
        _meta(tokens, width, dtype=stream), meta(width), meta(width), meta(bottleneck, width), meta(bottleneck),
        meta(width, bottleneck), meta(width), _meta(dtype=FP32),
    ]  # fmt: skip
    out, *saved = ADAPTER.forward(*inputs, 1e-5, activation, "triton")
    _assert_alike([out], inputs[:1])
    _assert_alike(ADAPTER.backward(out, *inputs, *saved, activation, [True] * 8, "triton"), inputs)


def _adapter_case(
    tokens, bottleneck, forward, backward, stream=BF16, weights=None, *, width=4096, activation="silu"
) -> Case:
    weights = weights or stream
    shape = f"T={tokens} d={width} r={bottleneck}" + ("" if activation == "silu" else f" {activation}")
    dtype = NAMES[stream] if stream == weights else f"{NAMES[stream]} through {NAMES[weights]}"
    launch = partial(adapter, tokens, width, bottleneck, stream, weights, activation)
    return Case("adapter", shape, dtype, launch, FWD[forward] + BACKWARD[backward], weights)


ADAPTER_CASES = [
    _adapter_case(8192, 2048, "tiled", "tiled"),
    _adapter_case(512, 2048, "tiled", "tiled"),
    *(_adapter_case(tokens, 2048, "small_m", "tiled") for tokens in (64, 32, 8)),
    # The widest bottlenecks of the fused form: forward only, with backward, and on 4 warps; then with few rows.
    _adapter_case(8192, 256, "fused", "tiled"),
    *(_adapter_case(8192, bottleneck, "fused", "fused") for bottleneck in (128, 64)),
    _adapter_case(128, 256, "fused", "tiled"),
    _adapter_case(128, 128, "fused", "fused"),
    _adapter_case(8192, 2048, "tiled", "tiled", FP16),
    # Autocast: x stays in fp32.
    _adapter_case(8192, 2048, "tiled", "tiled", FP32, BF16),
    _adapter_case(512, 2048, "tiled", "tiled", FP32, BF16),
    _adapter_case(64, 2048, "small_m", "tiled", FP32, FP16),
    _adapter_case(8192, 256, "fused", "tiled", FP32, BF16),
    _adapter_case(8192, 64, "fused", "fused", FP32, BF16),
    # Weights wider than x, and everything in fp32.
    _adapter_case(8192, 2048, "tiled", "tiled", FP32),
    _adapter_case(8192, 2048, "tiled", "tiled", BF16, FP32),
    _adapter_case(64, 2048, "small_m", "tiled", BF16, FP32),
    _adapter_case(8192, 64, "fused", "fused", BF16, FP32),
    *(_adapter_case(8192, 2048, "tiled", "tiled", activation=each) for each in ("relu", "gelu", "gelu_tanh")),
    # Triton specialises arguments that are 1 or multiples of 16: sizes of 1, and sizes that are not multiples.
    _adapter_case(1, 1, "fused", "fused", width=1),
    _adapter_case(1, 45, "fused", "fused", width=77),
    _adapter_case(8192, 1000, "tiled", "tiled", width=1000),
    _adapter_case(8192, 255, "fused", "tiled", width=1000),
    _adapter_case(40, 1000, "small_m", "tiled", FP32, BF16, width=1000),
]


# Attention.

ATTENTION = (
    "attention_fwd_kernel",
    "attention_bwd_preprocess_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
)
SPLIT = (
    "attention_fwd_kernel",
    "attention_combine_kernel",
    "attention_bwd_preprocess_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
)


def attention(operation: dispatch.Operation, inputs, *table):
    """prefix_attention or cross_attention, and the gradients through output and LSE."""
    q, *_ = inputs
    out, lse = operation.forward(*inputs, *table, 0.1, "triton")
    _assert_alike([out, lse], [q, _meta(*q.shape[:2], dtype=FP32)])
    _assert_alike(operation.backward(out, lse, out, lse, *inputs, *table, 0.1, "triton"), inputs)


def _attention_case(operation, shape, rows, heads, head_dim, dtype, kernels, *table) -> Case:
    (queries, keys), (query_heads, key_heads) = rows, heads
    inputs = [_meta(queries, query_heads, head_dim, dtype=dtype)]
    inputs += [_meta(keys, key_heads, head_dim, dtype=dtype)] * 2
    shape = f"{shape} H={query_heads}/{key_heads} D={head_dim}"
    return Case(operation.name, shape, NAMES[dtype], partial(attention, operation, inputs, *table), kernels, dtype)


def _prefix_case(groups, head_dim, dtype=BF16, *, heads=(8, 4), root_is_causal=True) -> Case:
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal, device="meta")
    tokens, segments = layout.num_tokens, len(layout.segments) - 1
    shape = f"T={tokens} in {segments} {'causal' if root_is_causal else 'full'}"
    table = layout.segments, root_is_causal
    return _attention_case(PREFIX, shape, (tokens, tokens), heads, head_dim, dtype, ATTENTION, *table)


def _cross_case(query_lengths, keys, head_dim, dtype=BF16, *, kernels=SPLIT) -> Case:
    """Every query segment sees ``keys`` keys, and shares none."""
    spans = [(i * keys, i * keys + keys) for i in range(len(query_lengths))]
    layout = SpanLayout.from_spans(query_lengths, spans, spans[-1][1], device="meta")
    shape = f"Q={layout.num_queries} in {len(spans)} K={layout.num_keys}"
    table = layout.segments, layout.tile_offsets, layout.tile_segments
    rows = layout.num_queries, layout.num_keys
    return _attention_case(CROSS, shape, rows, (16, 16), head_dim, dtype, kernels, *table)


def decode(branches, heads, kv_heads, head_dim, dtype):
    """One root and one query per branch. Heads are the outer dimension of the caches, as in transformers."""
    q = _meta(branches, 1, heads, head_dim, dtype=dtype)
    root = _meta(1, kv_heads, 901, head_dim, dtype=dtype).transpose(1, 2)
    branch = _meta(branches, kv_heads, 64, head_dim, dtype=dtype).transpose(1, 2)
    indices = [_meta(length, dtype=torch.int32) for length in (branches, 1, branches)]
    results = DECODE.forward(q, root, root, branch, branch, *indices, 0.1, "triton")
    _assert_alike(results, [q, _meta(*q.shape[:3], dtype=FP32)])


def _decode_case(heads, kv_heads, head_dim, dtype=BF16, branches=5) -> Case:
    shape = f"B={branches} of one root H={heads}/{kv_heads} D={head_dim}"
    launch = partial(decode, branches, heads, kv_heads, head_dim, dtype)
    return Case(
        DECODE.name,
        shape,
        NAMES[dtype],
        launch,
        ("prefix_attention_decode_fwd_kernel", "attention_combine_kernel"),
        dtype,
    )


# 8192 tokens in 16 segments and in 160: long ones, and ones that leave most of a large tile empty. Both numbers are
# multiples of 16, so that launches common to both compile once.
LONG, SHORT = [(576, [448])] * 8, [(32, [70])] * 80

ATTENTION_CASES = [
    *(_prefix_case(LONG, head_dim) for head_dim in (128, 88, 64, 256)),
    _prefix_case(SHORT, 128),
    _prefix_case(LONG, 128, root_is_causal=False),
    _prefix_case(LONG, 128, heads=(8, 8)),
    _prefix_case(LONG, 128, FP16),
    *(_prefix_case(LONG, head_dim, FP32) for head_dim in (128, 64, 256)),
    # Sizes of 1, and sizes that are not multiples of 16.
    _prefix_case([(1, [])], 1, heads=(1, 1)),
    _prefix_case([(70, [7])], 7, heads=(3, 1), root_is_causal=False),
    _prefix_case([(0, [300])], 32, heads=(1, 1)),
    # Latents of two images, whose keys are split; long texts, each with the image before it.
    *(_cross_case([32, 32], 901, head_dim) for head_dim in (128, 88, 64, 256)),
    _cross_case([32, 32], 901, 64, FP32),
    _cross_case([2048] * 4, 901, 128, kernels=ATTENTION),
    # Beams of one image: tiles of 16 rows, and of 64 where heads share keys.
    *(_decode_case(32, 32, head_dim) for head_dim in (128, 88, 64)),
    *(_decode_case(32, 4, head_dim) for head_dim in (128, 256)),
    _decode_case(32, 32, 64, FP32),
]


# pack_embeddings, with a table of 32000 tokens.


def embeddings(rows, num_vision, width, table, vision):
    """The packed rows and the gradient of the vision rows."""
    token_ids, index = _meta(rows, dtype=torch.int64), _meta(rows, dtype=torch.int32)
    source = _meta(num_vision, width, dtype=vision)
    out = EMBEDDINGS.forward(token_ids, _meta(32000, width, dtype=table), source, index, "triton")
    _assert_alike([out], [_meta(rows, width, dtype=table)])
    results = EMBEDDINGS.backward(out, token_ids, index, 32000, num_vision, vision, [False, True], "triton")
    _assert_alike(results, [source])


def _embeddings_case(table, vision, rows=8192, num_vision=512, width=4096) -> Case:
    dtype = NAMES[table] if table == vision else f"{NAMES[vision]} into {NAMES[table]}"
    launch = partial(embeddings, rows, num_vision, width, table, vision)
    kernels = ("pack_embeddings_fwd_kernel", "pack_embeddings_bwd_find_kernel", "pack_embeddings_bwd_sum_kernel")
    return Case(EMBEDDINGS.name, f"T={rows} M={num_vision} d={width}", dtype, launch, kernels, FP32)


EMBEDDINGS_CASES = [
    *(_embeddings_case(table, vision) for table, vision in ((BF16, BF16), (FP32, BF16), (BF16, FP32), (FP32, FP32))),
    # Sizes of 1, and sizes that are not multiples of 16.
    _embeddings_case(FP16, FP16, 1000, 77, 77),
    _embeddings_case(BF16, BF16, 1, 1, 1),
]


# The output head of linear_cross_entropy and token_log_probs: one chunk of rows. Its products are PyTorch's.


def head(vocabulary, dtype, asked, options):
    """Score a chunk: of rows that predict an entry each, or several; losses alone, or gradients and entropies too."""
    rows, entries = torch.empty(2, CHUNK, dtype=torch.int64, device="meta")
    losses, products = _meta(8192, dtype=FP32), _meta(CHUNK, vocabulary, dtype=FP32)
    call = HeadCall("", _meta(8192, 64, dtype=dtype), _meta(vocabulary, 64, dtype=dtype), entries, **options)
    entropies = torch.empty_like(losses) if "entropy" in asked else None
    factors = torch.empty_like(losses) if "weights" in asked else None
    grad_dtype = dtype if "gradient" in asked else None
    scoring = Scoring(call, _meta(8192, dtype=torch.int64), losses, entropies, factors, grad_dtype)
    at = entries if "several" in asked else None
    grad = triton_score(scoring, products, Chunk(rows, rows >= 0, entries, at))
    if grad_dtype is not None:
        _assert_alike([grad], [_meta(CHUNK, vocabulary, dtype=dtype)])


def _head_case(dtype, asked, vocabulary=32000, **options) -> Case:
    changes = [*asked, *options]
    shape = f"V={vocabulary}" + (f" with {', '.join(changes)}" if changes else "")
    if options.get("bias"):
        options["bias"] = _meta(vocabulary, dtype=dtype)
    launch = partial(head, vocabulary, dtype, asked, options)
    return Case("head", shape, NAMES[dtype], launch, ("head_fwd_kernel",), FP32)


HEAD_CASES = [
    # The loss of a frozen or trained head; of a shared prompt's many labels, weighted; a fp32 head's, over its logits.
    *(_head_case(dtype, ("gradient",)) for dtype in (BF16, FP16, FP32)),
    _head_case(BF16, ("gradient", "weights", "several")),
    # Log-probabilities and entropies, with a Jacobian or without.
    _head_case(BF16, ("gradient", "weights", "entropy")),
    _head_case(BF16, ("several", "entropy")),
    # Everything, and other vocabularies: Gemma's, and one whose rows are not aligned.
    _head_case(BF16, ("gradient", "weights", "several", "entropy"), bias=True, softcap=30.0, label_smoothing=0.1),
    _head_case(BF16, ("gradient",), 262144, softcap=30.0),
    _head_case(BF16, ("gradient",), 50257),
    _head_case(FP32, ("gradient",), 1),
]

CASES = [*ADAPTER_CASES, *ATTENTION_CASES, *EMBEDDINGS_CASES, *HEAD_CASES]
