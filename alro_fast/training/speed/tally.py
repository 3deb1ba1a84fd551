"""What a log line of training says beside the Trainer's loss: of all processes, since the line before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...objectives.base import Batch
from .meter import Meter

COUNTED = ("lists", "unique_tokens", "unshared_tokens", "padded_tokens", "head_rows")


class Tally:
    """Adds up a process's batches; at a log line, the sums of all processes.

    Args:
        meter: that of the run's forward passes.
        processes: how many there are.
        total: a tensor's sum over processes, called in every process at the same log lines, once each.
    """

    def __init__(self, meter: Meter, processes: int, total: Callable[[Tensor], Tensor]) -> None:
        self.meter, self.processes, self.total = meter, processes, total
        self._counted = dict.fromkeys(COUNTED, 0)
        self.begin(0)

    def begin(self, step: int) -> None:
        """The next line is about what comes after this optimiser step, from now on."""
        self._noted_step, self._since = step, time.perf_counter()
        self.meter.pause = 0.0

    def note(self, batch: Batch) -> None:
        """A batch of this process."""
        packed = batch.packed
        counts = (
            batch.lists,
            packed.unique_tokens,
            packed.unshared_tokens,
            packed.padded_tokens,
            len(packed.label_table),
        )
        for name, count in zip(COUNTED, counts, strict=True):
            self._counted[name] += count

    def line(self, step: int, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Parts of the loss as means over steps, throughput, sharing and utilisation, up to this optimiser step; {}
        where there was none since the last line. parts: this process's sums of each, [] on the device."""
        steps = step - self._noted_step
        if not steps:
            return {}
        seconds = self._lap()
        names = sorted(parts)
        *values, used = self._summed([*(parts[name] for name in names), *self._counted.values()], whole=False)
        line = {name: value / steps for name, value in zip(names, values)}
        lists, unique, unshared, padded, head_rows = values[len(names) :]
        line["lists_per_second"] = round(lists / seconds, 2)
        line["unique_tokens_per_second"] = round(unique / seconds, 1)
        line["sharing_ratio"] = round(unshared / unique, 3)
        line["padding_ratio"] = round(padded / unshared, 3)
        line["head_row_share"] = round(head_rows / unique, 4)
        self._counted = dict.fromkeys(COUNTED, 0)
        self._noted_step = step
        return line | self._utilisation(used)

    def end(self, step: int) -> dict[str, float]:
        """Utilisation of the whole run."""
        if step > self._noted_step:  # steps after the last line
            self._lap()
        return self._utilisation(self._summed([], whole=True)[0])

    def _summed(self, values: Sequence[Tensor | int], whole: bool) -> list[float]:
        """Sums over processes, of the values and of their utilisation."""
        used = self.meter.utilisation(whole=whole)
        device = next(self.meter.model.parameters()).device if self.processes > 1 else "cpu"
        each = [torch.as_tensor(value, device=device).double() for value in values]
        each.append(torch.tensor(math.nan if used is None else used, dtype=torch.float64, device=device))
        sums: list[float] = self.total(torch.stack(each)).tolist()
        return sums

    def _utilisation(self, summed: float) -> dict[str, float]:
        return {} if math.isnan(summed) else {"utilisation": round(summed / self.processes, 3)}

    def _lap(self) -> float:
        """Seconds of the steps since the last lap."""
        seconds = time.perf_counter() - self._since - self.meter.pause
        self.meter.lap(seconds)
        self.meter.pause, self._since = 0.0, time.perf_counter()
        return seconds
