"""Other people's models before and after ``apply``: forward and backward of a batch of images with questions.

Small models of transformers' families with random weights. ``transformers`` is the model as it comes, a padded batch,
its fastest attention; ``lynx padded`` the same batch after ``apply``; ``lynx packed`` the same samples as one row, by
``PackedCollator``. A gradient is checked against the model in higher precision. The vision tower trains too. Rates
count all tokens that are not padding.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from benchmarks import end_to_end
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate

VOCABULARY, IMAGE, START, END = 32000, 31990, 31991, 31992
SIDE, PATCH = 168, 14
DTYPES = {"cpu": {"fp32": torch.float32}, "cuda": {"bf16": torch.bfloat16}}
NAMES = ("transformers", OURS + "padded", OURS + "packed")
_PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
_PADDING = {"labels": -100}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 192, "intermediate_size": 768, "out_hidden_size": 384, "num_heads": 3,
    "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": IMAGE + 5, "vision_start_token_id": START, "vision_end_token_id": END
}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """How a family's model is made, and what an image is to it.

    Attributes:
        config: of the model.
        tokens: of an image.
        media: the inputs of an image, by name.
        extra: what else it needs of a sample's token ids (1, L), per token.
        lead, tail: the tokens around an image's.
        samples: of a batch.
    """

    config: Callable[[], hf.PreTrainedConfig]
    tokens: int
    media: Callable[[], dict[str, Tensor]]
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    lead: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    samples: int = 8


def _pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, SIDE, SIDE)}


def _qwen_media() -> dict[str, Tensor]:
    side = SIDE // PATCH
    return {
        "pixel_values": torch.randn(side * side, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def _qwen_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def _qwen25() -> hf.PreTrainedConfig:
    vision = {**_QWEN_VISION, "window_size": 112, "fullatt_block_indexes": [3]}
    return hf.Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config=vision, **_QWEN_TOKENS)


def _qwen3() -> hf.PreTrainedConfig:
    vision = {**_QWEN_VISION, "num_position_embeddings": 144, "deepstack_visual_indexes": [1, 2]}
    text = {**_TEXT, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)


def _gemma3() -> hf.PreTrainedConfig:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    text = hf.Gemma3TextConfig(**_TEXT, sliding_window=1024, layer_types=kinds, query_pre_attn_scalar=64)
    vision = hf.SiglipVisionConfig(**_VISION, vision_use_head=False)
    tokens = {"boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": _SIDE_TOKENS**2 // 4}
    return hf.Gemma3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, **tokens)


def _smolvlm() -> hf.PreTrainedConfig:
    vision, text = hf.SmolVLMVisionConfig(**_VISION), hf.LlamaConfig(**_TEXT)
    return hf.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)


def _llava_onevision() -> hf.PreTrainedConfig:
    vision = hf.SiglipVisionConfig(**_VISION, vision_use_head=False)
    return hf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 5,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )


def _mllama() -> hf.PreTrainedConfig:
    vision = hf.MllamaVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_global_layers=1, attention_heads=3,
        vision_output_dim=384, image_size=SIDE, patch_size=PATCH, max_num_tiles=1, intermediate_layers_indices=[1],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    return hf.MllamaConfig(
        vision_config=vision,
        text_config=hf.MllamaTextConfig(**text, cross_attention_layers=[1, 4], **rope),
        image_token_index=IMAGE,
    )


def _mllama_media() -> dict[str, Tensor]:
    ones = torch.ones(1, 1, dtype=torch.int64)
    return {**_pixels(1, 1, 1, 3), "aspect_ratio_ids": ones, "aspect_ratio_mask": ones[..., None]}


def _mllama_sees(ids: Tensor) -> dict[str, Tensor]:
    seen = ((ids == IMAGE).cumsum(1) > 0).long()
    return {"cross_attention_mask": seen[..., None, None]}


_SIDE_TOKENS = SIDE // PATCH  # of an image in a tower, in one direction
FAMILIES = {
    "Qwen3-VL": Family(_qwen3, _SIDE_TOKENS**2 // 4, _qwen_media, _qwen_types, (START,), (END,)),
    "Gemma-3": Family(
        _gemma3,
        _SIDE_TOKENS**2 // 4,
        partial(_pixels, 1, 3),
        lambda ids: {"token_type_ids": (ids == IMAGE).long()},
        (START,),
        (END,),
    ),
    "Qwen2.5-VL": Family(_qwen25, _SIDE_TOKENS**2 // 4, _qwen_media, _qwen_types, (START,), (END,)),
    "SmolVLM": Family(_smolvlm, _SIDE_TOKENS**2 // 4, partial(_pixels, 1, 1, 3)),
    "LLaVA-OneVision": Family(
        _llava_onevision,
        _SIDE_TOKENS**2 + _SIDE_TOKENS * (_SIDE_TOKENS + 1),  # the image, and its one tile with the ends of its rows
        lambda: {**_pixels(1, 2, 3), "image_sizes": torch.tensor([[SIDE, SIDE]])},
        samples=4,
    ),
    "Mllama": Family(_mllama, 1, _mllama_media, _mllama_sees),
}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Each family once."""
    for dtype, torch_dtype in DTYPES[device].items():
        for name in list(FAMILIES)[:2] if quick else FAMILIES:
            family = FAMILIES[name]
            flops = 6 * family.samples * (21e6 * (family.tokens + 60) + 2e6 * _SIDE_TOKENS**2)
            yield Case(
                "dropin",
                "train",
                f"{dtype} {name} B={family.samples}",
                partial(setup, name, family.samples, torch_dtype, device),
                NAMES,
                flops / matmul_rate(device, torch_dtype),
            )


