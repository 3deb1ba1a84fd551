"""Steps whose loss or gradient is no number: they change nothing, are counted, and end a run with too many in a row.

The norm of the gradient, which the Trainer takes anyway, tells: it is the same in all processes, and a loss that is no
number makes it none. Optimisers that are fused on CUDA are told on the device, and the host looks at some steps at once
(`LOOK`); all others are told by the host, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...modeling.sharded import held

LOOK = 16  # steps
MOST_NAMED = 5  # lists


@dataclass
class Batch:
    """What was trained in one forward and backward pass: its lists, and its loss, [] on the device."""

    lists: Sequence[str]
    loss: Tensor


@dataclass
class Step:
    """An optimiser step that has yet to be looked at. `bad` and the sums of `parts`: [] on the device."""

    number: int
    bad: Tensor
    parts: Mapping[str, Tensor]
    batches: list[Batch]


@dataclass
class Row:
    """Steps without a number, one after the other: the first and the last, and what of them was none."""

    first: int
    last: int
    parts: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)

    def add(self, step: Step) -> None:
        self.last = step.number
        self.parts = list(dict.fromkeys([*self.parts, *(n for n, value in step.parts.items() if not value.isfinite())]))
        lists = (name for batch in step.batches if not batch.loss.isfinite() for name in batch.lists)
        self.lists = list(dict.fromkeys([*self.lists, *lists]))

    def joined(self, rows: Sequence[Row]) -> Row:
        """The same steps with what each process found of them."""
        parts, lists = ([name for row in rows for name in getattr(row, key)] for key in ("parts", "lists"))
        return Row(self.first, self.last, list(dict.fromkeys(parts)), list(dict.fromkeys(lists)))

    def described(self) -> str:
        """Which lists, and which part of the loss."""
        if not self.parts and not self.lists:
            return "the loss was finite, its gradient was not"
        more = f" and {len(self.lists) - MOST_NAMED} more" if len(self.lists) > MOST_NAMED else ""
        return f"not finite: {' and '.join(self.parts) or 'loss'}, on lists {', '.join(self.lists[:MOST_NAMED])}{more}"


class FiniteSteps:
    """Looks at every step of a run.

    skipped: steps left out so far. since_log, of_them_bad: steps since the last log line. row: the steps without a
    number up to now, None after a good one. names: of the loss's parts.
    """

    def __init__(self) -> None:
        self.skipped = self.since_log = self.of_them_bad = 0
        self.row: Row | None = None
        self.names: set[str] = set()
        self.batches: list[Batch] = []
        self.pending: list[Step] = []

    def judge(self, number: int, bad: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Note an optimiser step of the batches seen since the last one."""
        self.names.update(parts)
        self.pending.append(Step(number, bad.detach(), dict(parts), self.batches))
        self.batches = []

    def look(self) -> None:
        """Count what was noted; the one place where the host waits for the device."""
        if not self.pending:
            return
        flags = torch.stack([step.bad for step in self.pending]).tolist()
        for step, bad in zip(self.pending, flags, strict=True):
            self.since_log += 1
            if not bad:
                self.row = None
                continue
            self.skipped, self.of_them_bad = self.skipped + 1, self.of_them_bad + 1
            self.row = self.row or Row(step.number, step.number)
            self.row.add(step)
        self.pending = []

    def logged(self, logs: dict[str, float]) -> None:
        """Make the sums of a log line means over the steps that counted, and say how many steps were left out."""
        counted = self.since_log - self.of_them_bad
        for name in {"loss", *self.names} & logs.keys() if self.of_them_bad else ():
            if counted:
                logs[name] *= self.since_log / counted
            else:
                logs.pop(name)
        if not torch.tensor(logs.get("grad_norm", 0.0)).isfinite():
            logs.pop("grad_norm")
        if self.skipped:
            logs["skipped_steps"] = self.skipped
        self.since_log = self.of_them_bad = 0


def felt_by_all(loss: Tensor) -> Tensor:
    """The loss; one that is no number gets a gradient that is none either, which every process sees in the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def told_on_device(optimizer: Any, device: torch.device) -> bool:
    """Whether an optimiser's own kernels leave a step out where `found_inf` says so (fused ones on CUDA)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = (p for group in inner.param_groups for p in group["params"])
    plain = all(type(p.data) is Tensor for p in weights)  # no DTensor
    return device.type == "cuda" and plain and bool(getattr(inner, "_step_supports_amp_scaling", False))


def withhold(optimizer: Any, bad: Tensor, on_device: bool) -> None:
    """Keep the optimiser from the step at hand where `bad` ([], bool): weights, moments and counts stay."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if on_device:
        inner.found_inf = bad.float()
    elif bad:
        for group in inner.param_groups:
            for weight in group["params"]:
                weight.grad = None


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every trained weight is a number; of weights in shards, those that this process holds."""
    with torch.no_grad():
        return all(bool(held(p).isfinite().all()) for p in model.parameters() if p.requires_grad)
