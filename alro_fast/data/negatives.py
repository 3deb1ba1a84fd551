"""One positive and k negatives out of a ranking list: what preference losses compare.

The positive is the list's first candidate by rating. Negatives are items the user is not known to have seen (from the
catalogue), or the list's own lower-rated and unrated candidates; drawn uniformly, by popularity, or the hardest for the
model as it stands. The outcome is again a ranking list, of 1 + k candidates, so that it is shown like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AlroFastError
from . import seeds
from .item_draws import ItemDraws, first_new
from .records import Item, RankingList, target_ranks

if TYPE_CHECKING:
    from .lists import PreparedData

DRAWS = ("uniform", "popularity", "hardest")
SOURCES = ("catalogue", "candidates")
NUM_NEGATIVES = 5  # k, where nobody says
POOL = 4  # `hardest` looks among this many times k catalogue items
ROUNDS = 32  # of 2 k + 8 proposals each, before what is left is listed


class Negatives:
    """Draws the negatives of every list; a draw depends on (seed, epoch, list_id) and, for `hardest`, on `mined`.

    Args:
        items: the catalogue, items[i].index == i.
        train_count: [items] ratings behind each; items without any are never drawn.
        lists: all lists of all splits; what they show a user has seen.
        seen: user -> indices of all items the user has rated; None: what the lists show is all that is known.
        count: k. From `candidates`, a list with fewer gives what it has.
        by, source: of DRAWS and SOURCES.

    Raises:
        AlroFastError: an unknown `by` or `source`, or a catalogue too small for k.
    """

    def __init__(
        self,
        items: Sequence[Item],
        train_count: np.ndarray,
        lists: Iterable[RankingList],
        *,
        seen: Mapping[str, np.ndarray] | None = None,
        count: int,
        by: str = "uniform",
        source: str = "catalogue",
        seed: int = 0,
    ) -> None:
        if by not in DRAWS:
            raise AlroFastError(f"--negatives {by!r}; expected one of {', '.join(DRAWS)}")
        if source not in SOURCES:
            raise AlroFastError(f"--negatives_from {source!r}; expected one of {', '.join(SOURCES)}")
        if count < 1:
            raise AlroFastError(f"--num_negatives {count} is too few; a preference needs at least 1")
        self.items, self.count, self.by, self.source, self.seed = items, count, by, source, seed
        self.train_count = np.asarray(train_count, dtype=np.float64)
        self.draws = ItemDraws(self.train_count, by)
        self.seen: dict[str, set[int]] = {}
        for one in lists:
            if one.user_id not in self.seen:
                self.seen[one.user_id] = set(() if seen is None else seen.get(one.user_id, np.empty(0)).tolist())
            self.seen[one.user_id].update(item.index for item in (*one.history, *one.candidates))
        self.mined: dict[str, tuple[Item, ...]] = {}  # list_id -> its hardest negatives, set by whoever has the model
        eligible = set(self.draws.eligible.tolist())
        most = max((len(mine & eligible) for mine in self.seen.values()), default=0)
        if source == "catalogue" and len(eligible) - most < count * (POOL if by == "hardest" else 1):
            raise AlroFastError(
                f"--num_negatives {count} is too many: a user has seen {most:,} of the {len(eligible):,} rated "
                "items; lower it, or take --negatives_from candidates"
            )

    @classmethod
    def of(cls, prepared: PreparedData, **options: Any) -> Negatives:
        """Of a prepared folder; says so where it does not tell what users have rated beyond its lists."""
        lists = (one for name in ("train", "valid", "test") for one in prepared.lists(name))
        seen = prepared.seen()
        if seen is None and options.get("source") != "candidates":
            print(
                f"{prepared.path} has no seen.parquet: of what users have rated only its lists are known, and other "
                "rated items may be drawn as negatives; prepare the data again to leave them out"
            )
        return cls(prepared.items, prepared.train_count, lists, seen=seen, **options)

    def usable(self, one: RankingList) -> bool:
        """False where no candidate is rated, or nothing ranks below the positive."""
        if all(math.isnan(rating) for rating in one.ratings):
            return False
        return self.source == "catalogue" or bool(self._below(one))

    def contest(self, one: RankingList, epoch: int) -> RankingList:
        """The positive and its k negatives as a list in a seeded order; only the positive carries a rating above all.

        Of `hardest`, a list nothing was mined for has the negatives of `uniform`.

        Ratings are kept for the list's own candidates and NaN for items from the catalogue.
        """
        if one.list_id in self.mined:
            negatives = self.mined[one.list_id]
        elif self.source == "candidates":
            negatives = self._from_candidates(one, self._generator(one, epoch), self.count)
        else:
            negatives = self._from_catalogue(one, self._generator(one, epoch), self.count)
        return self.shown(one, negatives, epoch)

    def pool(self, one: RankingList, epoch: int) -> tuple[Item, ...]:
        """The items `hardest` chooses from, in an order drawn anew every epoch."""
        generator = self._generator(one, epoch)
        if self.source == "candidates":
            return self._from_candidates(one, generator, len(one.candidates))
        return self._from_catalogue(one, generator, POOL * self.count)

    def shown(self, one: RankingList, negatives: Sequence[Item], epoch: int) -> RankingList:
        """The positive and these negatives in the order in which a prompt shows them."""
        best = positive(one)
        rating_of = {item.index: rating for item, rating in zip(one.candidates, one.ratings)}
        candidates = [one.candidates[best], *negatives]
        order = self._generator(one, epoch, "order").permutation(len(candidates)).tolist()
        candidates = [candidates[i] for i in order]
        ratings = tuple(rating_of.get(item.index, math.nan) for item in candidates)
        place_of = {item.index: place for place, item in enumerate(one.candidates)}
        if all(item.index in place_of for item in candidates):
            return one.select(place_of[item.index] for item in candidates)
        # Hints and signals are unknown of items from the catalogue: shown of the others, they would name the positive.
        signals = tuple(signal._replace(candidates=()) for signal in one.signals)
        return replace(one, candidates=tuple(candidates), ratings=ratings, hints=(), signals=signals)

    def _below(self, one: RankingList) -> list[int]:
        best = positive(one)
        return [
            i
            for i, rating in enumerate(one.ratings)
            if (math.isnan(rating) or rating < one.ratings[best])
            and one.candidates[i].title != one.candidates[best].title
        ]

    def _from_candidates(self, one: RankingList, generator: np.random.Generator, count: int) -> tuple[Item, ...]:
        below = self._below(one)
        weights = None
        if self.by == "popularity":
            weights = np.array([self.train_count[one.candidates[i].index] + 1e-9 for i in below])
            weights /= weights.sum()
        drawn = generator.choice(len(below), min(count, len(below)), replace=False, p=weights)
        return tuple(one.candidates[below[i]] for i in drawn)

    def _from_catalogue(self, one: RankingList, generator: np.random.Generator, count: int) -> tuple[Item, ...]:
        best = one.candidates[positive(one)]
        taken = self.seen.get(one.user_id, set()) | {item.index for item in (*one.history, *one.candidates)}

        def proposals() -> Iterator[int]:
            for _ in range(ROUNDS):
                for index in self.draws.at(generator.random(2 * count + 8)).tolist():
                    if self.items[index].title != best.title:
                        yield index

        drawn = first_new(proposals(), count, taken)
        missing = count - len(drawn)
        if missing:
            eligible = self.draws.eligible.tolist()
            left = [i for i in eligible if i not in taken and self.items[i].title != best.title]
            if len(left) < missing:
                raise AlroFastError(
                    f"list {one.list_id}: its user has seen all but {len(left) + len(drawn)} rated items, fewer than "
                    f"--num_negatives {self.count} needs; lower it"
                )
            drawn += [left[i] for i in generator.choice(len(left), missing, replace=False)]
        return tuple(self.items[index] for index in drawn)

    def _generator(self, one: RankingList, epoch: int, purpose: str = "draw") -> np.random.Generator:
        return seeds.generator(self.seed, epoch, name=f"{purpose}/{one.list_id}")


def positive(one: RankingList) -> int:
    """The candidate a list prefers: the highest rating, ties by item id as in `target_ranks`."""
    return target_ranks(one.ratings, [item.item_id for item in one.candidates]).index(1)
