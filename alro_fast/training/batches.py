"""Which lists are trained when: the batches of every epoch, shared out to processes, and the place a run is at."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..errors import AlroFastError
from ..modeling.planning import EpochPlans, halve
from ..texts import read_json

CURSOR = "cursor"  # its entry among the stateful_callbacks of trainer_state.json


@dataclass(frozen=True)
class Cursor:
    """The place a run has reached: an epoch, and how many batches of its plan were trained.

    Only the last round of an epoch differs with the number of processes (`share_out`), and an optimiser step takes
    whole rounds. So a run goes on with the batches after `trained`, however many processes that takes and took before,
    and every list of the epoch is trained once.

    Attributes:
        epoch: counted from 0.
        trained: batches of all processes; may be more than planned when the last round was trained.
        step: optimiser steps of the whole run.
        processes, accumulation: those of the latest step, None where that is not known.
        plan: `PlannedBatches.fingerprint` of the plans that `trained` counts batches of.
        old: of a checkpoint of version 0.1.0, which recorded no cursor, within an epoch.
    """

    epoch: int = 0
    trained: int = 0
    step: int = 0
    processes: int | None = None
    accumulation: int | None = None
    plan: str | None = None
    old: bool = False

    @classmethod
    def of(cls, checkpoint: str | Path) -> Cursor:
        """The cursor of a checkpoint."""
        folder = Path(checkpoint)
        state = read_json(folder / "trainer_state.json")
        recorded = state.get("stateful_callbacks", {}).get(CURSOR)
        if recorded is not None:
            return cls(**recorded | {"old": bool(recorded["old"])})
        share, epoch = math.modf(state["epoch"])
        processes = len(list(folder.glob("rng_state_*.pth"))) or 1
        return cls(int(epoch), 0, state["global_step"], processes, old=bool(share))

    def advanced(self, processes: int, batches: int, accumulation: int, plan: str) -> Cursor:
        """One optimiser step further, in which `processes` trained `batches` together."""
        return Cursor(self.epoch, self.trained + batches, self.step + 1, processes, accumulation, plan)

    def next_epoch(self) -> Cursor:
        """The beginning of the epoch after this one."""
        return dataclasses.replace(self, epoch=self.epoch + 1, trained=0, old=False)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class PlannedBatches(Sampler[list[tuple[int, list[int]]]]):
    """Batches of lists under a token budget, for one process of many; their order is a function of (seed, epoch).

    Every epoch has as many batches as any other. Batch b of what is left of an epoch goes to process b % world_size, so
    that the same number of batches is the same optimiser step with any number of processes.

    Args:
        sizes: distinct tokens of each list.
        token_budget: tokens a batch may hold.
        seed: None for one order that all epochs share.
        rank, world_size: this process, and how many there are.
        start: where a resumed run goes on.
        most: lists a batch may hold; None: as many as fit.
        common: tokens that all lists have alike, which a batch takes once.
        costs: of each list, whole numbers; batches are levelled by them (`modeling.planning`).

    Raises:
        AlroFastError: `start` counts batches of another plan.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        token_budget: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        start: Cursor | None = None,
        most: int | None = None,
        common: int = 0,
        costs: Sequence[int] | None = None,
    ) -> None:
        self.sizes, self.token_budget, self.seed = list(sizes), token_budget, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self.plans = EpochPlans(self.sizes, token_budget, seed, most, common, costs)
        given = [token_budget, -1 if seed is None else seed, self.plans.num_batches, *self.sizes]
        given += ([] if most is None else [-most]) + ([0, common] if common else []) + [*(costs or ())]
        self.fingerprint = hashlib.sha256(np.asarray(given, np.int64).tobytes()).hexdigest()[:16]
        self.start, self.done = Cursor(), 0  # `done`: batches of its epoch that were trained before it
        self._last: tuple[int, list[list[int]]] | None = None
        if start is not None:
            self._go_on(start)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return -(-self.plans.num_batches // self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, list[int]]]]:
        for batch in self.left(self.epoch)[self.rank :: self.world_size]:
            yield [(self.epoch, batch)]

    def left(self, epoch: int) -> list[list[int]]:
        """What is left of an epoch, for all processes; an empty batch is one that a process has nothing for."""
        if self._last is None or self._last[0] != epoch:
            plan = self._untrained(self.start) if epoch == self.start.epoch else self.plans(epoch)
            self._last = epoch, share_out(plan, self.world_size, self.plans.level)
        return self._last[1]

    def rounds_left(self, epoch: int) -> int:
        """What is left of an epoch, in batches per process."""
        return len(self.left(epoch)) // self.world_size

    def _go_on(self, start: Cursor) -> None:
        """Begin at `start`, or with the epoch after it where nothing is left of its own."""
        if start.old or (start.trained and start.plan != self.fingerprint):
            raise AlroFastError(
                "--resume_from_checkpoint: the checkpoint counts batches of other prompts or of another packing than "
                "this version makes with these options (--share, --tokens_per_batch, --lists_per_batch); give the "
                "options it was written with, go on with the version that wrote it, or start in another --output_dir"
            )
        if not self._untrained(start):
            self.start = start.next_epoch()
            return
        self.start, self.done = start, start.trained

    def _untrained(self, start: Cursor) -> list[list[int]]:
        return self.plans(start.epoch)[start.trained :]


def share_out(
    plan: Sequence[list[int]], world_size: int, level: Callable[[list[list[int]]], list[list[int]]] = list
) -> list[list[int]]:
    """A plan of as many batches for every process.

    Batches of the last round, which is short of some, are halved, those of most lists first, and levelled; a process
    gets an empty batch only where the round has fewer lists than there are processes. Every round but the last is as it
    was, and the last holds the same lists, so an optimiser step of the same number of batches is the same with any
    number of processes.
    """
    whole = len(plan) - len(plan) % world_size
    rounds, last = list(plan[:whole]), list(plan[whole:])
    while 0 < len(last) < world_size:
        largest = max(range(len(last)), key=lambda b: len(last[b]))
        if len(last[largest]) > 1:
            halve(last, largest)
        else:
            last.append([])
    return rounds + (level(last) if last else [])
