"""Loss and gradients of TRL's trainers, of ours with shared prefixes, and of ours with every row alone.

One prompt of 576 image tokens and 32 of text, with 8 annotations (SFT), 8 completions (GRPO), or chosen and rejected
(DPO). A call is a micro-batch: log-probabilities of the policy and, for GRPO and DPO, of a reference, the loss, and the
backward; no generation, no optimizer, no loading. ``trl`` runs padded rows with scaled_dot_product_attention;
``repeated`` is ours with nothing shared, so that what is gained by sharing alone can be seen. ``bound`` in a shape: how
many times the tokens the repeated form has.

Checked are the loss and every gradient against TRL's trainer with the model in fp64 (its head computes in fp32).
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate

IMAGE, TEXT = 576, 32  # tokens of the prompt
NAMES = ("trl", OURS + "shared", "repeated " + OURS.strip())
_IMAGE_ID = 3


@dataclass(frozen=True)
class Work:
    """A prompt and its branches.

    Attributes:
        kind: "SFT", "GRPO" or "DPO".
        branches: their number.
        tokens: of each.
        image: tokens of the prompt's image, a square.
    """

    kind: str
    branches: int
    tokens: int
    image: int = IMAGE

    @property
    def bound(self) -> float:
        """Tokens of the repeated form for each of the shared one."""
        prompt = self.image + TEXT
        return self.branches * (prompt + self.tokens) / (prompt + self.branches * self.tokens)


def works() -> list[Work]:
    return [
        Work("SFT", 8, 32),
        *(Work("GRPO", 8, tokens) for tokens in (64, 128, 256)),
        Work("DPO", 2, 64),
    ]  # fmt: skip


QUICK = [Work("SFT", 4, 8, 64), Work("GRPO", 4, 8, 64), Work("DPO", 2, 8, 64)]


def config(device: str, image: int) -> LlavaConfig:
    """A model whose steps a CPU makes in about a second; on GPUs, LLaVA's shape with 1 B parameters."""
    if device == "cpu":
        tower = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
        text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    else:
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=14 * round(image**0.5), patch_size=14),
        text_config=LlamaConfig(**text, vocab_size=32000 if device != "cpu" else 4096, pad_token_id=0),
        image_token_id=_IMAGE_ID,
    )


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every kind of training; GRPO with longer and longer completions."""
    dtype = "fp32" if device == "cpu" else "bf16"
    for work in QUICK if quick else works():
        prompt = work.image + TEXT
        weights = 2.5e6 if device == "cpu" else 1.3e9
        flops = (6 if work.kind == "SFT" else 8) * weights * work.branches * (prompt + work.tokens)
        yield Case(
            "posttraining",
            "train",
            f"{dtype} {work.kind} n={work.branches} P={prompt} bound={work.bound:.2f} C={work.tokens}",
            partial(setup, work, device),
            NAMES,
            flops / work.bound / matmul_rate(device, torch.float32 if device == "cpu" else torch.bfloat16),
        )


def setup(work: Work, device: str) -> Setup:
    """The three ways, and their check."""
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config(device, work.image))
    made = made.to(device, torch.float32 if device == "cpu" else torch.bfloat16).train()
    batch = rows(work, made)
    steps = {}
    for name in NAMES:
        model, reference = copy.deepcopy(made), copy.deepcopy(made)
        steps[name] = step(work, model, reference, batch, shared=None if name == "trl" else name == NAMES[1])
    exact_batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    double = copy.deepcopy(made).double()
    exact = everything(*step(work, double, copy.deepcopy(double), exact_batch, shared=None))
    largest = max(each.abs().max().item() for name, each in exact.items() if name != "loss")

    def check(name: str) -> None:
        for what, value in everything(*steps[name]).items():
            beside = max(exact[what].abs().max().item(), 0.01 * largest) if what != "loss" else 1.0
            error = (value.double() - exact[what]).abs().max().item()
            allowed = (1e-3 if device == "cpu" else 0.2) * beside
            assert error <= allowed, f"{what}: error {error:.1e}, more than {allowed:.1e}"

    return Setup(
        providers={name: partial(_run, *each) for name, each in steps.items()},
        check=check,
        device=device,
        tokens=work.branches * work.tokens,
        parameters=[each for model, _ in steps.values() for each in model.parameters()],
    )


def rows(work: Work, model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Padded rows without padding, as for TRL."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, size = model.config.text_config.vocab_size, model.config.vision_config.image_size
    text = torch.randint(4, vocabulary, (TEXT,), generator=generator)
    prompt = torch.cat([torch.full((work.image,), _IMAGE_ID), text]).expand(work.branches, -1)
    said = torch.randint(4, vocabulary, (work.branches, work.tokens), generator=generator)
    ids = torch.cat([prompt, said], 1)
    pixels = torch.randn(1, 3, size, size, generator=generator).to(model.dtype).expand(work.branches, -1, -1, -1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.contiguous()}
    return {name: value.to(model.device) for name, value in found.items()}


def step(
    work: Work,
    model: LlavaForConditionalGeneration,
    reference: LlavaForConditionalGeneration,
    batch: dict[str, Tensor],
    *,
    shared: bool | None,
) -> tuple[LlavaForConditionalGeneration, Callable[[], Tensor]]:
    """The model, and what makes its loss and gradients; ``shared`` is None for TRL's own trainer."""
    trainer = _trainer(work, model, reference, is_ours=shared is not None)
    loss = {"SFT": _sft, "GRPO": _grpo, "DPO": _dpo}[work.kind]

    def run() -> Tensor:
        model.zero_grad()
        # With nothing shared, each row is a tree of its own.
        alone = mock.patch(
            "lynx_kernels.integrations.trl.branches._trees", lambda rows: [[n] for n in range(len(rows))]
        )
        with alone if shared is False else mock.patch.dict({}):
            found: Tensor = loss(work, trainer, batch, shared is not None)
            found.backward()
        trainer._metrics["train"].clear()
        return found.detach()

    return model, run


