"""``DTYPES``: the dtypes in which every Triton kernel is interpreted."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
