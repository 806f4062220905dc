"""TRL's trainers with what samples have in common computed once: a prompt and its images, forward and backward.

The trainers are TRL's own. What changes is how a batch runs through the model: rows that begin alike and have the same
images become branches of a tree in one packed row, see docs/forest.md. Losses, clipping, sampling, metrics, saving are
TRL's. ``pip install 'lynx-kernels[trl]'``.
"""

from lynx_kernels.integrations.trl.dpo import SharedPrefixDPOTrainer
from lynx_kernels.integrations.trl.grpo import SharedPrefixGRPOTrainer
from lynx_kernels.integrations.trl.readable import readable
from lynx_kernels.integrations.trl.sft import PackedSFTTrainer

__all__ = ["PackedSFTTrainer", "SharedPrefixDPOTrainer", "SharedPrefixGRPOTrainer", "readable"]
