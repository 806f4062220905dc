"""Files of records, the batches of a sampler's packs, and whether two batches are the same."""

import json

import torch
from torch.utils.data import DataLoader

from lynx.data.collator import Collator


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def load(sampler, workers=0, always_vision=False):
    collator = Collator(sampler.processor, sampler.token_budget, always_vision=always_vision)
    return DataLoader(sampler.dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif name in ("report", "max_supervised"):
            assert value == other[name]
        else:
            assert torch.equal(value.segments, other[name].segments), name
