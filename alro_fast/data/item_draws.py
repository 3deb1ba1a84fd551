"""Drawing items a user has not rated: what `prepare`, preference training and the first stage have in common."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class ItemDraws:
    """The distribution over items with training ratings: "uniform", or "popularity", in proportion to their number.

    Attributes:
        eligible: int64, those items.
    """

    def __init__(self, train_count: np.ndarray, by: str) -> None:
        self.eligible = np.flatnonzero(train_count)
        weights = train_count[self.eligible] if by == "popularity" else np.ones(len(self.eligible))
        self._cumulative = np.cumsum(weights, dtype=np.float64)

    def at(self, shares: np.ndarray) -> np.ndarray:
        """Items at these shares in [0, 1) of the distribution, of any shape."""
        picks = np.searchsorted(self._cumulative, shares * self._cumulative[-1], side="right")
        return self.eligible[np.minimum(picks, len(self.eligible) - 1)]


def first_new(proposals: Iterable[int], count: int, taken: set[int]) -> list[int]:
    """The first `count` proposals that are not in `taken` (nor earlier among them); fewer where the proposals end.

    Adds them to `taken`, and asks for no proposal more than it needs.
    """
    drawn: list[int] = []
    if count > 0:
        for item in proposals:
            if item not in taken:
                taken.add(item)
                drawn.append(item)
                if len(drawn) == count:
                    break
    return drawn
