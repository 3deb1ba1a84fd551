"""A first stage's lists: sampled users to train on, the retriever's candidates to rank, a hint for every candidate.

Nothing that training reads depends on a held-out like: the retriever, the hints, the sampled users and the training
lists are functions of the training ratings of likes.py alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ..errors import AlroFastError
from .interactions import Interactions
from .likes import MIN_LIKES, LikeSplit, split_likes
from .lists import TARGET_SCHEMA, train_statistics
from .rating_model import FoldedModels
from .records import Item, RankingList
from .retrieval import (
    Retrieved,
    RetrieverOptions,
    fit_retriever,
    need_libraries,
    resolve,
    retrieval_metrics,
    retrieve,
    seen_items,
)
from .sampling import UserSample, candidates_for_sampling, describe, sample_users

TOP_SHARE = 0.6  # of a choice list's rated half: 3 of 5 carry the top rating, 2 the next one
TRAIN_RULE = (
    "each draw of a user gives a choice list and, unless --choice_lists_only, a rated list; choice list: half of "
    "num_candidates are rated, three fifths of those of one rating and the rest of the next lower value of the scale, "
    "the highest such pair, both likes, of which the user has more of each; where there is none, the user's best "
    "rated (ties at random); the other half are items the user has no training rating of, uniformly among items with "
    "training ratings; rated list: training ratings of the user drawn uniformly, half of them at most; history = "
    "history_length of the user's other training ratings, drawn uniformly, in time order; presented order random"
)
EVAL_RULE = (
    "one list per user with targets: the best num_candidates the user has no training rating of, in the retriever's "
    "order (test lists leave the validation target out); only the target is rated, a missed one leaves all unrated; "
    "history = the user's latest history_length training ratings; a user with every retrievable item rated has no list"
)
HINT_RULE = (
    "biased matrix factorisation of training ratings; training candidates by the model that has not seen their fold "
    "(a hash of user and item), other candidates by the model of all training ratings"
)


@dataclass(frozen=True, slots=True)
class HintOptions:
    """How a first stage is run and its lists are made."""

    retriever: str = "als"
    num_candidates: int = 10  # of a list
    num_samples: int = 5000  # draws of users, a draw is one choice list
    like: float = 4.0  # ratings from here on are likes
    min_likes: int = MIN_LIKES  # a user with fewer has no targets
    dislike: float = 2.0  # ratings up to here are dislikes (shown as such in prompts)
    history_length: int = 50
    folds: int = 5  # of the training ratings, for hints
    choice_lists_only: bool = False
    seed: int = 0
    of_retriever: RetrieverOptions = field(default_factory=RetrieverOptions)

    def __post_init__(self) -> None:
        lowest = {"num_candidates": 2, "num_samples": 1, "history_length": 1, "min_likes": 2, "folds": 2, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise AlroFastError(f"--{name} {getattr(self, name)} is too small; at least {least} is needed")
        if not self.dislike < self.like:
            raise AlroFastError(f"--dislike {self.dislike:g} is not below --like {self.like:g}")
        resolve(self.retriever, self.of_retriever)


class Hinted(NamedTuple):
    """What write_prepared takes (items, lists, targets), counts and figures for the manifest, the sample for a plot."""

    items: pl.DataFrame
    lists: dict[str, list[RankingList]]
    targets: pl.DataFrame
    counts: dict[str, Any]
    retrieval: dict[str, dict[str, float]]
    retriever: dict[str, Any]
    hint_error: float
    sample: UserSample
    like_count: np.ndarray


def build_hinted(
    interactions: Interactions,
    options: HintOptions,
    notice: Callable[[str], None] = print,
    done: Callable[[str], None] = lambda what: None,
) -> Hinted:
    """Split, fit, sample and cut. notice: takes what a user should know; done: called with a line after every stage."""
    need_libraries()
    split = split_likes(interactions, options.like, options.seed, options.min_likes)
    candidates_for_sampling(split.like_count)
    _notices_of_split(split, options, notice)
    done(f"split {split.liked.sum():,} training likes, {(split.target['test'] >= 0).sum():,} users with targets")
    retriever = fit_retriever(options.retriever, split, options.of_retriever, options.seed)
    cold = retriever.cold & (split.target["test"] >= 0)
    if cold.any():
        notice(f"{cold.sum():,} users are unknown to the retriever: their candidates are the most popular items")
    found = {
        name: retrieve(retriever, seen_items(split, also), split.target[name], options.num_candidates)
        for name, also in (("valid", None), ("test", split.target["valid"]))
    }
    has = split.target["test"] >= 0
    retrieval = {name: _figures(one, has, options.num_candidates) for name, one in found.items()}
    done(f"fitted {options.retriever}: " + ", ".join(f"{k} {v:.4f}" for k, v in retrieval["valid"].items() if "@" in k))
    models = FoldedModels(split, options.folds, options.seed)
    done(f"fitted rating models: root mean square error {models.error:.4f} out of fold")
    sample = sample_users(split.like_count, retriever.embeddings, options.num_samples, seed=options.seed)
    maker = _Maker(interactions, split, models, options)
    train, how = maker.train(sample.drawn)
    lists = {"train": train, **{name: maker.ranked(name, one) for name, one in found.items()}}
    left_out = int(has.sum()) - len(lists["test"])
    if left_out:
        notice(f"{left_out:,} users have seen every item that can be retrieved: they have a miss and no test list")
    short = sum(len(one.candidates) < options.num_candidates for one in lists["test"])
    if short:
        notice(f"{short:,} users have fewer than {options.num_candidates} candidates: all that are left to them")
    counts = {
        "users_with_targets": int(has.sum()),
        "users_unknown_to_the_retriever": int(cold.sum()),
        "training_ratings": len(split.item),
        "training_likes": int(split.liked.sum()),
        "training_dislikes": int((split.rating <= options.dislike).sum()),
        "ratings_after_a_validation_target_dropped": split.dropped,
        "lists": {name: len(some) for name, some in lists.items()},
        "short_test_lists": short,
        "users_without_a_candidate": left_out,
        **how,
    }
    count, mean = train_statistics(split.item, split.rating, split.items)
    return Hinted(
        items=interactions.items.with_columns(train_count=count, train_mean=mean),
        lists=lists,
        targets=pl.concat([_targets(name, interactions, split, one) for name, one in found.items()]),
        counts=counts,
        retrieval=retrieval,
        retriever={"name": retriever.name, **retriever.options},
        hint_error=models.error,
        sample=sample,
        like_count=split.like_count,
    )


class _Maker:
    """Rows of ratings -> ranking lists with hints."""

    def __init__(self, interactions: Interactions, split: LikeSplit, models: FoldedModels, options: HintOptions):
        self.split, self.models, self.options = split, models, options
        self.user_ids = interactions.user_ids.to_list()
        columns = (interactions.items[name].to_list() for name in ("item_id", "title", "category"))
        self.items = [Item(index, *cells) for index, cells in enumerate(zip(*columns))]
        self.rated_items = np.unique(split.item)
        scale = np.unique(split.rating)[::-1]
        self.pairs = [(high, low) for high, low in itertools.pairwise(scale) if low >= options.like]

    def train(self, drawn: np.ndarray) -> tuple[list[RankingList], dict[str, int]]:
        """A choice list (and a rated list) per draw, in the order of the draws; and how the choice lists came about."""
        made: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []
        turns = np.zeros(self.split.users, dtype=np.int64)
        how = {"choice_lists_of_two_ratings": 0, "choice_lists_of_the_best_rated": 0}
        for user in drawn.tolist():
            name, turn = self.user_ids[user], int(turns[user])
            turns[user] += 1
            generator = self._generator(name, turn)
            rows, two_ratings = self._chosen(user, generator)
            how["choice_lists_of_two_ratings" if two_ratings else "choice_lists_of_the_best_rated"] += 1
            unrated = self._unrated(user, self.options.num_candidates - len(rows), generator)
            made.append((f"{name}-{turn}", user, rows, unrated, self._past(user, rows, generator)))
            if not self.options.choice_lists_only:
                rows = self._further(user, generator)
                made.append((f"{name}-{turn}-rated", user, rows, unrated[:0], self._past(user, rows, generator)))
        made = [one for one in made if len(one[2]) + len(one[3]) > 1]
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
            hints = self.models.whole.predict(np.full(len(items), user), items)
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
        taken, drawn = set(mine.tolist()), []
        while len(drawn) < count:
            item = int(self.rated_items[generator.integers(len(self.rated_items))])
            if item not in taken:
                taken.add(item)
                drawn.append(item)
        return np.array(drawn, dtype=np.int64)

    def _past(self, user: int, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        others = np.setdiff1d(np.arange(*self.split.offsets[user : user + 2]), rows)
        if len(others) > self.options.history_length:
            others = np.sort(generator.choice(others, self.options.history_length, replace=False))
        return others

    def _records(self, made: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]]) -> list[RankingList]:
        """Shuffle each list's candidates and add their hints, all predicted at once."""
        shuffled = []
        for name, user, rows, unrated, past in made:
            items = np.concatenate([self.split.item[rows], unrated])
            ratings = np.concatenate([self.split.rating[rows], np.full(len(unrated), np.nan, dtype=np.float32)])
            order = self._generator(name, "order").permutation(len(items))
            shuffled.append((name, user, past, items[order], ratings[order]))
        sizes = [len(items) for *_, items, _ in shuffled]
        user_of_each = np.repeat([user for _, user, *_ in shuffled], sizes)
        predicted = self.models.out_of_fold(user_of_each, np.concatenate([items for *_, items, _ in shuffled]))
        hints = np.split(predicted, np.cumsum(sizes)[:-1])
        return [self._record(*one, hint) for one, hint in zip(shuffled, hints, strict=True)]

    def _record(
        self, name: str, user: int, past: np.ndarray, items: np.ndarray, ratings: np.ndarray, hints: np.ndarray
    ) -> RankingList:
        return RankingList(
            list_id=name,
            user_id=self.user_ids[user],
            history=tuple(self.items[i] for i in self.split.item[past].tolist()),
            history_ratings=tuple(self.split.rating[past].tolist()),
            candidates=tuple(self.items[i] for i in items.tolist()),
            ratings=tuple(ratings.tolist()),
            hints=tuple(hints.tolist()),
        )

    def _generator(self, name: str, purpose: str | int) -> np.random.Generator:
        """Draws of one list: they depend on nothing but the seed and its name."""
        digest = hashlib.blake2b(f"{purpose}/{name}".encode(), digest_size=8).digest()
        return np.random.default_rng([self.options.seed, 3, int.from_bytes(digest, "little")])


