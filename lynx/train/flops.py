"""Floating-point operations of a training step, and what the device could do: for the model FLOPs utilisation.

The products that the model asks for are counted, forward and backward, once. A product with a frozen weight has no
weight gradient, one whose input needs no gradient has no input gradient, and what checkpointing computes again does not
count. Elementwise work is left out.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynx.data.conversation import IGNORED
from lynx.fusion.base import Fusion
from lynx.media import tower
from lynx.model import LynxForConditionalGeneration
from lynx.train.param_groups import group_of

# Dense bf16 of the tensor cores, operations a second, from the vendors' data sheets.
_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


class StepFlops:
    """Counts the operations of a batch.

    Args:
        model: a ``LynxForConditionalGeneration``, its parameters frozen or not as they will be.
    """

    def __init__(self, model: LynxForConditionalGeneration):
        self.config = model.config
        self.tokens_per_frame = tower.tokens_per_frame(model.config.vision_config)
        head = model.get_output_embeddings().weight
        trained = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        media_flows = bool(trained & {"vision_tower", "frame_positions"})
        self.flows = {  # whether a gradient goes through
            "vision_tower": "vision_tower" in trained,
            "resampler": media_flows or "resampler" in trained,
            "decoder": bool(trained),
        }
        self.per_row = dict.fromkeys(("frames", "media", "latents", "tokens", "supervised"), 0)  # operations a row
        for name, parameter in model.named_parameters():
            rows = "supervised" if parameter is head else _rows(name, parameter, model.fusion)
            if rows is None:
                continue
            flows = {
                "frames": self.flows["vision_tower"],
                "media": media_flows,
                "latents": self.flows["resampler"],
            }.get(rows, self.flows["decoder"])
            self.per_row[rows] += 2 * parameter.numel() * (1 + flows + parameter.requires_grad)

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """The operations of one batch that is still in host memory, packed or padded."""
        config = self.config
        text, tower = config.text_config, config.vision_config
        frames = batch["frame_positions"].shape[0] if "frame_positions" in batch else 0
        items = batch["media_layout"].num_queries // config.num_latents if frames else 0
        rows = {
            "frames": frames * self.tokens_per_frame,
            "media": frames * self.tokens_per_frame,
            "latents": items * config.num_latents,
            "tokens": batch["input_ids"].numel(),
            "supervised": int((batch["labels"] != IGNORED).sum()),
        }
        total = sum(self.per_row[name] * count for name, count in rows.items())
        # Attention: two products of every visible pair and channel forward, four backward.
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = text.num_attention_heads * head_dim
        total += self._attention(_pairs(batch), width, text.num_hidden_layers, "decoder")
        pairs = frames * self.tokens_per_frame**2
        total += self._attention(pairs, tower.hidden_size, tower.num_hidden_layers, "vision_tower")
        pairs = config.num_latents * rows["media"]
        width = config.resampler_heads * config.resampler_head_dim
        return total + self._attention(pairs, width, config.resampler_depth, "resampler")

    def _attention(self, pairs: int, width: int, layers: int, what: str) -> int:
        return 4 * pairs * width * layers * (3 if self.flows[what] else 1)


def _rows(name: str, parameter: nn.Parameter, fusion: Fusion) -> str | None:
    """What runs through the weight of this name; None where it is not the weight of a product."""
    if parameter.dim() < 2 or name.endswith(("latents", "frame_position", "_embedding", "embed_tokens.weight")):
        return None
    group = group_of(name)
    if group == "vision_tower":
        return "frames"
    if group == "resampler":
        return "media" if ".to_kv." in name else "latents"
    return fusion.flops_rows(name) if fusion.submodule in name.split(".") else "tokens"


def _pairs(batch: Mapping[str, Any]) -> int:
    """How many keys all queries of the decoder see together."""
    if "layout" in batch:
        first, last = batch["layout"].key_intervals()
        return int((last - first).sum())
    lengths = batch["attention_mask"].sum(1)
    return int((lengths * (lengths + 1) // 2).sum())


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second that the device can do, and where the number comes from.

    For the GPUs that we know, in bf16, it is from the data sheet. Else it is the speed of a large product, measured
    now.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, value in _PEAKS.items():
            if all(word in name for word in known.split()):
                return value, f"data sheet of {name}"
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(_seconds(a, b) for _ in range(4))
    return 2 * size**3 / best, f"measured, a {dtype} product of {size} x {size} matrices".replace("torch.", "")


def _seconds(a: Tensor, b: Tensor) -> float:
    synchronize = torch.cuda.synchronize if a.is_cuda else lambda: None
    synchronize()
    began = time.perf_counter()
    a @ b
    synchronize()
    return time.perf_counter() - began
