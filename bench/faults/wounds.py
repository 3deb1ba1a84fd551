"""What is done to a process of a run, and where. A wound is a mapping that travels as JSON."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import Trainer

from alro_fast.objectives import alro
from alro_fast.training.guards.trainer import GuardedTrainer
from alro_fast.training.trainer import RankerTrainer

Wound = Mapping[str, Any]
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
PLACES = ("forward pass", "before the optimiser", "after the optimiser")


def inflict(wound: Wound, trace: Path) -> None:
    """Prepare this process: write down which lists each step trains, and do what the wound says."""
    note_lists(trace)
    KINDS[wound.get("kind", "none")](wound)


def note_lists(trace: Path) -> None:
    """A line of JSON for every batch: its optimiser step, and its lists."""
    step = RankerTrainer.training_step

    def noting(self: RankerTrainer, model: Any, inputs: Any, *more: Any) -> Any:
        if inputs.lists:
            line = {"step": self.state.global_step + 1, "lists": [one.list_id for one in inputs.sources]}
            with trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return step(self, model, inputs, *more)

    RankerTrainer.training_step = noting  # type: ignore[method-assign]


def at_step(step: int, place: str, act: Callable[[Any], None], rank: int = 0) -> None:
    """Do something once, in an optimiser step of the run, in one of its processes."""
    if int(os.environ.get("RANK", 0)) != rank:
        return
    done = False

    def now(trainer: Any) -> None:
        nonlocal done
        if not done and trainer.state.global_step + 1 >= step and trainer.is_in_train:
            done = True
            act(trainer)

    compute, norm, scheduled = RankerTrainer.compute_loss, GuardedTrainer._get_grad_norm, Trainer._get_learning_rate

    def forward(self: Any, *given: Any, **more: Any) -> Any:
        if place == PLACES[0]:
            now(self)
        return compute(self, *given, **more)

    def before(self: Any, *given: Any, **more: Any) -> Any:
        if place == PLACES[1]:
            now(self)
        return norm(self, *given, **more)

    def after(self: Any) -> Any:  # which the Trainer asks for between the optimiser's step and its own count
        if place == PLACES[2]:
            now(self)
        return scheduled(self)

    RankerTrainer.compute_loss = forward  # type: ignore[method-assign]
    GuardedTrainer._get_grad_norm = before  # type: ignore[method-assign]
    Trainer._get_learning_rate = after


def at_save(save: int, act: Callable[[Any], None], after: Callable[[], None] = lambda: None) -> None:
    """Do something as a checkpoint begins to be written, and after it: the first, the second and so on."""
    write, count = GuardedTrainer._save_checkpoint, 0

    def struck(self: Any, *given: Any) -> None:
        nonlocal count
        count += 1
        if count == save:
            act(self)
        write(self, *given)
        if count == save:
            after()

    GuardedTrainer._save_checkpoint = struck  # type: ignore[method-assign]


def count_changes(folder: str, at: Callable[[int], None]) -> Callable[[], None]:
    """Call `at` with 1, 2, ... before each change to files of a folder by Python, until the result is called."""
    count, counting = 0, True

    def stop() -> None:
        nonlocal counting
        counting = False

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if not counting or event not in CHANGES or not str(given[0]).startswith(folder):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        count += 1
        at(count)

    sys.addaudithook(hook)
    return stop


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_step(wound: Wound) -> None:
    at_step(wound["step"], wound["place"], kill, wound.get("rank", 0))


def _signal_at_step(wound: Wound) -> None:
    at_step(wound["step"], PLACES[0], lambda _: os.kill(os.getpid(), wound["signal"]))


def _kill_at_change(wound: Wound) -> None:
    count_changes(wound["folder"], lambda count: kill() if count == wound["change"] else None)


def _kill_in_save(wound: Wound) -> None:
    """Before one of the changes that the save makes; with `share`, with a file that torch wrote cut to that share."""

    def begin(trainer: Any) -> None:
        count_changes(str(trainer.run_folder), lambda count: kill() if count == wound["change"] else None)

    def cut(trainer: Any) -> None:
        import torch

        save = torch.save

        def partly(value: Any, path: Any, *more: Any) -> None:
            save(value, path, *more)
            os.truncate(path, int(wound["share"] * Path(path).stat().st_size))
            kill()

        torch.save = partly

    at_save(wound["save"], cut if "share" in wound else begin)


def _count(wound: Wound) -> None:
    """How many changes are there to be killed at; written into a file."""

    def told(count: int) -> None:
        os.truncate(file, 0)
        os.pwrite(file, str(count).encode(), 0)

    file = os.open(wound["file"], os.O_WRONLY | os.O_CREAT)
    if "save" in wound:
        stops: list[Callable[[], None]] = []
        begin = lambda trainer: stops.append(count_changes(str(trainer.run_folder), told))  # noqa: E731
        at_save(wound["save"], begin, lambda: stops[0]())
    else:
        count_changes(wound["folder"], told)


def _full(wound: Wound) -> None:
    """No file may be longer than so many bytes, from a save on."""
    most = wound["bytes"]
    at_save(wound["save"], lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))


def _read_only(wound: Wound) -> None:
    """The output folder takes no new names, from a save on; root gives up its right to write everywhere."""

    def shut(trainer: Any) -> None:
        trainer.run_folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.geteuid() == 0:  # capset(2) with no capability left; the version is _LINUX_CAPABILITY_VERSION_3
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            if ctypes.CDLL(None, use_errno=True).capset(header, none):
                raise OSError(ctypes.get_errno(), "capset")

    at_save(wound["save"], shut)


def _little_memory(wound: Wound) -> None:
    """No more address space than the process has by then, of which all but a little is taken."""
    taken: list[bytearray] = []

    def limit(_: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for size in (1 << 24, 1 << 20, wound["bytes"]):
            with contextlib.suppress(MemoryError):
                while True:
                    taken.append(bytearray(size))
        taken.pop()

    at_step(wound["step"], PLACES[0], limit)


def _vanish(wound: Wound) -> None:
    at_step(wound["step"], PLACES[0], lambda _: shutil.rmtree(wound["folder"]))


def _no_number(wound: Wound) -> None:
    """The loss of some optimiser steps is infinite."""
    loss, at = alro.ALROObjective.loss, {"now": False}
    compute = RankerTrainer.compute_loss

    def stepping(self: Any, *given: Any, **more: Any) -> Any:
        at["now"] = self.state.global_step + 1 in wound["steps"] and self.model.training
        return compute(self, *given, **more)

    def broken(self: Any, *given: Any) -> Any:
        terms = loss(self, *given)
        return [term._replace(value=term.value * math.inf) for term in terms] if at["now"] else terms

    RankerTrainer.compute_loss = stepping  # type: ignore[method-assign]
    alro.ALROObjective.loss = broken  # type: ignore[method-assign]


KINDS: dict[str, Callable[[Wound], None]] = {
    "none": lambda _: None,
    "kill at step": _kill_at_step,
    "signal at step": _signal_at_step,
    "kill at change": _kill_at_change,
    "kill in save": _kill_in_save,
    "count": _count,
    "full": _full,
    "read-only": _read_only,
    "little memory": _little_memory,
    "vanish": _vanish,
    "no number": _no_number,
}
