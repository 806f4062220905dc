"""Whose lengths the attention benchmarks take: files of groups, and how much work there is in them.

A file of ``workloads/`` says what it is about, the operation, whether roots are full or causal (prefix attention only)
and its groups ``[root length, [branch length, ...]]``. For prefix attention they are those of a PackedLayout; for cross
attention a root is the keys that its branch, the queries, sees; for decoding a root is a prefix and a branch a beam,
whose newest token is the query. A case takes the first groups of a file.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from torch import Tensor, arange, cat

from lynx_kernels import PackedLayout

FOLDER = Path(__file__).parent / "workloads"


@dataclass(frozen=True)
class Workload:
    """Groups of lengths and what is done with them.

    Attributes:
        name: of its file, and "full" or "causal" where roots attend to themselves.
        operation: "prefix_attention", "cross_attention" or "prefix_attention_decode".
        groups: of each the length of its root and those of its branches, in tokens.
        root_is_causal: as in PackedLayout.
    """

    name: str
    operation: str
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    root_is_causal: bool = True

    def repeated(self) -> "Workload":
        """The same with a copy of the root for every branch."""
        return replace(self, groups=tuple((root, (branch,)) for root, branches in self.groups for branch in branches))

    def layout(self, device: str) -> PackedLayout:
        return PackedLayout.from_groups(self.groups, root_is_causal=self.root_is_causal, device=device)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group."""
        return [root + sum(branches) for root, branches in self.groups]

    @property
    def is_causal(self) -> bool:
        """Whether every group is one causal sequence."""
        return all(len(branches) == 1 and (root == 0 or self.root_is_causal) for root, branches in self.groups)

    @property
    def shares_roots(self) -> bool:
        return any(len(branches) > 1 for _, branches in self.groups)

    @cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, the operation's own work; a causal pair counts once."""
        count = 0
        for root, branches in self.groups:
            if self.operation == "cross_attention":
                count += sum(root * branch for branch in branches)
            elif self.operation == "prefix_attention_decode":
                count += sum(root + branch for branch in branches)
            else:
                count += root * (root + 1) // 2 if self.root_is_causal else root**2
                count += sum(root * branch + branch * (branch + 1) // 2 for branch in branches)
        return count

    def segments(self) -> list[tuple[range, list[range]]]:
        """Of every group the tokens of its root and of its branches in the packed row."""
        found = []
        for (root, branches), start in zip(self.groups, accumulate(self.lengths, initial=0), strict=False):
            bounds = accumulate(branches, initial=start + root)
            found.append((range(start, start + root), [range(*each) for each in pairwise(bounds)]))
        return found


def rows_of(ranges: list[range], device: str) -> Tensor:
    """The numbers of all ranges, one after another, (sum of lengths,) int64."""
    return cat([arange(each.start, each.stop, device=device) for each in ranges])


def workloads(name: str, samples: int) -> list[Workload]:
    """The first ``samples`` groups of a file, once for full and once for causal roots where it asks for both."""
    said = json.loads((FOLDER / f"{name}.json").read_text())
    groups = tuple((root, tuple(branches)) for root, branches in said["groups"])
    if samples > len(groups):
        raise ValueError(f"{name}.json has {len(groups)} groups, fewer than {samples}")
    return [
        Workload(f"{name} {kind}".strip(), said["operation"], groups[:samples], kind == "causal")
        for kind in said.get("roots", [""])
    ]
