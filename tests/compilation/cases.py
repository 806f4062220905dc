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

PREFIX_KERNELS = (
    "prefix_attention_fwd_kernel",
    "attention_bwd_preprocess_kernel",
    "prefix_attention_bwd_dq_kernel",
    "prefix_attention_bwd_dkdv_kernel",
)
CROSS_KERNELS = (
    "cross_attention_fwd_kernel",
    "attention_bwd_preprocess_kernel",
    "cross_attention_bwd_dq_kernel",
    "cross_attention_bwd_dkdv_kernel",
)
SPLIT = CROSS_KERNELS[0], "attention_combine_kernel", *CROSS_KERNELS[1:]


def attention(operation: dispatch.Operation, inputs, *options):
    """prefix_attention or cross_attention, and the gradients through output and LSE."""
    q, _, v, *_ = inputs
    out, lse = operation.forward(*inputs, *options, "triton")
    _assert_alike([out, lse], [_meta(*q.shape[:2], v.shape[2], dtype=q.dtype), _meta(*q.shape[:2], dtype=FP32)])
    gradients = operation.backward(out, lse, out, lse, *inputs, *options, "triton")
    _assert_alike(gradients, [_meta(0, dtype=FP32) if each is None else each for each in inputs])


def _prefix_case(
    layout: PackedLayout, head_dim, dtype=BF16, *, value_dim=None, heads=(8, 4), softcap=None, sinks=False, name=""
) -> Case:
    (query_heads, key_heads), tokens, meta = heads, layout.num_tokens, partial(_meta, dtype=dtype)
    inputs = [meta(tokens, query_heads, head_dim), meta(tokens, key_heads, head_dim)]
    inputs += [meta(tokens, key_heads, value_dim or head_dim), _meta(query_heads, dtype=FP32) if sinks else None]
    options = layout.runs, layout.tokens, layout.key_runs, layout.window, layout.chunk, 0.1, softcap
    shape = f"T={tokens} in {layout.runs.shape[0] - 1}{name} H={query_heads}/{key_heads} D={head_dim}"
    shape += "" if value_dim is None else f" Dv={value_dim}"
    return Case(PREFIX.name, shape, NAMES[dtype], partial(attention, PREFIX, inputs, *options), PREFIX_KERNELS, dtype)


def _cross_case(query_lengths, keys, head_dim, dtype=BF16, *, kernels=SPLIT) -> Case:
    """Every query segment sees ``keys`` keys, and shares none."""
    spans = [(i * keys, i * keys + keys) for i in range(len(query_lengths))]
    layout = SpanLayout.from_spans(query_lengths, spans, spans[-1][1], device="meta")
    shape = f"Q={layout.num_queries} in {len(spans)} K={layout.num_keys} H=16/16 D={head_dim}"
    inputs = [_meta(rows, 16, head_dim, dtype=dtype) for rows in (layout.num_queries, *[layout.num_keys] * 2)]
    options = layout.segments, layout.tile_offsets, layout.tile_segments, 0.1
    return Case(CROSS.name, shape, NAMES[dtype], partial(attention, CROSS, inputs, *options), kernels, dtype)


def decode(branches, heads, kv_heads, head_dim, dtype, window, softcap, sinks):
    """One range and one query per branch. Heads are the outer dimension of the caches, as in transformers."""
    q = _meta(branches, 1, heads, head_dim, dtype=dtype)
    shared = _meta(kv_heads, 901, head_dim, dtype=dtype).transpose(0, 1)
    branch = _meta(branches, kv_heads, 64, head_dim, dtype=dtype).transpose(1, 2)
    sinks = _meta(heads, dtype=FP32) if sinks else None
    indices = _meta(branches, 1, 2, dtype=torch.int32), _meta(branches, dtype=torch.int64)
    results = DECODE.forward(q, shared, shared, branch, branch, sinks, *indices, window, None, 0.1, softcap, "triton")
    _assert_alike(results, [q, _meta(*q.shape[:3], dtype=FP32)])


def _decode_case(
    heads, kv_heads, head_dim, dtype=BF16, branches=5, window=None, softcap=None, sinks=False, name=""
) -> Case:
    shape = f"B={branches} of one root{name} H={heads}/{kv_heads} D={head_dim}"
    launch = partial(decode, branches, heads, kv_heads, head_dim, dtype, window, softcap, sinks)
    return Case(
        DECODE.name,
        shape,
        NAMES[dtype],
        launch,
        ("prefix_attention_decode_fwd_kernel", "attention_combine_kernel"),
        dtype,
    )


# 8192 tokens in 16 runs, and 8160 in 160: long ones, and ones that leave most of a large tile empty. Both numbers are
# multiples of 16, so that launches common to both compile once. In a tree with two branches a run sees another; in a
# tree that forks twice a run sees two others.
LONG = PackedLayout.from_prefixes([256] * 16, [256] * 16, device="meta")
SHORT = PackedLayout.from_prefixes([32] * 160, [19] * 160, device="meta")
FORK = PackedLayout.from_groups([(512, [256, 256])] * 8, device="meta")
FORKS = PackedLayout.from_segments([128, 64, 64, 128, 128], [-1, 0, 0, 2, 2], device="meta")
WINDOW = LONG.with_local(window=1024)

ATTENTION_CASES = [
    *(_prefix_case(LONG, head_dim) for head_dim in (128, 88, 64, 256, 512)),
    _prefix_case(SHORT, 128),
    _prefix_case(FORK, 128, name=" of 2 ranges"),
    _prefix_case(FORKS, 128, name=" of 3 ranges"),
    _prefix_case(LONG, 192, value_dim=128),
    _prefix_case(LONG, 128, heads=(8, 8)),
    _prefix_case(LONG, 128, FP16),
    *(_prefix_case(LONG, head_dim, FP32) for head_dim in (128, 64, 256, 512)),
    # Variants of layers with a window, its full segments included: Gemma 2 and 3, gpt-oss.
    _prefix_case(WINDOW, 128, name=" window"),
    _prefix_case(FORK.with_local(window=1024), 128, name=" of 2 ranges, window"),
    _prefix_case(WINDOW, 64, sinks=True, name=" window sinks"),
    _prefix_case(WINDOW, 256, softcap=50.0, name=" window softcap"),
    # Sizes of 1, and sizes that are not multiples of 16.
    _prefix_case(PackedLayout.causal([1], device="meta"), 1, heads=(1, 1)),
    _prefix_case(PackedLayout.causal([70, 7], device="meta"), 7, heads=(3, 1)),
    _prefix_case(PackedLayout.causal([300], device="meta"), 32, heads=(1, 1)),
    # Latents of two images, whose keys are split; long texts, each with the image before it.
    *(_cross_case([32, 32], 901, head_dim) for head_dim in (128, 88, 64, 256)),
    _cross_case([32, 32], 901, 64, FP32),
    _cross_case([2048] * 4, 901, 128, kernels=CROSS_KERNELS),
    # Beams of one image: tiles of 16 rows, and of 64 where heads share keys.
    *(_decode_case(32, 32, head_dim) for head_dim in (128, 88, 64)),
    *(_decode_case(32, 4, head_dim) for head_dim in (128, 256, 512)),
    _decode_case(32, 32, 64, FP32),
    _decode_case(32, 4, 128, window=1024, name=", window"),
    _decode_case(64, 8, 64, window=128, sinks=True, name=", window sinks"),
    _decode_case(8, 4, 256, window=4096, softcap=50.0, name=", window softcap"),
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
