"""SIGTERM and SIGINT while a run trains: the step is finished, a checkpoint saved, and the run ends with 143 or 130.

With several processes the signals that came are summed over all of them with the counts of the next step's batches, so
that all stop after the same step; nothing waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Which signal came to this process (`heard`), and which one all processes stop for (`agreed`); None before."""

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self, say: bool) -> Iterator[None]:
        """Note signals instead of dying of them; a second one of a kind ends the process at once, as ever.

        Signals that were ignored stay so. say: tell on stderr, once.
        """
        if threading.current_thread() is not threading.main_thread():  # Python tells the main thread alone
            yield
            return
        owner = os.getpid()

        def hear(number: int, _: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)
            if os.getpid() != owner:  # a loader's process, which goes on until the run has no more use for it
                return
            self.heard = signal.Signals(number)
            if say:  # not with print, which may be at work right now
                os.write(2, f"{self.heard.name}: a checkpoint is saved after this step; again: ends at once\n".encode())

        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    def counts(self) -> list[float]:
        """What is summed over all processes: 1 for the signal that came to this one."""
        return [float(self.heard is number) for number in SIGNALS]

    def agree(self, counts: list[float]) -> None:
        """Take the sums of all processes."""
        for number, count in zip(SIGNALS, counts, strict=True):
            if count and self.agreed is None:
                self.agreed = number

    def agree_now(self, accelerator: Any) -> None:
        """Ask all processes, which wait for each other."""
        counts = torch.tensor(self.counts(), device=accelerator.device)
        self.agree(accelerator.reduce(counts, "sum").tolist())
