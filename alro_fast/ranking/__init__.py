"""From a tuned model to ordered lists. `Ranker` is imported on first use: reading JSON lists needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ranker import Ranker

__all__ = ["Ranker"]


def __getattr__(name: str) -> Any:
    if name == "Ranker":
        from .ranker import Ranker

        return Ranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
