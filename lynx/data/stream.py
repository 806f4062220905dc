"""Packs from a mixture, endless, the same on every rank and after every resumption.

``PackSampler`` runs in the main process. It draws samples, looks at their texts alone to know what they cost, and plans
packs. It hands a few numbers for each sample to DataLoader's workers, where ``PackDataset`` decodes and crops. All that
is drawn for a sample follows from the seed and the number of its draw, so neither workers nor prefetching can change
anything.

A text is tokenised twice, for its cost and in the worker. The second time is a fifteenth of the worker's time (0.3 of
4.6 ms, measured with JPEGs of 640 x 480 on one core), and sending the tokens instead would not spare it the record. The
first time is what bounds a run: every rank looks at the texts of all ranks, in its main process, 2,900 samples a second
with captions and short answers. Lynx-7B at 224 px takes 3.3 TFLOP a sample (69 tokens through the frozen decoder,
activations checkpointed, and the image's 257 through the tower); an H100 that does 400 TFLOP/s consumes 120 a second.
Planning for 8 such GPUs is a third of the main process's time, for 24 it would be all of it: ``data_wait`` in the log.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from operator import index as as_int
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from lynx.data.conversation import Sample
from lynx.data.mixture import Mixture, Reference
from lynx.data.prompts import Prompts
from lynx.data.skipped import Skipped, TooManySkippedError
from lynx.data.source import RecordSource
from lynx.processor import LynxProcessor
from lynx_kernels import PackPlanner

_VERSION = 2  # of the state
_HOPELESS = 1000  # this many unusable records in a row


class Encoded(NamedTuple):
    """A sample with its media decoded, ready to be packed."""

    dataset: str
    sample: Sample
    generator: np.random.Generator | None  # draws the crops; None takes centres
    path: str = ""  # where the record stands


class PackDataset(Dataset):
    """Encodes the samples that references name: the workers' part of the work.

    Args:
        mixture: the one that the references come from.
        processor: of the model that is trained.
        prompts: of the data sets' tasks; None takes those that come with the package.
        seed: of prompts, answers, crops and frames.
        augment: draw crops, and the frames of videos. False takes the centres and the middles.

    Attributes:
        sizes: how many records each data set has, by name.

    Raises:
        ValueError: a data set is of a task that has no prompts.
    """

    def __init__(
        self,
        mixture: Mixture[RecordSource],
        processor: LynxProcessor,
        *,
        prompts: Prompts | None = None,
        seed: int,
        augment: bool = True,
    ):
        self.names, self.datasets = mixture.names, mixture.datasets
        self.sizes = {name: len(dataset) for name, dataset in zip(self.names, self.datasets, strict=True)}
        self.processor = processor
        self.prompts = Prompts.default() if prompts is None else prompts
        self.seed, self.augment = as_int(seed), augment
        for name, dataset in zip(self.names, self.datasets, strict=True):
            if dataset.task is not None and dataset.task not in self.prompts.tasks:
                raise ValueError(
                    f"data set {name!r} has the task {dataset.task!r}, for which there are no prompts; there are "
                    f"some for {sorted(self.prompts.tasks)}"
                )

    def encode(self, reference: Reference) -> tuple[Sample, np.random.Generator] | Skipped:
        """The sample with its media not yet decoded, and the generator for what is still to draw."""
        generator = np.random.default_rng([self.seed, reference.draw])
        try:
            record = self.datasets[reference.dataset][reference.record]
            conversations = self.prompts.phrase(record, generator)
            drawing = generator if self.augment else None
            conversations[0] = [_fewer_frames(each, self.processor.max_frames, drawing) for each in conversations[0]]
            return self.processor.encode_branches(conversations, record.parents), generator
        except (ValueError, OSError) as error:
            return self.skip(reference, str(error))

    def __getitem__(self, reference: Reference | Skipped) -> Encoded | Skipped:
        """The sample with its media decoded; what is skipped already stays so."""
        if isinstance(reference, Skipped):
            return reference
        encoded = self.encode(reference)
        if isinstance(encoded, Skipped):
            return encoded
        sample, drawing = encoded
        generator = drawing if self.augment else None
        try:
            media: list[Any] = [self.processor.load_frames(item, generator=generator) for item in sample.media]
        except (ValueError, OSError) as error:
            return self.skip(reference, str(error))
        where = self.datasets[reference.dataset].where(reference.record)
        return Encoded(self.names[reference.dataset], replace(sample, media=media), generator, where)

    def skip(self, reference: Reference, reason: str, *, too_long: bool = False) -> Skipped:
        """The entry that says why a sample is left out."""
        where = self.datasets[reference.dataset].where(reference.record)
        return Skipped(self.names[reference.dataset], reference.record, where, reason, too_long)


class PackSampler(Sampler[list[Reference | Skipped]]):
    """A batch sampler for DataLoader: each batch is the pack of this rank for one step.

    >>> sampler = PackSampler(mixture, processor, token_budget=4096, ranks=8, rank=rank, seed=0)
    >>> loader = DataLoader(sampler.dataset, batch_sampler=sampler, collate_fn=Collator(processor, 4096), ...)

    Every rank runs the same sampler and takes its own packs: there is nothing to agree on, and no sample is taken twice
    or lost. A record that cannot be used, or does not fit a pack, goes with the next pack of rank 0 as a ``Skipped``. A
    pack may be empty. Every iteration starts where the sampler was made or ``load_state_dict`` has put it.

    Args:
        mixture: what to draw from. It stays as it is; each iteration draws with a copy.
        processor: of the model that is trained.
        token_budget: the most language-model tokens of a pack.
        prompts, augment: as of ``PackDataset``.
        ranks, rank: how many processes train, and which of them this is.
        lookahead: as of ``PackPlanner``.
        seed: of what is drawn for a sample; the mixture has its own.
        too_long: what becomes of a sample of more tokens than the budget: it is skipped, ``"skip"``, or an ``"error"``.
        max_steps: steps of the whole run, those before a resumption included; None never ends.
        history: of how many steps ``state_after`` keeps the states: more than a run draws ahead.

    Attributes:
        dataset: the ``PackDataset`` for the DataLoader.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        mixture: Mixture[RecordSource],
        processor: LynxProcessor,
        *,
        token_budget: int,
        prompts: Prompts | None = None,
        augment: bool = True,
        ranks: int = 1,
        rank: int = 0,
        lookahead: int = 16,
        seed: int,
        too_long: str = "skip",
        max_steps: int | None = None,
        history: int = 256,
    ):
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, expected 0 to {ranks - 1} as there are {ranks} ranks")
        if too_long not in ("skip", "error"):
            raise ValueError(f"too_long={too_long!r}, expected 'skip' or 'error'")
        if history < 1:
            raise ValueError(f"history={history}, expected at least 1")
        self.dataset = PackDataset(mixture, processor, prompts=prompts, seed=seed, augment=augment)
        self.mixture, self.processor = mixture, processor
        self.token_budget, self.ranks, self.rank, self.lookahead = token_budget, ranks, rank, lookahead
        self.too_long, self.max_steps = too_long, max_steps
        self._prompts = self.dataset.prompts.fingerprint
        self._states: deque[dict[str, Any]] = deque(maxlen=history)
        self._start = self._state(0, mixture, self._planner(), {}, deque())

    def __len__(self) -> int:
        if self.max_steps is None:
            raise TypeError("a PackSampler without max_steps has no end")
        return max(0, self.max_steps - self._start["step"])

    def __iter__(self) -> Iterator[list[Reference | Skipped]]:
        mixture, planner = copy(self.mixture), self._planner()
        mixture.load_state_dict(self._start["mixture"])
        planner.load_state_dict(self._start["planner"])
        step = self._start["step"]
        waiting = {number: Reference(*reference) for number, *reference in self._start["waiting"]}
        ready = deque(self._start["ready"])  # steps that are planned
        skipped: list[Skipped] = []
        self._states.clear()
        while self.max_steps is None or step < self.max_steps:
            in_vain = 0
            while not ready:
                reference = mixture.draw()
                costs = self._costs(reference)
                if isinstance(costs, Skipped):
                    skipped.append(costs)
                    in_vain += 1
                    if in_vain == _HOPELESS:
                        raise TooManySkippedError(
                            f"none of the last {in_vain} records drawn can be used; the last one: {costs.dataset}, "
                            f"{costs.path}: {costs.reason}"
                        )
                    continue
                in_vain = 0
                waiting[planner.num_seen] = reference
                ready.extend(planner.push(*costs))
            packs = [[waiting.pop(number) for number in pack] for pack in ready.popleft()]
            step += 1
            self._states.append(self._state(step, mixture, planner, waiting, ready))
            yield [*(skipped if self.rank == 0 else ()), *packs[self.rank]]
            skipped = []

    def state_after(self, num_steps: int) -> dict[str, Any]:
        """The state from which to go on after ``num_steps`` steps of the run, those that were consumed.

        However far ahead workers were sent, a sampler that loads it gives the very packs that would have followed. The
        state is the same on every rank. States of earlier steps are forgotten.

        Returns:
            Numbers, strings, lists and dicts.

        Raises:
            ValueError: that step was not drawn yet, or is forgotten.
        """
        if num_steps == self._start["step"]:
            return self._start
        while self._states and self._states[0]["step"] < num_steps:
            self._states.popleft()
        if not self._states or self._states[0]["step"] != num_steps:
            raise ValueError(
                f"PackSampler: no state after step {num_steps}: this step was not drawn yet, a later one was asked for "
                f"before, or more than history={self._states.maxlen} steps were drawn since"
            )
        return self._states[0]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on from a state of ``state_after``.

        Raises:
            ValueError: it has another version, seed, mixture, token budget, lookahead or number of ranks, or other
                prompts. A state of another number of ranks cannot go on: the samples that wait were planned for those.
        """
        for name in ("version", "seed", "prompts"):
            if state.get(name) != self._start[name]:
                raise ValueError(
                    f"PackSampler: the state has {name}={state.get(name)!r}, this sampler has {self._start[name]!r}; "
                    "make the sampler as it was when the state was saved, or start anew"
                )
        copy(self.mixture).load_state_dict(state["mixture"])
        self._planner().load_state_dict(state["planner"])
        self._start = dict(state)
        self._states.clear()

    def _planner(self) -> PackPlanner:
        return PackPlanner(self.token_budget, ranks=self.ranks, lookahead=self.lookahead)

    def _state(
        self,
        step: int,
        mixture: Mixture[RecordSource],
        planner: PackPlanner,
        waiting: Mapping[int, Reference],
        ready: Iterable[Any],
    ) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "seed": self.dataset.seed,
            "prompts": self._prompts,
            "step": step,
            "mixture": mixture.state_dict(),
            "planner": planner.state_dict(),
            "waiting": [[number, *reference] for number, reference in waiting.items()],
            "ready": list(ready),
        }

    def _costs(self, reference: Reference) -> tuple[int, int] | Skipped:
        encoded = self.dataset.encode(reference)
        if isinstance(encoded, Skipped):
            return encoded
        tokens, patches = self.processor.costs(encoded[0])
        if tokens <= self.token_budget:
            return tokens, patches
        skipped = self.dataset.skip(
            reference, f"{tokens} tokens are more than the budget of {self.token_budget}", too_long=True
        )
        if self.too_long == "error":
            raise ValueError(
                f"{skipped.dataset}, {skipped.path}: {skipped.reason}; raise token_budget, or skip such samples"
            )
        return skipped


def _fewer_frames(message: dict[str, Any], max_frames: int, generator: np.random.Generator | None) -> dict[str, Any]:
    """The message with at most ``max_frames`` frames of a video: one from each of as many parts, or its middle."""
    if not isinstance(message["content"], list):
        return message
    content = []
    for part in message["content"]:
        frames = part.get("video")
        if isinstance(frames, list) and len(frames) > max_frames:
            places = [0.5 if generator is None else generator.random() for _ in range(max_frames)]
            taken = [int((number + place) * len(frames) / max_frames) for number, place in enumerate(places)]
            part = {**part, "video": [frames[each] for each in taken]}
        content.append(part)
    return {**message, "content": content}