def samples(family: Family, number: int) -> list[dict[str, Tensor]]:
    """What a processor would return for so many conversations with an image, of the lengths of ``end_to_end``."""
    torch.manual_seed(0)
    made = []
    for sample in [each for each in end_to_end.samples(64, START) if each.images == 1][:number]:
        image = torch.tensor([*family.lead, *[IMAGE] * family.tokens, *family.tail])
        ids = torch.cat([image, sample.token_ids])[None]
        labels = torch.cat([torch.full_like(image, -100), sample.labels])[None]
        text = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), **family.extra(ids)}
        made.append({**text, **family.media()})
    return made


def padded(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The samples as a batch, padded on the right."""
    length = max(each["input_ids"].shape[1] for each in chosen)
    batch = {}
    for name in chosen[0]:
        parts = [each[name] for each in chosen]
        if name in _PER_TOKEN:
            behind = [0] * 2 * (parts[0].dim() - 2)
            parts = [F.pad(each, [*behind, 0, length - each.shape[1]], value=_PADDING.get(name, 0)) for each in parts]
        batch[name] = torch.cat(parts)
    return batch


def setup(name: str, number: int, dtype: torch.dtype, device: str) -> Setup:
    """The model as it comes and after ``apply``, and a check of each against higher precision."""
    from lynx_kernels.integrations.apply import apply
    from lynx_kernels.integrations.collator import PackedCollator

    family = FAMILIES[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForImageTextToText.from_config(family.config(), attn_implementation="sdpa")
    model = model.to(dtype).train()
    changed = copy.deepcopy(model)
    chosen = samples(family, number)
    batch = padded(chosen)
    steps = {NAMES[0]: _step(model, batch, dtype, device)}
    apply(changed)
    steps[NAMES[1]] = _step(changed, batch, dtype, device)
    left_out = {}
    try:
        steps[NAMES[2]] = _step(changed, PackedCollator(changed)(chosen), dtype, device)
    except ValueError as error:
        left_out[NAMES[2]] = str(error)

    exact_dtype = torch.float64 if device == "cpu" else torch.float32
    exact_model = copy.deepcopy(model).to(exact_dtype)
    exact = _everything(exact_model, _step(exact_model, batch, exact_dtype, device))
    largest: dict[str, float] = {}  # of its kind in any layer
    for what, value in exact.items():
        largest[_kind(what)] = max(largest.get(_kind(what), 1e-6), value.abs().max().item())

    def check(provider: str) -> None:
        tolerance = 2 * torch.finfo(dtype).eps ** 0.5  # a whole model multiplies what one operation rounds
        found = _everything(model if provider == NAMES[0] else changed, steps[provider])
        for what, value in found.items():
            error, beside = (value.to(exact_dtype) - exact[what]).abs().max().item(), largest[_kind(what)]
            assert error <= tolerance * beside, f"{what}: error {error:.1e} beside {beside:.1e}"

    return Setup(
        providers=steps,
        check=check,
        tokens=sum(each["input_ids"].shape[1] for each in chosen),
        device=device,
        parameters=[*model.parameters(), *changed.parameters()],
        left_out=left_out,
    )


def _step(model: torch.nn.Module, batch: Mapping[str, Any], dtype: torch.dtype, device: str) -> Callable[[Any], Tensor]:
    """A call that returns the loss, forward and backward."""
    inputs = {name: each.to(device) for name, each in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    def call(_: Any) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return call


def _everything(model: torch.nn.Module, step: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    loss = step(None)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss, **found}


def _kind(what: str) -> str:
    return re.sub(r"\.\d+\.", ".", what)