def everything(model: LlavaForConditionalGeneration, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient, by name."""
    found = {"loss": run()}
    return found | {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def _run(model: Any, run: Callable[[], Tensor], _: Any) -> Tensor:
    return run()


def _trainer(work: Work, model: Any, reference: Any, *, is_ours: bool) -> Any:
    """A trainer of TRL's, or ours, with data that are only there to make it."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lynx_kernels.integrations import trl as ours

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    options: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(), "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": model.device.type == "cpu", "per_device_train_batch_size": work.branches,
    }  # fmt: skip
    common: dict[str, Any] = {"processing_class": tokenizer}
    if work.kind == "SFT":
        data = Dataset.from_dict({"text": ["a a"] * work.branches})
        kind = ours.PackedSFTTrainer if is_ours else trl.SFTTrainer
        return kind(model, args=trl.SFTConfig(**options), train_dataset=data, **common)
    if work.kind == "DPO":
        data = Dataset.from_dict({"prompt": ["a"], "chosen": ["a"], "rejected": ["a a"]})
        kind = ours.SharedPrefixDPOTrainer if is_ours else trl.DPOTrainer
        return kind(model, ref_model=reference, args=trl.DPOConfig(**options), train_dataset=data, **common)
    data = Dataset.from_dict({"prompt": ["a"]})
    arguments = trl.GRPOConfig(**options, num_generations=work.branches, max_completion_length=work.tokens)
    kind = ours.SharedPrefixGRPOTrainer if is_ours else trl.GRPOTrainer
    return kind(model, reward_funcs=lambda **columns: [], args=arguments, train_dataset=data, **common)


def _sft(work: Work, trainer: Any, batch: dict[str, Tensor], is_ours: bool) -> Tensor:
    inputs = {**batch, "labels": _labels(work, batch)}
    return trainer.compute_loss(trainer.model, _with_branches(trainer, inputs) if is_ours else inputs)


def _dpo(work: Work, trainer: Any, batch: dict[str, Tensor], is_ours: bool) -> Tensor:
    inputs = {**batch, "completion_mask": (_labels(work, batch) != -100).long()}
    if is_ours:
        branches = _with_branches(trainer, {**batch, "labels": _labels(work, batch)})["branches"]
        inputs["branches"] = branches
    return trainer.compute_loss(trainer.model, inputs)


def _grpo(work: Work, trainer: Any, batch: dict[str, Tensor], is_ours: bool) -> Tensor:
    prompt = work.image + TEXT
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    media = {"pixel_values": pixels, "num_images": [1] * work.branches}
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, work.tokens, **media)
    trainer.beta, trainer.current_gradient_accumulation_steps = 0.04, 1
    inputs = {
        "prompt_ids": ids[:, :prompt], "prompt_mask": mask[:, :prompt], "completion_ids": ids[:, prompt:],
        "completion_mask": mask[:, prompt:], "advantages": torch.linspace(-1, 1, work.branches, device=ids.device),
        "num_items_in_batch": mask[:, prompt:].sum(), "ref_per_token_logps": reference, **media,
    }  # fmt: skip
    return trainer.compute_loss(trainer.model, inputs)


def _labels(work: Work, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].clone()
    labels[:, : work.image + TEXT] = -100
    return labels


def _with_branches(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the trainer's collator adds, from rows that are made already."""
    from lynx_kernels.integrations.trl.branches import pack_rows

    host = {name: value if name == "pixel_values" else value.cpu() for name, value in inputs.items()}
    found = [{name: value[row : row + 1] for name, value in host.items()} for row in range(len(host["input_ids"]))]
    branches = pack_rows(found, trainer.data_collator.collator)
    return {**inputs, "branches": branches.to(inputs["input_ids"].device)}
