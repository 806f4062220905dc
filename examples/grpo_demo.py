"""A small vision-language model learns to add handwritten digits by GRPO, and is tested on digits that it never saw.

    make grpo-demo

The images are two of scikit-learn's 8 x 8 scans of the digits 0 to 4; the reward is whether their sum is right. A model
shaped like SmolVLM is first trained a little on answers (``PackedSFTTrainer``), then on rewards alone
(``SharedPrefixGRPOTrainer``). Accuracy on held-out scans before and after has a 95 % interval; the rewards of all steps
are drawn into grpo_demo.svg. Some minutes on 2 cores.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)
from trl import GRPOConfig, SFTConfig

from lynx_kernels.integrations.trl import PackedSFTTrainer, SharedPrefixGRPOTrainer

SPECIAL = ["<pad>", "<end>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
LARGEST = 4  # digit; of all ten, the sum takes some minutes more
NUMBERS = [str(number) for number in range(2 * LARGEST + 1)]
WORDS = [*SPECIAL, "<user>", "<assistant>", "sum", *NUMBERS]
SIDE, PATCH, SCALE = 16, 4, 2  # pixels of an image and of a patch; patches of an image token, each way
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '> ' }}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text + ' ' }}{% endfor %}"
    "{{ '<end> ' if message.role == 'assistant' }}{% endfor %}{{ '<assistant> ' if add_generation_prompt }}"
)
GROUP = 8  # completions of a prompt


def build() -> tuple[SmolVLMForConditionalGeneration, Idefics3Processor]:
    """A model with random values, and its processor."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", extra_special_tokens=SPECIAL[2:]
    )
    tokens = (SIDE // PATCH // SCALE) ** 2
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=TEMPLATE)
    widths = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = LlamaConfig(**widths, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    tower = SmolVLMVisionConfig(**widths, image_size=SIDE, patch_size=PATCH)
    config = SmolVLMConfig(vision_config=tower, text_config=text, image_token_id=2, scale_factor=SCALE, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config), processor


def data(held_out: bool, count: int, seed: int) -> Dataset:
    """Questions about two scans each; those that are held out are a fifth of all."""
    scans, numbers = load_digits(return_X_y=True)
    chosen = np.flatnonzero(((np.arange(len(scans)) % 5 == 0) == held_out) & (numbers <= LARGEST))
    pairs = np.random.default_rng(seed).choice(chosen, (count, 2))
    pixels = (scans.reshape(-1, 8, 8)[pairs] * 15.9).astype(np.uint8)  # (count, 2, 8, 8)
    images = [Image.fromarray(np.hstack(list(pair))).convert("RGB").resize((SIDE, SIDE)) for pair in pixels]
    sums = [str(number) for number in numbers[pairs].sum(1)]
    return Dataset.from_dict({
        "prompt": [[{"role": "user", "content": "sum"}]] * count,
        "completion": [[{"role": "assistant", "content": each}] for each in sums],
        "image": images,
        "answer": sums,
    })  # fmt: skip


def right_sum(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the completion is the sum and nothing else."""
    return [float(each[0]["content"].strip() == sum_) for each, sum_ in zip(completions, answer, strict=True)]


@torch.no_grad()
def accuracy(
    model: SmolVLMForConditionalGeneration, processor: Idefics3Processor, count: int
) -> tuple[float, float, float]:
    """Of greedy answers about held-out scans, with its interval."""
    rows = data(True, count, seed=10**6)
    part = [{"type": "image"}, {"type": "text", "text": "sum"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True)
    inputs = processor(images=[[each] for each in rows["image"]], text=[prompt] * count, return_tensors="pt")
    found = model.eval().generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=True)
    said = processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return interval(sum(text.strip() == answer for text, answer in zip(said, rows["answer"], strict=True)), count)


def interval(right: int, count: int) -> tuple[float, float, float]:
    """A rate and Wilson's 95 % interval of it."""
    rate, z = right / count, 1.96
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return rate, max(centre - half, 0.0), min(centre + half, 1.0)


def draw(rewards: list[float], before: tuple[float, ...], after: tuple[float, ...], path: Path) -> None:
    """The rewards of the steps, and accuracy before and after with its intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(rewards) + 1), rewards, color="0.6", linewidth=0.8, label="mean reward of a step, sampled")
    for place, (rate, low, high), name in ((0, before, "before"), (len(rewards), after, "after")):
        axes.errorbar([place], [rate], [[rate - low], [high - rate]], fmt="o", capsize=4, label=f"held out, {name}")
    axes.set(xlabel="GRPO step", ylabel="sums that are right", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(path)


def main(
    sft_steps: int, grpo_steps: int, tested: int, path: Path, *, images: int = 20000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Train, test and draw; returns accuracies before and after with their intervals."""
    torch.manual_seed(0)
    model, processor = build()
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20,
    }  # fmt: skip
    answers = SFTConfig(
        **common, max_steps=sft_steps, per_device_train_batch_size=64, learning_rate=1e-3, max_length=None,
        logging_steps=50,
    )  # fmt: skip
    train = data(False, images, seed=0)
    PackedSFTTrainer(model, args=answers, train_dataset=train, processing_class=processor).train()
    before = accuracy(model, processor, tested)
    rewards = GRPOConfig(
        **common, max_steps=grpo_steps, per_device_train_batch_size=32 * GROUP, num_generations=GROUP,
        max_completion_length=3, learning_rate=5e-4, logging_steps=1, disable_tqdm=True, log_completions=False,
    )  # fmt: skip
    trainer = SharedPrefixGRPOTrainer(
        model, reward_funcs=right_sum, args=rewards, train_dataset=train, processing_class=processor
    )
    trainer.train()
    after = accuracy(model, processor, tested)
    draw([each["reward"] for each in trainer.state.log_history if "reward" in each], before, after, path)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=80)
    parser.add_argument("--grpo-steps", type=int, default=160)
    parser.add_argument("--tested", type=int, default=500, help="held-out images")
    parser.add_argument("--plot", type=Path, default=Path("grpo_demo.svg"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # more only wait for each other in so small a model
    found = main(options.sft_steps, options.grpo_steps, options.tested, options.plot)
    for name, (rate, low, high) in zip(("before", "after"), found, strict=True):
        print(f"sums right on held-out scans {name} GRPO: {rate:.1%} ({low:.1%} to {high:.1%})")
    print(f"drawn: {options.plot}")
