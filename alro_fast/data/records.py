"""What a ranking list is: plain records, importable without polars or torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Item(NamedTuple):
    """One catalogue entry. `index` is its row in items.parquet; `title` and `category` are untrusted text."""

    index: int
    item_id: str
    title: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class RankingList:
    """One user's history and candidates. `ratings` are labels, never shown in a prompt; NaN: an unrated candidate."""

    list_id: str
    user_id: str
    history: tuple[Item, ...]  # oldest first
    history_ratings: tuple[float, ...]
    candidates: tuple[Item, ...]  # in presented order
    ratings: tuple[float, ...]

    @property
    def all_equal(self) -> bool:
        """True when the rated candidates carry one single rating: nothing to rank, reported apart."""
        return len({rating for rating in self.ratings if not math.isnan(rating)}) <= 1


def target_ranks(ratings: Sequence[float], item_ids: Sequence[str]) -> list[int]:
    """Target slot of each candidate, 1 = best: higher rating first, unrated last, ties by item id.

    The tie key does not depend on the presented order, so a list and its re-orderings share one target
    (methods.md 1.4: otherwise the target itself teaches position bias).
    """

    def key(i: int) -> tuple[bool, float, str]:
        unrated = math.isnan(ratings[i])
        return unrated, 0.0 if unrated else -ratings[i], item_ids[i]

    ranks = [0] * len(ratings)
    for rank, i in enumerate(sorted(range(len(ratings)), key=key), start=1):
        ranks[i] = rank
    return ranks
