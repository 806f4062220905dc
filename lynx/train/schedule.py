"""The learning rate over the steps of a stage."""

import math
from dataclasses import dataclass

import torch

from lynx.train.recipe import Stage


@dataclass(frozen=True)
class WarmupThenDecay:
    """The learning rate of a step, divided by its peak: up from a start value in a straight line, then down to 0.

    Attributes:
        steps: of the stage.
        warmup_steps: those in which the rate rises.
        start: the rate of the first step, divided by the peak.
        is_cosine: whether the rate falls along half a cosine, or in a straight line.
    """

    steps: int
    warmup_steps: int
    start: float
    is_cosine: bool

    @classmethod
    def of(cls, stage: Stage) -> "WarmupThenDecay":
        """The schedule of a stage; any warm-up takes at least a step."""
        warmup_steps = math.ceil(stage.warmup * stage.steps)
        return cls(stage.steps, warmup_steps, stage.warmup_from / stage.learning_rate, stage.schedule == "cosine")

    def __call__(self, step: int) -> float:
        """The value at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return self.start + (1 - self.start) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        progress = min(progress, 1.0)
        return (1 + math.cos(math.pi * progress)) / 2 if self.is_cosine else 1 - progress


def scheduler(optimizer: torch.optim.Optimizer, stage: Stage) -> torch.optim.lr_scheduler.LambdaLR:
    """A stage's schedule as PyTorch's scheduler, whose checkpoint holds numbers only."""
    factor = WarmupThenDecay.of(stage)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))  # a lambda is not saved
