"""The processes that train together."""

import hashlib
import os
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import distributed

_PATIENCE = timedelta(seconds=5)


def ranks() -> PartialState:
    """The ranks, as the variables of torchrun or accelerate tell them; of one process without these."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_first_to_say(text: str) -> bool:
    """Whether no other rank has said this, so that an error that all ranks meet is printed once.

    The ranks count in the store through which they find each other: torchrun's, or that of their process group. True
    where there is none, or it does not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        if distributed.is_initialized():
            store = distributed.distributed_c10d._get_default_store()
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = distributed.TCPStore(address, port, is_master=False, timeout=_PATIENCE)
        else:
            return True
        return store.add(f"lynx said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # RuntimeError: of torch's stores
        return True
