"""What a ranking list is: plain records, importable without polars or torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

LARGEST_RATING = 100.0  # gains are 2^rating - 1, in float32


class Item(NamedTuple):
    """One catalogue entry. `index` is its row in items.parquet; `title` and `category` are untrusted text."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    item_id: str
    title: str
    category: str = ""


class Signal(NamedTuple):
    """One number beside every item shown, known without the list's own ratings; NaN: unknown for an item.

    name: of signal_table.SIGNALS. history, candidates: aligned with the list's; empty: not known of them at all.
    """

    name: str
    history: tuple[float, ...]
    candidates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RankingList:
    """One user's history and candidates, in words: what prompts are written from.

    `losses.RankingLists` are the tensors of a batch, `data.lists.Lists` a split of these records on disk. `ratings` are
    labels, never shown in a prompt; NaN: an unrated candidate.

    `hints`: a predicted rating of each candidate, made without the candidate's own rating or interaction, on the
    data's rating scale; NaN: unknown; empty: no hints at all. It is the signal named "hint"; `signals` are the others.
    """

    list_id: str
    user_id: str
    history: tuple[Item, ...]  # oldest first
    history_ratings: tuple[float, ...]
    candidates: tuple[Item, ...]  # in presented order
    ratings: tuple[float, ...]
    hints: tuple[float, ...] = ()
    signals: tuple[Signal, ...] = ()

    def signal(self, name: str) -> Signal:
        """The signal of that name, without values where the list has none."""
        if name == "hint":
            return Signal(name, (), self.hints)
        return next((one for one in self.signals if one.name == name), Signal(name, (), ()))

    def select(self, order: Iterable[int]) -> RankingList:
        """The list with candidates order[0], order[1], ... alone, their ratings, hints and signals with them."""
        order = list(order)
        return replace(
            self,
            candidates=tuple(self.candidates[i] for i in order),
            ratings=tuple(self.ratings[i] for i in order),
            hints=tuple(self.hints[i] for i in order) if self.hints else (),
            signals=tuple(
                one._replace(candidates=tuple(one.candidates[i] for i in order)) if one.candidates else one
                for one in self.signals
            ),
        )

    @property
    def all_equal(self) -> bool:
        """True when the rated candidates carry one single rating: nothing to rank, reported apart."""
        return len({rating for rating in self.ratings if not math.isnan(rating)}) <= 1


def target_ranks(ratings: Sequence[float], item_ids: Sequence[str]) -> list[int]:
    """Target slot of each candidate, 1 = best: higher rating first, unrated last, ties by item id.

    The tie key does not depend on the presented order, so a list and its re-orderings share one target
    (docs/methods.md 1.1: otherwise the target itself teaches position bias).
    """

    def key(i: int) -> tuple[bool, float, str]:
        unrated = math.isnan(ratings[i])
        return unrated, 0.0 if unrated else -ratings[i], item_ids[i]

    ranks = [0] * len(ratings)
    for rank, i in enumerate(sorted(range(len(ratings)), key=key), start=1):
        ranks[i] = rank
    return ranks
