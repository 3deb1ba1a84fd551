"""Utilisation of a run: the FLOPs its steps need, over what the machine's matrix product would do in the same time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import torch
from torch import nn

from ...modeling.packing import PackedBatch
from .flops import Flops, Observer, Prices, Work, trunk_config
from .gemm_peak import gemm_peak

logger = logging.getLogger(__name__)


class Meter:
    """Adds up the work of forward passes; the first one with gradients shows what a unit of it costs.

    Args:
        model: a causal LM on tree attention, with or without PEFT.
        dtype: that of its products, under autocast another than the weights'.

    Attributes:
        pause: seconds since the last lap that were not of steps.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model, self.config = model, trunk_config(model)
        self.dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.trained, self.read = Work(), Work()  # with gradients, and without
        self._batch = Work()
        self._observer: Observer | None = None
        self._laps: list[tuple[float, float]] = []  # FLOPs, seconds
        self._counted = self.pause = 0.0
        self._counts = True

    def take(self, packed: PackedBatch) -> None:
        """The batch, on the CPU, that the next forward passes run over."""
        self._batch = Work.of(packed, self.config)

    @contextlib.contextmanager
    def forward(self, packed: PackedBatch) -> Iterator[None]:
        """Around a forward pass."""
        gradients = torch.is_grad_enabled()
        if self._observer is not None:
            self._observer.end()
        if gradients:
            self.trained += self._batch
        elif self._counts:
            self.read += self._batch
        if gradients and self._observer is None:
            self._observer = Observer(self.model)
            with self._observer.watching(packed):
                yield
        else:
            yield

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is of no step, such as a validation: neither its forward passes nor its seconds count."""
        started, self._counts = time.perf_counter(), False
        try:
            yield
        finally:
            self._counts = True
            self.pause += time.perf_counter() - started

    def flops(self) -> Flops | None:
        """Of all passes so far, those backward as well; None before the first step, and for a model whose layers are
        not all linear (mixtures of experts)."""
        if self._observer is None or self._observer.unknown is not None:
            return None
        prices: tuple[Prices, Prices] = self._observer.prices(True), self._observer.prices(False)
        return prices[0].of(self.trained) + prices[1].of(self.read)

    def lap(self, seconds: float) -> None:
        """So many seconds went by, in which everything was done that was not there at the lap before."""
        done = self.flops()
        if done is not None:
            self._laps.append((done.total - self._counted, seconds))
            self._counted = done.total

    def utilisation(self, whole: bool = False) -> float | None:
        """FLOPs over seconds and peak, of the last lap or of all; None where FLOPs are not known."""
        flops, seconds = map(sum, zip(*(self._laps if whole else self._laps[-1:]))) if self._laps else (0.0, 0.0)
        return flops / seconds / self.peak() if seconds else None

    def peak(self) -> float:
        """FLOP/s of large matrix products on the model's device."""
        return gemm_peak(next(self.model.parameters()).device, self.dtype)
