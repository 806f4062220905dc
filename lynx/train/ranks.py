"""The processes that train together."""

import torch
from accelerate import PartialState


def ranks() -> PartialState:
    """The ranks, as the variables of torchrun or accelerate tell them; of one process without these."""
    return PartialState(cpu=not torch.cuda.is_available())
