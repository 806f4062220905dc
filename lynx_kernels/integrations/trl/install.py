"""What the trainers have in common: the kernels and the head in policy and reference, and what they refuse."""

from typing import Any

from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, Trainer

from lynx_kernels.integrations.apply import apply, is_patched
from lynx_kernels.integrations.collator import PackedCollator
from lynx_kernels.integrations.trl.head import add_head


def install(trainer: Trainer, *, outputs: tuple[str, ...], temperature: float = 1.0) -> PackedCollator:
    """Give the models of one of TRL's trainers the kernels and a head for branches; return the collator of the policy.

    Raises:
        ValueError: names what cannot be right with shared prefixes, and what to do.
    """
    name = type(trainer).__name__
    _refuse(name, trainer)
    reference = getattr(trainer, "ref_model", None)
    for model, fields in ((trainer.model, outputs), (reference, ())):
        if model is None:
            continue
        base = base_model(trainer.accelerator.unwrap_model(model))
        if not is_patched(base):
            apply(base, loss=False)
        add_head(base, outputs=fields, temperature=temperature, autocast=trainer.accelerator.autocast)
    base = base_model(trainer.accelerator.unwrap_model(trainer.model))
    placeholder = None
    if trainer.accelerator.num_processes > 1 and isinstance(trainer.processing_class, ProcessorMixin):
        placeholder = conversation_with_image(trainer.processing_class)
    return PackedCollator(base, placeholder=placeholder)


def base_model(model: Any) -> PreTrainedModel:
    """The model inside peft's."""
    found: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def conversation_with_image(processor: ProcessorMixin) -> dict[str, Any]:
    """A processor's outputs for a message with a small white image."""
    image = Image.new("RGB", (64, 64), "white")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "."}]}]
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))


def _refuse(name: str, trainer: Any) -> None:
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            f"{name}: the router's auxiliary loss counts tokens, and shared tokens are there once; set "
            f"router_aux_loss_coef=0"
        )
    if isinstance(trainer.model, PeftModel):
        for adapter in trainer.model.peft_config.values():
            if adapter.is_prompt_learning:
                raise ValueError(f"{name}: {type(adapter).__name__} puts tokens of its own before rows; take LoRA")
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        raise ValueError(f"{name}: token_log_probs sums logits in fp32 already; leave out cast_lm_head_to_fp32")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for kind in ("cp", "sp", "tp"):
        if getattr(parallelism, f"{kind}_enabled", False):
            raise ValueError(f"{name}: a packed row cannot be cut between ranks; leave out {kind}_size")
