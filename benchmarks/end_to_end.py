"""A training step of the whole model, stage 1 of Lynx, on the same samples in three ways.

``reference style`` is how the release runs its model: one padded batch, eager attention with a dense mask in decoder
and vision tower, vision tokens put in by masked_scatter, logits of all rows. ``transformers`` is what one writes well
without our kernels: the samples in groups of near length, padded, scaled_dot_product_attention, logits of the
supervised rows alone. ``lynx packed`` is ours. All have the same weights, the resampler and the adapters train, the
loss is that of all supervised tokens; forward and backward are timed, no optimizer, no loading of images. Rates count
supervised tokens.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Blip2VisionConfig, LlamaConfig

from benchmarks.attention_workloads import FOLDER
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate
from lynx import LynxConfig, LynxForConditionalGeneration
from lynx.media.resampler import media_layout
from lynx.presets import lynx_7b
from lynx.train import param_groups
from lynx_kernels import PackedLayout, SpanLayout, plan_packs
from lynx_kernels.nn import Adapter, PerceiverAttention

IGNORED = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINABLE = ("resampler", "adapters", "frame_positions")
GROUP = 8  # samples of near length that a well-written loop pads together
PACK = 2048  # tokens of a pack
NAMES = ("reference style", "transformers", OURS + "packed")


@dataclass(frozen=True)
class Sample:
    """A sample without its pixels: images, and its text with what is to be learned."""

    images: int
    token_ids: Tensor
    labels: Tensor


def small() -> LynxConfig:
    """A model whose steps a CPU makes in about a second."""
    text = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8
    )
    tower = Blip2VisionConfig(
        image_size=112, hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6,
        initializer_range=0.02,
    )  # fmt: skip
    return LynxConfig(text, tower, image_token_id=32000, adapter_size=256)


def samples(number: int, vocabulary: int) -> list[Sample]:
    """The first so many of the fixed lengths, with random tokens; lengths are repeated where there are too few."""
    rows = json.loads((FOLDER / "end_to_end" / "samples.json").read_text())["samples"]
    generator = torch.Generator().manual_seed(0)
    made = []
    for images, question, answer in (rows[index % len(rows)] for index in range(number)):
        token_ids = torch.randint(3, vocabulary, (question + answer,), generator=generator)
        labels = token_ids.clone()
        labels[:question] = IGNORED
        made.append(Sample(images, token_ids, labels))
    return made


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """A small model on a CPU, the 7B shape on a GPU; few samples first."""
    shapes = {"cpu": ("small", (8, 16)), "cuda": ("lynx-7b", (32, 64))}
    name, numbers = shapes[device]
    for dtype in DTYPES if device == "cpu" else ("bf16",):
        for number in numbers[:1] if quick else numbers:
            # Ours, by its products with weights: the others may take a few times as long.
            weights = 20e6 if name == "small" else 8e9
            seconds = 4 * weights * 90 * number / matmul_rate(device, DTYPES[dtype])
            yield Case(
                "end_to_end",
                "train",
                f"{dtype} {name} B={number}",
                partial(setup, name, number, DTYPES[dtype], device),
                NAMES,
                seconds,
            )


def setup(name: str, number: int, dtype: torch.dtype, device: str) -> Setup:
    """The three ways to make a step, and a check of each against the second in higher precision."""
    torch.manual_seed(0)
    config = small() if name == "small" else lynx_7b()
    with torch.device(device):
        model = LynxForConditionalGeneration(config)
    param_groups.set_trainable(model, TRAINABLE, dtype)
    if name != "small":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = samples(number, config.text_config.vocab_size)
    pixels = [torch.randn(sample.images * _patches(config), 3 * 14 * 14) for sample in chosen]
    steps = {
        NAMES[0]: Step(plain(model, "eager"), chosen, pixels, [list(range(number))], dtype, all_logits=True),
        NAMES[1]: Step(plain(model, "sdpa"), chosen, pixels, near_lengths(chosen), dtype),
        NAMES[2]: Step(model, chosen, pixels, packs(chosen, config), dtype, packed=True),
    }
    exact_dtype = torch.float64 if device == "cpu" else torch.float32
    exact_model = plain(copy.deepcopy(model).to(exact_dtype), "sdpa")
    exact = Step(exact_model, chosen, pixels, near_lengths(chosen), exact_dtype).everything()

    # Of its kind in any layer: the gradient of one adapter's scale is a single sum, which may happen to cancel.
    largest: dict[str, float] = {}
    for what, value in exact.items():
        largest[_kind(what)] = max(largest.get(_kind(what), 1e-6), value.abs().max().item())

    def check(provider: str) -> None:
        tolerance = 2 * torch.finfo(dtype).eps ** 0.5  # a whole model multiplies what one operation rounds
        for what, value in steps[provider].everything().items():
            error, beside = (value.to(exact_dtype) - exact[what]).abs().max().item(), largest[_kind(what)]
            assert error <= tolerance * beside, f"{what}: error {error:.1e} beside {beside:.1e}"

    return Setup(
        providers={provider: partial(_call, step) for provider, step in steps.items()},
        check=check,
        tokens=sum(int((sample.labels != IGNORED).sum()) for sample in chosen),
        device=device,
        parameters=list(model.parameters()),
    )


def _kind(what: str) -> str:
    return re.sub(r"\.\d+\.", ".", what)


def _call(step: "Step", _: Any) -> Tensor:
    return step()


def _patches(config: LynxConfig) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def near_lengths(chosen: Sequence[Sample]) -> list[list[int]]:
    """Groups of samples of near length."""
    order = sorted(range(len(chosen)), key=lambda index: _length(chosen[index], 32))
    return [order[begin : begin + GROUP] for begin in range(0, len(order), GROUP)]


def packs(chosen: Sequence[Sample], config: LynxConfig) -> list[list[int]]:
    """What the planner makes of them."""
    lengths = [_length(sample, config.num_latents) for sample in chosen]
    return [list(pack) for [pack] in plan_packs(lengths, [0] * len(lengths), token_budget=PACK)]


def _length(sample: Sample, num_latents: int) -> int:
    return sample.images * num_latents + len(sample.token_ids)


class Step:
    """Forward and backward over all samples, in batches.

    Args:
        model: ours, or what ``plain`` made of it.
        chosen, pixels: the samples and the patches of their images.
        batches: the numbers of the samples in each batch.
        dtype: of autocast, where it is bf16.
        packed: whether a batch is one packed row, or padded.
        all_logits: whether logits of all rows are computed in padded batches.
    """

    def __init__(
        self,
        model: LynxForConditionalGeneration,
        chosen: Sequence[Sample],
        pixels: Sequence[Tensor],
        batches: Sequence[Sequence[int]],
        dtype: torch.dtype,
        *,
        packed: bool = False,
        all_logits: bool = False,
    ):
        self.model, self.all_logits, self.packed = model, all_logits, packed
        device = next(model.parameters()).device
        self.context = partial(torch.autocast, device.type, dtype) if dtype == torch.bfloat16 else nullcontext
        self.number = sum(int((sample.labels != IGNORED).sum()) for sample in chosen)
        make = self._packed if packed else self._padded
        self.batches = []
        for batch in batches:
            made = make([chosen[index] for index in batch])
            patches = torch.cat([pixels[index] for index in batch]).to(dtype)
            if len(patches):
                images = sum(chosen[index].images for index in batch)
                tokens = _patches(model.config) + 1
                made["pixel_values"] = patches
                made["media_layout"] = media_layout([1] * images, tokens, model.config.num_latents)
            self.batches.append({key: value.to(device) for key, value in made.items()})

    def _row(self, sample: Sample) -> tuple[Tensor, Tensor]:
        prefix = torch.full((sample.images * self.model.config.num_latents,), self.model.config.image_token_id)
        return torch.cat([prefix, sample.token_ids]), torch.cat([torch.full_like(prefix, IGNORED), sample.labels])

    def _packed(self, batch: Sequence[Sample]) -> dict[str, Any]:
        ids, labels = (torch.cat(each)[None] for each in zip(*map(self._row, batch), strict=True))
        prefixes = [sample.images * self.model.config.num_latents for sample in batch]
        layout = PackedLayout.from_prefixes(prefixes, [len(sample.token_ids) for sample in batch])
        return {"input_ids": ids, "labels": labels, "layout": layout}

    def _padded(self, batch: Sequence[Sample]) -> dict[str, Any]:
        rows = [self._row(sample) for sample in batch]
        length = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.stack([F.pad(ids, (length - len(ids), 0)) for ids, _ in rows]),
            "attention_mask": torch.stack([F.pad(torch.ones_like(ids), (length - len(ids), 0)) for ids, _ in rows]),
            "labels": torch.stack([F.pad(labels, (length - len(labels), 0), value=IGNORED) for _, labels in rows]),
        }

    def __call__(self) -> Tensor:
        """The loss; the gradients are in the model."""
        self.model.zero_grad()
        total = torch.zeros((), device=self.batches[0]["labels"].device)
        for batch in self.batches:
            with self.context():
                if self.packed:
                    loss = self.model(**batch, num_items_in_batch=self.number).loss
                else:
                    loss = self._padded_loss(**batch)
            loss.backward()
            total = total + loss.detach()
        return total

    def everything(self) -> dict[str, Tensor]:
        """The loss and every gradient, by name."""
        loss = self()
        gradients = {name: each.grad.clone() for name, each in self.model.named_parameters() if each.grad is not None}
        return {"loss": loss, **gradients}

    def _padded_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        media_layout: SpanLayout | None = None,
    ) -> Tensor:
        model = self.model
        is_image = input_ids == model.config.image_token_id
        embeddings = model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None:
            vision = model.encode_media(pixel_values, layout=media_layout).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image[..., None], vision)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        decoder = model.get_decoder()
        hidden = decoder(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if not self.all_logits:
            supervised = targets != IGNORED
            hidden, targets = hidden[supervised], targets[supervised]
        logits = model.get_output_embeddings()(hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss / self.number


def plain(model: LynxForConditionalGeneration, attention: str) -> LynxForConditionalGeneration:
    """The same model, its parameters too, out of PyTorch's and transformers' own operations alone."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    other = copy.deepcopy(model, memo)  # modules are new, parameters the same
    for part in (other.get_decoder(), other.vision_tower):
        part.config._attn_implementation = attention
    for module in other.modules():
        if isinstance(module, Adapter):
            module.forward = MethodType(_adapter, module)  # type: ignore[method-assign]
        elif isinstance(module, PerceiverAttention):
            module.forward = partial(_read, attention == "eager", module)  # type: ignore[method-assign]
    return other


def _adapter(self: Adapter, x: Tensor) -> Tensor:
    return x + self.scale * self.up(F.silu(self.down(self.norm(x))))  # type: ignore[misc]


def _read(eager: bool, self: PerceiverAttention, latents: Tensor, media: Tensor, layout: SpanLayout, _: None) -> Tensor:
    items = layout.segments.shape[0] - 1
    q = self.to_q(self.norm_latents(latents)).view(items, -1, *_heads(self)).transpose(1, 2)
    k, v = self.to_kv(self.norm_media(media)).view(items, -1, 2, *_heads(self)).permute(2, 0, 3, 1, 4)
    if eager:
        out = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return self.to_out(out.transpose(1, 2).flatten(0, 1).flatten(1))


def _heads(module: PerceiverAttention) -> tuple[int, int]:
    return module.to_q.out_features // module.head_dim, module.head_dim
