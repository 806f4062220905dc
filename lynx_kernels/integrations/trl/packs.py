"""A stream of packed rows that are as full as a token budget allows."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.packing import PackPlanner

logger = logging.getLogger("lynx_kernels")


class Collates(Protocol):
    """Makes rows of samples, and batches of rows."""

    collator: Any
    rows: Callable[[Any, int], list[dict[str, Any]]]
    join: Callable[[list[list[dict[str, Any]]]], dict[str, Any]]


class Packs(IterableDataset):
    """Batches of rows that are one packed row of at most ``token_budget`` tokens, without end.

    Each rank, and each worker of its loader, reads its own part of the samples, in a new order each time around.

    Args:
        samples: with numbers if they have a length; else they are streamed in their order.
        collate: makes rows and batches.
        token_budget: the most tokens of a packed row, shared ones counted once.
        seed: of the order.
        rank, ranks: which part of the samples.
    """

    def __init__(
        self, samples: Any, collate: Collates, *, token_budget: int, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.samples, self.collate, self.token_budget = samples, collate, token_budget
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        planner = PackPlanner(self.token_budget)
        waiting: dict[int, list[dict[str, Any]]] = {}
        for sample, what in self._of_part(self.rank * workers + number, self.ranks * workers):
            rows = self.collate.rows(sample, what)
            tokens = pack_rows(rows, self.collate.collator).num_tokens if rows else 0
            if not 0 < tokens <= self.token_budget:
                self.skipped += 1
                if rows:
                    logger.warning(
                        "sample %d is skipped (%d so far): it has %d tokens, and token_budget is %d",
                        what,
                        self.skipped,
                        tokens,
                        self.token_budget,
                    )
                continue
            waiting[planner.num_seen] = rows
            for [numbers] in planner.push(tokens):
                yield self.collate.join([waiting.pop(each) for each in numbers])

    def _of_part(self, part: int, parts: int) -> Iterator[tuple[Any, int]]:
        """Samples with their numbers, without end."""
        around = 0
        while True:
            before = self.skipped
            found = 0
            if hasattr(self.samples, "__len__"):
                generator = torch.Generator().manual_seed(self.seed + around)
                order = torch.randperm(len(self.samples), generator=generator).tolist()
                source = ((self.samples[each], each) for each in order[part::parts])
            else:
                source = ((each, at) for at, each in enumerate(self.samples) if at % parts == part)
            for each in source:
                found += 1
                yield each
            if not found or self.skipped - before == found:
                raise ValueError(f"none of the {found} samples of this part can be used; the log says why")
            around += 1
