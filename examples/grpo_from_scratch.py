"""GRPO in plain PyTorch: a small vision-language model learns to count, from rewards alone.

    python examples/grpo_from_scratch.py

The completions of a prompt are branches of it: image and question run through the model once for all of them, forward
and backward, and the prompt's last row predicts the first token of each. Group-relative advantages (DeepSeekMath, arXiv
2402.03300), clipped ratios, all tokens weighted alike.
"""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lynx_kernels import token_log_probs
from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator, PackedSamples

PAD, END, IMAGE, QUESTION, ZERO = 0, 1, 2, 3, 4  # tokens; ZERO + n is the number n
MOST, PATCHES, PATCH = 4, 9, 4  # squares to count, places for them, and their pixels
PROMPTS, GROUP, LENGTH, STEPS, CLIP = 16, 8, 2, 60, 0.2


def build() -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=3 * PATCH, patch_size=PATCH),
        text_config=LlamaConfig(**sizes, vocab_size=ZERO + MOST + 1, pad_token_id=PAD, eos_token_id=END),
        image_token_id=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def draw(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 12, 12): images with so many bright squares."""
    places = torch.rand(len(numbers), PATCHES, generator=generator).argsort(1)
    bright = (places < numbers[:, None]).float().view(-1, 1, 3, 3)
    return 2 * bright.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(-1, 3, -1, -1) - 1


PROMPT = torch.tensor([IMAGE] * PATCHES + [QUESTION])


@torch.no_grad()
def sample(model: LlavaForConditionalGeneration, pixels: Tensor, group: int, **options: bool) -> list[list[list[int]]]:
    """For each image, ``group`` completions, cut behind their end."""
    ids = PROMPT.expand(len(pixels), -1)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=LENGTH,
        num_return_sequences=group, suppress_tokens=[IMAGE], **options,
    )[:, len(PROMPT) :].tolist()  # fmt: skip
    cut = [each[: each.index(END) + 1] if END in each else each for each in found]
    return [cut[start : start + group] for start in range(0, len(cut), group)]


def reward(completion: list[int], number: int) -> float:
    """Half for the number, half for stopping behind it."""
    return 0.5 * (completion[0] == ZERO + number) + 0.5 * (completion[1:] == [END])


def log_probs(model: LlavaForConditionalGeneration, packed: PackedSamples, rows: Tensor, tokens: Tensor) -> Tensor:
    """(N,) of tokens, predicted by rows of the packed row."""
    hidden = model.model(**packed.batch, use_cache=False).last_hidden_state[0]
    return token_log_probs(hidden, model.lm_head.weight, tokens, predictors=rows)


def step(
    model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, numbers: Tensor, generator: torch.Generator
) -> float:
    """Sample, reward, and two updates; returns the mean reward."""
    pixels = draw(numbers, generator)
    groups = sample(model, pixels, GROUP, do_sample=True)
    pairs = zip(groups, numbers.tolist(), strict=True)
    rewards = torch.tensor([[reward(each, number) for each in group] for group, number in pairs])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    packed = PackedCollator(model).pack([
        [{"input_ids": torch.cat([PROMPT, torch.tensor(each)]), "pixel_values": image[None]} for each in group]
        for image, group in zip(pixels, groups, strict=True)
    ])  # fmt: skip
    places = [place for tree in packed.places for place in tree]  # of each completion's tokens, its prompt's first
    rows = torch.cat([place[len(PROMPT) - 1 : -1] for place in places])
    tokens = torch.cat([torch.tensor(each) for group in groups for each in group])
    advantage = advantages.flatten().repeat_interleave(torch.tensor([len(place) - len(PROMPT) for place in places]))
    with torch.no_grad():
        old = log_probs(model, packed, rows, tokens)
    for _ in range(2):
        ratio = (log_probs(model, packed, rows, tokens) - old).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return rewards.mean().item()


def accuracy(model: LlavaForConditionalGeneration, count: int = 256) -> float:
    """How many images, none of them seen in training by their seed, are counted right."""
    generator = torch.Generator().manual_seed(10**6)
    numbers = torch.randint(1, MOST + 1, (count,), generator=generator)
    answers = torch.tensor([each[0][0] - ZERO for each in sample(model, draw(numbers, generator), 1, do_sample=False)])
    return (answers == numbers).float().mean().item()


def main(steps: int = STEPS) -> tuple[float, float]:
    """Accuracy before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build()
    apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = accuracy(model)
    for number in range(steps):
        mean = step(model, optimizer, torch.randint(1, MOST + 1, (PROMPTS,), generator=generator), generator)
        print(f"step {number + 1}: mean reward {mean:.2f}")
    return before, accuracy(model)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other in so small a model
    print("counted right: {:.0%} before, {:.0%} after".format(*main()))
