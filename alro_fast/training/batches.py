"""Which lists are trained when: the batches of every epoch, shared out to processes, and the place a run is at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from ..errors import AlroFastError
from ..modeling.planning import EpochPlans, halve
from ..texts import read_json

CURSOR = "cursor"  # its entry among the stateful_callbacks of trainer_state.json


@dataclass(frozen=True)
class Cursor:
    """The place a run has reached: an epoch, and how many batches of its plan were trained.

    Only the last rounds of an epoch differ with the number of processes (`share_out`), and an optimiser step takes
    whole rounds. So a run goes on with the batches after `trained`, or within those rounds with what they leave
    (`rest`), however many processes that takes and took before, and every list of the epoch is trained once.

    Attributes:
        epoch: counted from 0.
        trained: batches of all processes; may be more than planned when the last round was trained.
        step: optimiser steps of the whole run.
        processes, accumulation: those of the latest step, None where that is not known.
        plan: `EpochPlans.fingerprint` of the plans that `trained` counts batches of.
        rest: the batches that are left of the epoch where they are no longer the plan's after `trained`, else None.
        old: of a checkpoint of version 0.1.0, which recorded no cursor, within an epoch.
    """

    epoch: int = 0
    trained: int = 0
    step: int = 0
    processes: int | None = None
    accumulation: int | None = None
    plan: str | None = None
    old: bool = False
    rest: list[list[int]] | None = None

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

    def advanced(
        self, processes: int, batches: int, accumulation: int, plan: str, rest: list[list[int]] | None = None
    ) -> Cursor:
        """One optimiser step further, in which `processes` trained `batches` together."""
        trained, step = self.trained + batches, self.step + 1
        return Cursor(self.epoch, trained, step, processes, accumulation, plan, rest=rest)

    def next_epoch(self) -> Cursor:
        """The beginning of the epoch after this one."""
        return dataclasses.replace(self, epoch=self.epoch + 1, trained=0, old=False, rest=None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class PlannedBatches(Sampler[list[tuple[int, list[int]]]]):
    """Batches of lists under a token budget, for one process of many; their order is a function of (seed, epoch).

    Every epoch has as many batches as any other. Batch b of what is left of an epoch goes to process b % world_size, so
    that the same number of batches is the same optimiser step with any number of processes.

    Args:
        plans: of every epoch; the samplers of one run share them.
        rank, world_size: this process, and how many there are.
        start: where a resumed run goes on.

    Raises:
        AlroFastError: `start` counts batches of another plan.
    """

    def __init__(self, plans: EpochPlans, rank: int = 0, world_size: int = 1, start: Cursor | None = None) -> None:
        self.plans, self.rank, self.world_size, self.epoch = plans, rank, world_size, 0
        self.start, self.done = Cursor(), 0  # `done`: batches of its epoch that were trained before it
        self._last: tuple[int, list[list[int]], int] | None = None
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
        return self._shared(epoch)[0]

    def rest(self, epoch: int, trained: int) -> list[list[int]] | None:
        """What is left when so many batches of `left` are trained: None where that is the plan, for `Cursor.rest`."""
        left, planned = self._shared(epoch)
        return left[trained:] if trained > planned else None

    def rounds_left(self, epoch: int) -> int:
        """What is left of an epoch, in batches per process."""
        return len(self.left(epoch)) // self.world_size

    def _shared(self, epoch: int) -> tuple[list[list[int]], int]:
        """What is left of an epoch, and how many batches of it, from the first, are the plan's."""
        if self._last is None or self._last[0] != epoch:
            within = epoch == self.start.epoch
            plan = self._untrained(self.start) if within else self.plans(epoch)
            left = share_out(plan, self.world_size, self.plans.level)
            planned = next((b for b, pair in enumerate(zip(plan, left)) if pair[0] != pair[1]), len(plan))
            self._last = epoch, left, -1 if within and self.start.rest is not None else planned
        return self._last[1:]

    def _go_on(self, start: Cursor) -> None:
        """Begin at `start`, or with the epoch after it where nothing is left of its own."""
        if start.old or (start.trained and start.plan != self.plans.fingerprint):
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
        return self.plans(start.epoch)[start.trained :] if start.rest is None else [one for one in start.rest if one]


def share_out(
    plan: Sequence[list[int]], world_size: int, level: Callable[[list[list[int]]], list[list[int]]] = list
) -> list[list[int]]:
    """A plan of as many batches for every process.

    The last round is short of some: of the fewest last rounds that hold a list for every place, those of most lists are
    halved until every place has one, and they are levelled. A process gets an empty batch only where a plan has fewer
    lists than places, as one of a list a batch may; then the last round alone is halved. Every round before is as it
    was, and the rounds hold the same lists as the plan.
    """
    rounds = -(-len(plan) // world_size)
    if len(plan) % world_size == 0:
        return list(plan)
    lists = 0
    for whole in range(rounds - 1, -1, -1):
        lists += sum(map(len, plan[whole * world_size : (whole + 1) * world_size]))
        if lists >= (rounds - whole) * world_size:
            break
    else:
        whole = rounds - 1
    last = list(plan[whole * world_size :])
    while len(last) < (rounds - whole) * world_size:
        largest = max(range(len(last)), key=lambda b: len(last[b]))
        if len(last[largest]) > 1:
            halve(last, largest)
        else:
            last.append([])
    return list(plan[: whole * world_size]) + level(last)
