"""How fast a run is, and how well it uses its packs and its devices."""

import time
from dataclasses import dataclass, field

import torch


@dataclass
class Window:
    """What happened on this rank since the last entry of the log.

    Attributes:
        since: when that was, by ``time.perf_counter``.
        supervised, tokens, capacity: tokens that were learned from, tokens in packs, and tokens that the packs had room
            for.
        flops: operations of the model's products.
        waited: seconds that the loop waited for data.
    """

    since: float = field(default_factory=time.perf_counter)
    supervised: int = 0
    tokens: int = 0
    capacity: int = 0
    flops: float = 0.0
    waited: float = 0.0

    def totals(self) -> torch.Tensor:
        """(5,) fp64, to be summed over the ranks and given to ``rates``."""
        return torch.tensor([self.supervised, self.tokens, self.capacity, self.flops, self.waited], dtype=torch.float64)

    @staticmethod
    def rates(totals: torch.Tensor, seconds: float, ranks: int, peak: float) -> dict[str, float]:
        """For the log, of all ranks together.

        Args:
            totals: the sum of all ranks' ``totals()``.
            seconds: since the last entry.
            ranks: how many there are.
            peak: operations a second that one of them could do.
        """
        supervised, tokens, capacity, flops, waited = totals.tolist()
        return {
            "supervised_tokens_per_second": round(supervised / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(flops / (seconds * ranks * peak), 4),
            "pack_utilization": round(tokens / capacity, 4) if capacity else 0.0,
            "data_wait": round(waited / (seconds * ranks), 4),
        }
