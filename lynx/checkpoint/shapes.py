"""The configuration of the release's weights, as far as their shapes show it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Blip2VisionConfig, LlamaConfig

from lynx.config import LynxConfig

VICUNA_ROWS = 32000  # rows of Vicuna's tables, without that of [PAD]
_EVA_G_WIDTH = 1408
_EVA_G_BLOCKS = 40  # blocks of the original; Lynx leaves out the last
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
)  # others follow
_OTHER_NAMES = {"rope_theta", "rope_scaling"}  # transformers takes these names, and stores them under another


def configuration(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> LynxConfig:
    """The configuration that fits these weights. What they do not show is as in the release, except for ``overrides``.

    For a weight that is in several layers the commonest shape counts, so that a wrong one is reported as the error.

    Args:
        state: tensors by the keys of the release.
        overrides: fields of ``LynxConfig``; those of its ``text_config`` and ``vision_config`` are dicts in it.

    Raises:
        ValueError: an override is unknown, or a head count does not divide a width.
    """
    sizes = _Sizes(state)
    top = dict(overrides)
    text = _fields("text_config", top.pop("text_config", {}), LlamaConfig())
    vision = _fields("vision_config", top.pop("vision_config", {}), Blip2VisionConfig())
    unknown = sorted(set(top) - set(LynxConfig.field_names()))
    if unknown:
        raise ValueError(f"config overrides {', '.join(unknown)}, but LynxConfig has no such field")
    text = {**_text(sizes, text), **text}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(text[name], int) and text[name] >= text["vocab_size"]:
            raise ValueError(f"text_config: {name} is {text[name]}, must be below vocab_size, {text['vocab_size']}")
    width = text["hidden_size"]
    inner = sizes.of(512, ("bridge.layers.*.0.to_q.weight", 0), ("bridge.layers.*.0.to_out.weight", 1))
    head_dim = top.get("resampler_head_dim")
    heads = top.get("resampler_heads") or (inner // head_dim if isinstance(head_dim, int) and head_dim > 0 else 8)
    hidden = sizes.of(4 * width, ("bridge.layers.*.1.1.weight", 0), ("bridge.layers.*.1.3.weight", 1))
    found = {
        "image_token_id": text["vocab_size"],
        "num_latents": sizes.of(32, ("bridge.latents", 0)),
        "resampler_depth": sizes.depth("bridge.layers.", 3),
        "resampler_heads": heads,
        "resampler_head_dim": _divided("bridge.layers.*.0.to_q.weight", inner, "resampler_heads", heads),
        "resampler_expansion": max(1, hidden // width),
        "max_frames": sizes.of(5, ("absolute_frame_pos_embed", 1)),
        "adapter_frequency": _adapter_frequency(state, text["num_hidden_layers"]),
        "adapter_size": sizes.of(
            width // 2,
            ("LLM.model.layers.*.output_adapter.adapter_down.weight", 0),
            ("LLM.model.layers.*.output_adapter.adapter_down.bias", 0),
            ("LLM.model.layers.*.output_adapter.adapter_up.weight", 1),
        ),
    }
    try:
        parts = LlamaConfig(**text), Blip2VisionConfig(**{**_vision(sizes), **vision})
    except StrictDataclassError as error:  # it is not a ValueError, though it is about a value
        raise ValueError(f"config contradicts itself or the weights: {error}") from error
    return LynxConfig(*parts, **{**found, **top})


def _text(sizes: "_Sizes", overrides: Mapping[str, Any]) -> dict[str, Any]:
    layer = "LLM.model.layers.*."
    width = sizes.of(4096, (layer + "input_layernorm.weight", 0), (layer + "post_attention_layernorm.weight", 0))
    queries = sizes.of(width, (layer + "self_attn.q_proj.weight", 0), (layer + "self_attn.o_proj.weight", 1))
    keys = sizes.of(queries, (layer + "self_attn.k_proj.weight", 0), (layer + "self_attn.v_proj.weight", 0))
    half_head = sizes.of(0, (layer + "self_attn.rotary_emb.inv_freq", 0))  # older files hold these frequencies
    heads = overrides.get("num_attention_heads") or (queries // (2 * half_head) if half_head else 32)
    head_dim = overrides.get("head_dim") or _divided(
        layer + "self_attn.q_proj.weight", queries, "text_config.num_attention_heads", heads
    )
    rows = max(sizes.all(("LLM.model.embed_tokens.weight", 0), ("LLM.lm_head.weight", 0)), default=VICUNA_ROWS)
    vocab_size = overrides.get("vocab_size") or rows + (rows == VICUNA_ROWS)
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": sizes.of(
            11008, (layer + "mlp.gate_proj.weight", 0), (layer + "mlp.up_proj.weight", 0),
            (layer + "mlp.down_proj.weight", 1),
        ),
        "num_hidden_layers": sizes.depth("LLM.model.layers.", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, keys // head_dim),
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": vocab_size - 1,  # [PAD] is the last
        "tie_word_embeddings": False,
    }  # fmt: skip


def _vision(sizes: "_Sizes") -> dict[str, Any]:
    block = "vision_encoder.blocks.*."
    width = sizes.of(_EVA_G_WIDTH, (block + "norm1.weight", 0), (block + "norm2.weight", 0))
    depth = sizes.depth("vision_encoder.blocks.", 39)
    patch_size = sizes.of(14, ("vision_encoder.patch_embed.proj.weight", 3))
    positions = sizes.of(901, ("vision_encoder.pos_embed", 1))
    return {
        "hidden_size": width,
        "intermediate_size": sizes.of(
            6144, (block + "mlp.fc1.weight", 0), (block + "mlp.fc1.bias", 0), (block + "mlp.fc2.weight", 1)
        ),
        "num_hidden_layers": depth - (width == _EVA_G_WIDTH and depth == _EVA_G_BLOCKS),
        "num_attention_heads": 16,
        "patch_size": patch_size,
        "image_size": max(1, math.isqrt(max(0, positions - 1))) * patch_size,
        "layer_norm_eps": 1e-6,
    }


def _adapter_frequency(state: Mapping[str, Tensor], num_layers: int) -> int:
    pattern = re.compile(r"LLM\.model\.layers\.(\d+)\.output_adapter\.")
    places = {int(match[1]) for key in state if (match := pattern.match(key))}
    # One adapter in the first layer fits any frequency up to the number of layers.
    return math.gcd(*places) or num_layers if places else 1


def _divided(key: str, size: int, name: str, heads: int) -> int:
    if not isinstance(heads, int) or heads < 1 or size % heads:
        raise ValueError(
            f"{name} is {heads}, which does not divide the {size} rows of {key}; pass the right number in config"
        )
    return size // heads


def _fields(name: str, overrides: Any, defaults: Any) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        raise ValueError(f"config's {name} is a {type(overrides).__name__}, expected a dict of fields to override")
    unknown = sorted(field for field in overrides if not hasattr(defaults, field) and field not in _OTHER_NAMES)
    if unknown:
        raise ValueError(
            f"config's {name} overrides {', '.join(unknown)}, but {type(defaults).__name__} has no such field"
        )
    for field in _SIZES:
        value = overrides.get(field, 1)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"config's {name}: {field} is {value!r}, must be an integer of at least 1")
    return dict(overrides)


class _Sizes:
    """Sizes of weights by key, with ``*`` for the number of the layer."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.keys = list(state)
        self.shapes = defaultdict(list)
        for key, tensor in state.items():
            self.shapes[re.sub(r"\.\d+\.", ".*.", key, count=1)].append(tuple(tensor.shape))

    def all(self, *places: tuple[str, int]) -> list[int]:
        """All sizes at the places (key, axis)."""
        return [shape[axis] for key, axis in places for shape in self.shapes[key] if len(shape) > axis]

    def of(self, default: int, *places: tuple[str, int]) -> int:
        """The commonest size at the places (key, axis)."""
        return next((size for size, _ in Counter(self.all(*places)).most_common(1)), default)

    def depth(self, prefix: str, default: int) -> int:
        """How many layers there are under a prefix. A number far above the others is a wrong key, not a layer."""
        matches = (re.match(re.escape(prefix) + r"(\d{1,6})\.", key) for key in self.keys)
        numbers = {int(match[1]) for match in matches if match}
        while numbers and max(numbers) >= 2 * len(numbers):
            numbers.remove(max(numbers))
        return max(numbers, default=default - 1) + 1
