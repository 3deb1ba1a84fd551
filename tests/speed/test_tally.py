"""Log lines by hand: sums of all processes, means over the steps since the last line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alro_fast.training.speed import tally as module
from alro_fast.training.speed.tally import Tally


class Meter:
    """As `speed.meter` has it, with a utilisation that is given."""

    def __init__(self, utilisation: float | None) -> None:
        self.model, self.pause, self.laps, self.given = nn.Linear(1, 1), 0.0, [], utilisation

    def lap(self, seconds: float) -> None:
        self.laps.append(seconds)

    def utilisation(self, whole: bool = False) -> float | None:
        return self.given


def batch(lists: int):
    packed = SimpleNamespace(
        unique_tokens=100, unshared_tokens=150, padded_tokens=300, label_table=torch.zeros(10, 1, dtype=torch.long)
    )
    return SimpleNamespace(lists=lists, packed=packed)


@pytest.mark.parametrize("utilisation", [0.4, None])
def test_a_line_is_of_all_processes_and_of_the_steps_since_the_last(monkeypatch, utilisation):
    """The other process has trained 5 lists in a batch like those here, at half the utilisation."""
    clock = iter([0.0, 4.0, 4.0, 5.0, 5.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    theirs = {"sft": 0.6, "alro": 0.0, "lists": 5, "rows": 100, "unshared": 150, "padded": 300, "heads": 10}

    def total(values):
        used = float("nan") if utilisation is None else 0.2
        others = [theirs["alro"], theirs["sft"], *(theirs[k] for k in ("lists", "rows", "unshared", "padded", "heads"))]
        return values + torch.tensor([*others, used][-len(values) :], dtype=torch.float64)

    tally = Tally(meter := Meter(utilisation), 2, total)
    for lists in (2, 1):
        tally.note(batch(lists))
    line = tally.line(2, {"sft": torch.tensor(1.4), "alro": torch.tensor(3.0)})
    said = {} if utilisation is None else {"utilisation": 0.3}
    assert line == pytest.approx(
        {
            "sft": 1.0, "alro": 1.5, "lists_per_second": 2.0, "unique_tokens_per_second": 75.0, "sharing_ratio": 1.5,
            "padding_ratio": 2.0, "head_row_share": 0.1, **said,
        }
    )  # fmt: skip
    assert tally.line(2, {}) == {}
    assert tally.end(3) == said
    assert meter.laps == [4.0, 1.0]
