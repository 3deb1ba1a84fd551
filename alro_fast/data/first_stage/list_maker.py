"""Ratings, candidates and hints put together into ranking lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import AlroFastError
from .. import seeds
from ..item_draws import first_new
from ..records import Item, RankingList, Signal
from ..sources.interactions import Interactions
from .hints import FoldedModels, FoldedRetrievers, places
from .likes import LikeSplit
from .retrieval import Retrieved

if TYPE_CHECKING:
    from .options import HintOptions

TOP_SHARE = 0.6  # of a choice list's rated half: 3 of 5 carry the top rating, 2 the next one


class Drawn(NamedTuple):
    """A training list before its order and hints: rows and past are rows of the LikeSplit, unrated are items."""

    name: str
    user: int
    rows: np.ndarray
    unrated: np.ndarray
    past: np.ndarray


class ListMaker:
    """Rows of a LikeSplit -> ranking lists with hints, by TRAIN_RULE and EVAL_RULE of build.py."""

    def __init__(
        self,
        interactions: Interactions,
        split: LikeSplit,
        models: FoldedModels,
        retrievers: FoldedRetrievers,
        options: HintOptions,
    ):
        self.split, self.models, self.retrievers, self.options = split, models, retrievers, options
        self.user_ids = interactions.user_ids.to_list()
        columns = (interactions.items[name].to_list() for name in ("item_id", "title", "category"))
        self.items = [Item(index, *cells) for index, cells in enumerate(zip(*columns))]
        self.rated_items = np.unique(split.item)
        scale = np.unique(split.rating)[::-1]
        self.pairs = [(high, low) for high, low in itertools.pairwise(scale) if low >= options.like]

    def train(self, drawn: np.ndarray) -> tuple[list[RankingList], dict[str, int]]:
        """A choice list (and a rated list) per draw, in the order of the draws; and how the choice lists came about."""
        made: list[Drawn] = []
        turns = np.zeros(self.split.users, dtype=np.int64)
        how = {"choice_lists_of_two_ratings": 0, "choice_lists_of_the_best_rated": 0}
        for user in drawn.tolist():
            name, turn = self.user_ids[user], int(turns[user])
            turns[user] += 1
            generator = self._generator(name, turn)
            rows, two_ratings = self._chosen(user, generator)
            how["choice_lists_of_two_ratings" if two_ratings else "choice_lists_of_the_best_rated"] += 1
            unrated = self._unrated(user, self.options.num_candidates - len(rows), generator)
            made.append(Drawn(f"{name}-{turn}", user, rows, unrated, self._past(user, rows, generator)))
            if not self.options.choice_lists_only:
                rows = self._further(user, generator)
                past = self._past(user, rows, generator)
                made.append(Drawn(f"{name}-{turn}-rated", user, rows, unrated[:0], past))
        made = [one for one in made if len(one.rows) + len(one.unrated) > 1]
        if not made:
            raise AlroFastError("no training list of two candidates can be made of so few ratings; give more ratings")
        return self._records(made), how

    def ranked(self, name: str, found: Retrieved) -> list[RankingList]:
        """The retriever's candidates of every user with a target, best first."""
        split, records = self.split, []
        for user in np.flatnonzero(split.target[name] >= 0).tolist():
            items = found.items[user][found.items[user] >= 0]
            if not len(items):
                continue
            ratings = np.where(items == split.target[name][user], split.target_rating[name][user], np.nan)
            users = np.full(len(items), user)
            hints = self.models.whole.predict(users, items), places(self.retrievers.whole, users, items)
            rows = np.arange(*split.offsets[user : user + 2])[-self.options.history_length :]
            records.append(self._record(f"{self.user_ids[user]}-{name}", user, rows, items, ratings, hints))
        return records

    def _chosen(self, user: int, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
        """Rows of the rated candidates of a choice list, and whether they are of two neighbouring ratings."""
        rows = np.arange(*self.split.offsets[user : user + 2])
        rating = self.split.rating[rows]
        wanted = self.options.num_candidates // 2
        top = math.ceil(TOP_SHARE * wanted)
        for high, low in self.pairs:
            best, next_best = rows[rating == high], rows[rating == low]
            if len(best) > top and len(next_best) > wanted - top:
                drawn = generator.choice(best, top, False), generator.choice(next_best, wanted - top, False)
                return np.concatenate(drawn), True
        order = np.lexsort((generator.random(len(rows)), -rating))
        return rows[order[: min(wanted, max(1, len(rows) // 2))]], False

    def _further(self, user: int, generator: np.random.Generator) -> np.ndarray:
        first, last = self.split.offsets[user : user + 2]
        return first + generator.choice(last - first, min(self.options.num_candidates, (last - first) // 2), False)

    def _unrated(self, user: int, count: int, generator: np.random.Generator) -> np.ndarray:
        """Items with training ratings, none by this user; all that are left where they are fewer than `count`."""
        mine = self.split.item[slice(*self.split.offsets[user : user + 2])]
        left = len(self.rated_items) - len(mine)
        if left < 4 * count:
            others = np.setdiff1d(self.rated_items, mine)
            return generator.choice(others, min(count, left), replace=False)
        proposals = (int(self.rated_items[generator.integers(len(self.rated_items))]) for _ in itertools.count())
        return np.array(first_new(proposals, count, set(mine.tolist())), dtype=np.int64)

    def _past(self, user: int, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        others = np.setdiff1d(np.arange(*self.split.offsets[user : user + 2]), rows)
        if len(others) > self.options.history_length:
            others = np.sort(generator.choice(others, self.options.history_length, replace=False))
        return others

    def _records(self, made: list[Drawn]) -> list[RankingList]:
        """Shuffle each list's candidates and add their hints, all predicted at once."""
        shuffled = []
        for name, user, rows, unrated, past in made:
            items = np.concatenate([self.split.item[rows], unrated])
            ratings = np.concatenate([self.split.rating[rows], np.full(len(unrated), np.nan, dtype=np.float32)])
            order = self._generator(name, "order").permutation(len(items))
            shuffled.append((name, user, past, items[order], ratings[order]))
        sizes = [len(items) for *_, items, _ in shuffled]
        user_of_each = np.repeat([user for _, user, *_ in shuffled], sizes)
        items, ends = np.concatenate([items for *_, items, _ in shuffled]), np.cumsum(sizes)[:-1]
        hints = np.split(self.models.out_of_fold(user_of_each, items), ends)
        shares = np.split(self.retrievers.out_of_fold(user_of_each, items), ends)
        return [self._record(*one, both) for one, *both in zip(shuffled, hints, shares, strict=True)]

    def _record(
        self, name: str, user: int, past: np.ndarray, items: np.ndarray, ratings: np.ndarray, said: Sequence[np.ndarray]
    ) -> RankingList:
        """said: predicted ratings, and places with the retriever, of each candidate."""
        return RankingList(
            list_id=name,
            user_id=self.user_ids[user],
            history=tuple(self.items[i] for i in self.split.item[past].tolist()),
            history_ratings=tuple(self.split.rating[past].tolist()),
            candidates=tuple(self.items[i] for i in items.tolist()),
            ratings=tuple(ratings.tolist()),
            hints=tuple(said[0].tolist()),
            signals=(Signal("retriever", (), tuple(said[1].tolist())),),
        )

    def _generator(self, name: str, purpose: str | int) -> np.random.Generator:
        """Draws of one list: they depend on nothing but the seed and its name."""
        return seeds.generator(self.options.seed, seeds.FIRST_STAGE_LISTS, name=f"{purpose}/{name}")
