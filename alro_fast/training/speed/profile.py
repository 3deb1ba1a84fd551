"""`--profile N`: N optimiser steps under torch's profiler, as a Chrome trace and as a table of one page.

The trainer marks the parts of a step (`part`), forward; an operation backward belongs to the part whose forward
operation it differentiates (autograd gives both one number). On the CPU a part's time is that of its operations, those
inside others counted once; on CUDA that of its kernels. Idle: no operation (on CUDA no kernel) runs; the host is in
Python, or waits. A validation between the steps is left out.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function
from transformers import AttentionInterface, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import AlroFastError
from ...modeling.attention import ATTENTION
from .flops import Flops

if TYPE_CHECKING:
    from .meter import Meter

WARMUP = 2  # steps before the first profiled one: allocation, and compilation of kernels
FOLDER, TRACE, TABLE = "profile", "trace.json", "table.md"
PARTS = ("trunk", "attention", "head", "loss", "optimiser", "collation")
OTHER, IDLE = "other", "idle"
VALIDATION = "validation"  # no part of a step: neither its operations nor its seconds are in the table
OPERATIONS = 12  # lines of the second table
_MARK = "alro_fast part: "
_NAMED = {"alro_fast::head": "head", "alro_fast_head": "head", "Optimizer.": "optimiser"}  # found in operations' names
_BACKWARD = "autograd::engine::evaluate_function: "


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """Around what belongs to one of PARTS, or to VALIDATION; costs a microsecond where nobody profiles."""
    return record_function(_MARK + name)


class Profiler(TrainerCallback):
    """Profiles the optimiser steps after the first WARMUP, each from the fetching of its batches on.

    Args:
        meter: that of the Trainer.
        folder: of the run; the files go to FOLDER in it.
        steps: how many to profile.
    """

    def __init__(self, meter: Meter, folder: Path, steps: int) -> None:
        self.meter, self.folder, self.steps = meter, folder / FOLDER, steps
        self._seen = 0
        self._stack = contextlib.ExitStack()

    def check(self, steps: int) -> None:
        """AlroFastError when a run of so many optimiser steps is too short."""
        if steps < WARMUP + self.steps:
            raise AlroFastError(
                f"--profile {self.steps} needs {WARMUP + self.steps} optimiser steps, the first {WARMUP} to warm up; "
                f"this run has {steps}: lower it, or train longer"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen += 1
        if self._seen == WARMUP:
            self._start()
        elif self._seen == WARMUP + self.steps:
            self._stop(state.global_step)

    def _start(self) -> None:
        self._stack.enter_context(_attention_marked())
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = self._stack.enter_context(
            torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
        )
        self._flops, self._started = self.meter.flops(), time.perf_counter()

    def _stop(self, last: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall = time.perf_counter() - self._started
        self._stack.close()
        flops = self.meter.flops()
        done = None if flops is None or self._flops is None else flops - self._flops
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / TRACE))
        table = Table.of(self._profile.events(), wall, self.steps, done, self.meter)
        (self.folder / TABLE).write_text(table.markdown(last), encoding="utf-8")
        self.meter.pause += time.perf_counter() - self._started - wall


class Operation(NamedTuple):
    """All calls of one kind in one part."""

    name: str
    part: str
    calls: int
    seconds: float


class Table(NamedTuple):
    """Where the time of `steps` steps went; seconds and FLOPs of all of them together."""

    seconds: dict[str, float]  # of PARTS, OTHER and IDLE; they add up to `wall`
    operations: list[Operation]  # most time first
    wall: float
    steps: int
    flops: Flops | None
    peak: float
    where: str

    @classmethod
    def of(cls, events: Sequence[Any], wall: float, steps: int, flops: Flops | None, meter: Meter) -> Table:
        """events: of `torch.profiler.profile`."""
        cuda, parts = next(meter.model.parameters()).is_cuda, _Parts(events)
        outside = [event.time_range for event in events if event.name == _MARK + VALIDATION]
        wall -= sum(spent.elapsed_us() for spent in outside) / 1e6
        thread = next((event.thread for event in events if event.name.startswith(_MARK)), 0)
        seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.name.startswith(_MARK) or not (cuda or event.thread == thread):
                continue
            if any(spent.start <= event.time_range.start <= spent.end for spent in outside):
                continue
            spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            if cuda and event.device_type != torch.autograd.DeviceType.CPU:
                continue  # kernels are counted with the operations that launched them
            name = parts.of(event)
            seconds[name] += spent
            kinds[event.name, name].append(spent)
        seconds[IDLE] = max(wall - sum(seconds.values()), 0.0)
        operations = [Operation(name, of, len(each), sum(each)) for (name, of), each in kinds.items()]
        operations.sort(key=lambda one: -one.seconds)
        device = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
        where = f"{device}, {str(meter.dtype).removeprefix('torch.')}"
        return cls(seconds, operations[:OPERATIONS], wall, steps, flops, meter.peak(), where)

    def markdown(self, last: int) -> str:
        """One page; last: the number of the last step."""
        flops = {} if self.flops is None else self.flops._asdict()
        lines = [
            f"# Steps {last - self.steps + 1} to {last}",
            "",
            f"{1e3 * self.wall / self.steps:,.1f} ms a step while profiled ({self.where}; large matrix products reach "
            f"{self.peak / 1e9:,.0f} GFLOP/s).",
            "",
            "| part | ms a step | share | GFLOP a step | of the peak |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, seconds in self.seconds.items():
            lines.append(self._line(name, seconds, flops.get(name)))
        lines += [
            self._line("all", self.wall, None if self.flops is None else self.flops.total),
            "",
            f"Other: clipping, accumulated gradients, the Trainer. Idle: nothing runs but Python. {TRACE} beside this "
            "file opens in ui.perfetto.dev or chrome://tracing.",
            "",
            "| operation | part | calls a step | ms a step | share |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for one in self.operations:
            each = 1e3 * one.seconds / self.steps
            share = 100 * one.seconds / self.wall
            name = one.name.removeprefix(_BACKWARD)
            lines.append(f"| `{name}` | {one.part} | {one.calls / self.steps:,.0f} | {each:,.2f} | {share:.1f} % |")
        return "\n".join(lines) + "\n"

    def _line(self, name: str, seconds: float, flops: float | None) -> str:
        counted = " | "
        if flops is not None:
            reached = f"{flops / seconds / self.peak:.2f}" if seconds else ""
            counted = f"{flops / self.steps / 1e9:,.3g} | {reached}"
        return f"| {name} | {1e3 * seconds / self.steps:,.1f} | {100 * seconds / self.wall:.1f} % | {counted} |"


class _Parts:
    """Which part an event belongs to."""

    def __init__(self, events: Sequence[Any]) -> None:
        self.known: dict[int, str] = {}
        self.forward = {
            event.sequence_nr: event
            for event in events
            if event.sequence_nr >= 0 and not event.name.startswith("autograd::") and not _within_backward(event)
        }  # of several with one number the last is the operation itself, those before it have no gradient

    def of(self, event: Any) -> str:
        found = self.known.get(id(event))
        if found is None:
            found = self.known[id(event)] = self._found(event)
        return found

    def _found(self, event: Any) -> str:
        if event.name.startswith(_MARK):
            return str(event.name).removeprefix(_MARK)
        for piece, name in _NAMED.items():
            if piece in event.name:
                return name
        if event.name.startswith(_BACKWARD) and event.sequence_nr in self.forward:
            return self.of(self.forward[event.sequence_nr])
        return OTHER if event.cpu_parent is None else self.of(event.cpu_parent)


def _within_backward(event: Any) -> bool:
    return event.cpu_parent is not None and event.cpu_parent.name.startswith(_BACKWARD)


@contextlib.contextmanager
def _attention_marked() -> Any:
    """While this lasts, tree attention is a part of its own."""
    plain = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def marked(*args: Any, **kwargs: Any) -> Any:
        with part("attention"):
            return plain(*args, **kwargs)

    AttentionInterface.register(ATTENTION, marked)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, plain)