def _figures(found: Retrieved, has: np.ndarray, count: int) -> dict[str, float]:
    """Metrics over all users with a target, the ceiling of any re-ranking among them."""
    place = found.place[has]
    ceiling = float(((place >= 1) & (place <= count)).mean())
    return {
        "users": len(place),
        **retrieval_metrics(place),
        "targets_among_candidates": ceiling,
        "targets_that_cannot_be_retrieved": int((place == 0).sum()),
    }


def _targets(name: str, interactions: Interactions, split: LikeSplit, found: Retrieved) -> pl.DataFrame:
    users = np.flatnonzero(split.target[name] >= 0)
    place = pl.Series(found.place[users])
    columns = {
        "split": pl.repeat(name, len(users), eager=True),
        "user_id": interactions.user_ids.gather(users),
        "item": split.target[name][users],
        "place": place.replace(0, None),
    }
    return pl.DataFrame(columns).cast(TARGET_SCHEMA)


def _notices_of_split(split: LikeSplit, options: HintOptions, notice: Callable[[str], None]) -> None:
    without = int((split.target["test"] < 0).sum())
    if without:
        few = f"{without:,} of {split.users:,} users have fewer than {options.min_likes} likes"
        notice(f"{few}: no targets, all their ratings train")
    if not (split.rating <= options.dislike).any():
        notice(f"no training rating is --dislike {options.dislike:g} or less: no prompt shows disliked items")


def sample_figures(built: Hinted) -> dict[str, Any]:
    """The sample in numbers, see sampling.describe."""
    return describe(built.sample, built.like_count)
