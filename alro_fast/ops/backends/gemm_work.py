"""Counts what the Triton backend multiplies: products between rows and vocabulary columns, by kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

if TYPE_CHECKING:
    from ...kernels.expected import ExpectedConfig


class GemmWork:
    """Products between rows and vocabulary columns, by kind; 1 unit per row = one product with the whole vocabulary."""

    def __init__(self) -> None:
        self._products: dict[str, list[Any]] = {}  # int, or a tensor of one

    def products(self) -> dict[str, int]:
        """Row x column products per kind; reads counters from the device."""
        return {kind: sum(int(part) for part in parts) for kind, parts in self._products.items()}

    def units(self, rows: int, vocab_size: int) -> float:
        """Products with the whole vocabulary per row."""
        return sum(self.products().values()) / (rows * vocab_size)


_work: GemmWork | None = None


@contextlib.contextmanager
def count_gemm_work() -> Iterator[GemmWork]:
    """Counts the vocabulary products of this backend's calls inside the block."""
    global _work
    outer, _work = _work, GemmWork()
    try:
        yield _work
    finally:
        _work = outer


def count(kind: str, rows: int | Tensor | tuple[int, Tensor, Tensor], columns: int) -> None:
    """Adds `rows` x `columns` products of a kind; rows (n, first, second): every pair's two rows, and those in no pair.

    first, second: int64 [P] on the device, negative where there is no pair. Free where nobody counts.
    """
    if _work is None:
        return
    if isinstance(rows, tuple):
        total, first, second = rows
        held = (first >= 0) & (second >= 0)
        alone = torch.ones(total, dtype=torch.bool, device=first.device)
        alone[first[held]] = False
        alone[second[held]] = False
        rows = alone.sum() + 2 * held.sum()
    _work._products.setdefault(kind, []).append(rows * columns)


def count_kept(kind: str, kept_count: Tensor, rows: int, columns: int, config: ExpectedConfig) -> None:
    """Adds the products of the tiles each block of rows kept, clipped at the edges of rows and vocabulary."""
    if _work is None:
        return
    block_rows = torch.full_like(kept_count, config.block_m)
    block_rows[-1] = rows - (len(kept_count) - 1) * config.block_m
    tiles = triton.cdiv(columns, config.block_v)
    share = (kept_count * block_rows).sum().double() / tiles
    _work._products.setdefault(kind, []).append(share * columns)
