"""Work dealt over the processes of one launch, whole jobs each, and gathered by all of them in the order of the jobs.

A job is computed by one process as one process alone would compute it, so results do not depend on how many there are.
Only within `dealing` is anything dealt: a program that brings its own process group and ranks its own lists in each
process is left alone. The process group is accelerate's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import AlroFastError
from . import launch
from .launch import launched

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")
AS_LONG_AS_IT_TAKES = timedelta(days=30)  # standard input may pause for hours; of a dead process the launcher tells


class Place(NamedTuple):
    """Which process this is, of how many that deal."""

    number: int = 0
    processes: int = 1


ALONE = Place()
_place = ALONE
_known: Exception | None = None  # the last that all processes raised


def place() -> Place:
    """This process among those that deal: (0, 1) outside `dealing`, and within a job."""
    return _place


@contextlib.contextmanager
def dealing(device: str | None = None) -> Iterator[str | None]:
    """Deal work over all processes of the launch, in this context; gives the device to compute on, a CUDA device of
    its own to each. Every process must come to each `dealt` and `told` in here. With one process `device` is given
    back, and nothing else happens.

    What one process raises in here, all raise, as soon as they wait for it; not beside others' collectives, those of a
    Trainer, where it is the launcher that ends the others. AlroFastError for a `device` of one process, such as cuda:1,
    where there are several, and for more processes than devices.
    """
    if launched() == 1:
        yield device
        return
    import torch
    from accelerate import PartialState

    kind, _, number = (device or "").partition(":")
    if number:
        raise AlroFastError(
            f"--device {device} is one device, and {launched()} processes were launched, each with its own; give "
            f"{kind}, or leave it out"
        )
    ours = PartialState._shared_state == {}  # else it is the Trainer's
    cpu = kind == "cpu" or not torch.accelerator.is_available()
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if ours and not cpu and here > devices:
        raise AlroFastError(
            f"{here} processes were launched, but there are {devices} devices for them; launch no more than that, or "
            "add --device cpu"
        )
    state = PartialState(cpu=cpu, timeout=AS_LONG_AS_IT_TAKES) if ours else PartialState()
    with _standing(Place(state.process_index, state.num_processes)):
        failure: Exception | None = None
        try:
            yield str(state.device)
        except Exception as error:
            launch.all_know = error is _known
            if not ours or launch.all_know:
                raise
            failure = error
        if ours:
            _exchanged(failure)
            state.destroy_process_group()


def told(value: T) -> T:
    """What the first process has, in every process."""
    if place().processes == 1:
        return value
    index = place().number
    found: T = _exchanged(None, value if index == 0 else None)[0]
    return found


def dealt(
    jobs: Sequence[T],
    costs: Sequence[int],
    compute: Callable[[T], R],
    *,
    model: nn.Module | None = None,
    passes: bool = False,
) -> list[R]:
    """compute(job) of every job, in their order, in every process; each is computed by one of them.

    Args:
        jobs: the same in every process.
        costs: of each job, in any unit; processes get equal shares, as far as whole jobs allow.
        compute: results are pickled. Within it nothing is dealt.
        model: what a job runs one forward pass of. Where its weights are shards (FSDP2, ZeRO-3), every process takes
            part in every pass: those with fewer jobs do one again, and leave its result.
        passes: a job runs many forward passes, nobody knows how many. Over shards every process then does all jobs.

    Raises:
        AlroFastError: in every process, what one of them raised; or processes have different jobs.
    """
    index, count = place()
    together = count > 1 and model is not None and is_sharded(model)
    if count == 1 or (together and passes):
        return [compute(job) for job in jobs]
    mine: dict[int, R] = {}
    failure: Exception | None = None
    try:
        with _standing(ALONE):
            for number in (shares_in_step if together else shares)(costs, count)[index]:
                mine[number] = compute(jobs[number])
    except Exception as error:
        if together:  # the others wait within a pass: their launcher ends them
            raise
        failure = error
    gathered = _exchanged(failure, (list(costs), mine))
    if any(theirs != gathered[0][0] for theirs, _ in gathered):
        raise AlroFastError("processes have different lists; give all of them the same files")
    found = {number: result for _, theirs in gathered for number, result in theirs.items()}
    return [found[number] for number in range(len(jobs))]


def after_the_first(work: Callable[[], None]) -> None:
    """Do `work` in the first process, then in the others, with the process group that stands, the Trainer's.

    Raises:
        AlroFastError: in every process, what the first raised, before the others begin; or what one of them did.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        work()
        return
    for ours in (state.process_index == 0, state.process_index != 0):
        failure: AlroFastError | None = None
        try:
            if ours:
                work()
        except AlroFastError as error:
            failure = error
        _exchanged(failure)


def shares(costs: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of the jobs of each process: the dearest first, each to the process that has least (Graham 1969: at most
    a third more than the best)."""
    hands: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        least = loads.index(min(loads))
        hands[least].append(number)
        loads[least] += costs[number]
    return [sorted(hand) for hand in hands]


def shares_in_step(costs: Sequence[int], count: int) -> list[list[int]]:
    """The same with as many jobs for each process: like costs side by side, the cheapest job more than once."""
    order = sorted(range(len(costs)), key=lambda number: -costs[number])
    order += order[-1:] * (-len(order) % count)
    return [order[index::count] for index in range(count)]


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine holds weights of `model` in parts (FSDP2: DTensors, ZeRO-3: their data elsewhere)."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def _exchanged(failure: Exception | None, value: Any = None) -> list[Any]:
    """What every process has, by their number; where one has failed, all raise that."""
    from accelerate.utils import gather_object

    global _known
    said = None if failure is None else str(failure)
    if failure is not None and not isinstance(failure, AlroFastError):
        said = f"process {place().number}: {type(failure).__name__}: {said}"
    gathered: list[tuple[str | None, Any]] = gather_object([(said, None if failure else value)])
    mistakes = [words for words, _ in gathered if words is not None]
    if mistakes:
        _known = failure or AlroFastError(mistakes[0])
        launch.all_know = True
        raise _known
    return [each for _, each in gathered]


@contextlib.contextmanager
def _standing(where: Place) -> Iterator[None]:
    global _place
    before, _place = _place, where
    try:
        yield
    finally:
        _place = before
