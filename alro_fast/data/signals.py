"""Signals: numbers beside the items of a list, computed without any rating that a list asks for (docs/signals.md).

Users are dealt into folds by a hash. For a list of a user the item side - means, counts, biases, factors - is fitted on
ratings of users of all other folds, so that it has seen no rating of this user, in training as at test time; the user
side is fitted on the user's own ratings before the list. So a training list's signals say as much as a test list's.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl

from ..errors import AlroFastError
from .rating_model import BIAS_RIDGE, FACTOR_RIDGE, FACTORS, fit_ratings
from .seeds import hash_ids, splitmix64
from .signal_table import OF_CANDIDATES, SIGNALS, signal_column
from .sources.interactions import Interactions
from .windows import Built, ListOptions, Timeline, held_out

FOLDS = 10
AVERAGE_PRIOR = 5.0  # as many ratings that say the mean of all, in the average
ATTRIBUTE_RIDGE, YEAR_RIDGE = 8.0, 12.0  # of the user's own regression on categories and on decades
MOST_ATTRIBUTES = 48  # the most frequent ones are kept
OFFSET_PRIOR, OFFSET_ROUNDS = 5.0, 6  # of users' and items' offsets, where items are compared
NEIGHBOURS, NEAR_SHRINK, NEAR_PRIOR = 40, 4.0, 0.5
MOST_CELLS = 1 << 28  # of the table that items are compared in: 1 GiB
DECADES, DECADE_WIDTH = np.arange(1920.0, 2030.0, 10.0), 8.0
RULE = (
    "the fold of a user is splitmix64(splitmix64(blake2b64(user id)) + seed) mod folds; item side: fitted on ratings "
    "of users of the other folds alone, for training and validation lists on their ratings in no validation or test "
    "list, for test lists on those in no test list; user side: the user's own ratings before the list; so no signal "
    "depends on a rating of the list it stands in, nor on a later one of its user"
)
HOW = {
    "average": f"(sum of ratings + {AVERAGE_PRIOR:g} x mean of all) / (count + {AVERAGE_PRIOR:g}); null for count 0",
    "count": "number of ratings",
    "hint": (
        f"item's offset b_i + f_i . w_u, f_i = (1, {FACTORS} factors of a biased matrix factorisation, categories of "
        f"length 1, decades of a year that ends the title); w_u: the user's ridge regression of rating - b_i, ridge "
        f"{BIAS_RIDGE:g}, {FACTOR_RIDGE:g}, {ATTRIBUTE_RIDGE:g}, {YEAR_RIDGE:g}; not cut to the rating scale; "
        "candidates only"
    ),
    "near": (
        f"residuals e = rating - mean - offsets of user and item (shrunk by {OFFSET_PRIOR:g}); items are alike by "
        f"max(0, sum over users of e_i e_j) / (sqrt(sum e_i^2 sum e_j^2) + {NEAR_SHRINK:g}); mean of the user's own e "
        f"of the {NEIGHBOURS} items most alike among those rated before the list, weighted by likeness, "
        f"{NEAR_PRIOR:g} more that says 0; null where none is alike; candidates only"
    ),
}


@dataclass(frozen=True, slots=True)
class SignalOptions:
    """Which signals, and how many folds of users they are fitted with."""

    names: tuple[str, ...]
    folds: int = FOLDS

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in SIGNALS]
        if unknown or not self.names or len(set(self.names)) < len(self.names):
            found = ",".join(self.names)
            raise AlroFastError(
                f"--signals {found}: expected some of {', '.join(SIGNALS)}, each once, with commas between"
            )
        if self.folds < 2:
            raise AlroFastError(f"--signal_folds {self.folds} is too small; at least 2 is needed")

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest says of these options."""
        return {"signals": list(self.names), "signal_folds": self.folds}

    @classmethod
    def of(cls, names: str | None, folds: int = FOLDS) -> Self | None:
        """Those of a command line; None where no signals are asked for."""
        return None if names is None else cls(tuple(name.strip() for name in names.split(",")), folds)


def signal_rules(options: SignalOptions, seed: int) -> dict[str, Any]:
    """What the manifest says of the signals."""
    made = {name: {"is": SIGNALS[name], "how": HOW[name]} for name in options.names}
    return {"rule": RULE, "folds": options.folds, "seed": seed, "computed": made}


def add_signals(
    built: Built, interactions: Interactions, options: SignalOptions, of_lists: ListOptions
) -> dict[str, pl.DataFrame]:
    """Split -> its frame with SIGNAL_COLUMNS of lists.py for `options.names`."""
    from threadpoolctl import threadpool_limits

    timeline = built.timeline
    user_of_rating = np.repeat(np.arange(len(timeline.offsets) - 1), np.diff(timeline.offsets))
    key = splitmix64(splitmix64(hash_ids(interactions.user_ids)) + np.uint64(of_lists.seed))
    fold = (key % np.uint64(options.folds)).astype(np.int64)
    categories, titles = (interactions.items[name].to_list() for name in ("category", "title"))
    attributes, ridge = item_attributes(titles, categories)
    cells = len(fold) * len(titles)
    if "near" in options.names and cells > MOST_CELLS:
        raise AlroFastError(
            f"--signals near keeps a table of {len(fold):,} users x {len(titles):,} items, more than {MOST_CELLS:,} "
            "cells; leave near out"
        )
    columns = {split: _Columns(built, split, options.names) for split in built.lists}
    with threadpool_limits(1):  # the same seed, the same numbers
        for splits, hidden in ((("train", "valid"), ("valid", "test")), (("test",), ("test",))):
            kept = ~held_out(timeline, built.windows, hidden, of_lists.list_size)
            for k in range(options.folds):
                rows = np.flatnonzero(kept & (fold[user_of_rating] != k))
                if not len(rows):
                    raise AlroFastError(
                        f"no rating is left to compute --signals with beside fold {k} of --signal_folds "
                        f"{options.folds}; give ratings of more users"
                    )
                side = ItemSide(timeline, user_of_rating, rows, attributes, ridge, options.names)
                for split in splits:
                    columns[split].fill(side, timeline, fold == k)
    return {split: built.lists[split].with_columns(columns[split].series()) for split in built.lists}


class ItemSide:
    """What some ratings say of the items.

    count: int64 [items]; average: float64 [items], NaN where count is 0. For hints: offset, float64 [items], the
    predicted rating but for the user; features, float64 [items, d], what a user's weights are for, 1 first; ridge,
    [d, d]. For near: level, float64 [items], mean rating but for users' offsets; residual, float32 [users, items], what
    is left of each rating; power, [items], its sum of squares.
    """

    def __init__(
        self,
        timeline: Timeline,
        user_of_rating: np.ndarray,
        rows: np.ndarray,
        attributes: np.ndarray,
        attribute_ridge: list[float],
        names: Sequence[str],
    ) -> None:
        items, users = len(attributes), len(timeline.offsets) - 1
        user, item = user_of_rating[rows], timeline.item[rows].astype(np.int64)
        rating = timeline.rating[rows].astype(np.float64)
        mean = rating.mean()
        self.count = np.bincount(item, minlength=items)
        total = np.bincount(item, weights=rating, minlength=items) + AVERAGE_PRIOR * mean
        self.average = np.where(self.count > 0, total / (self.count + AVERAGE_PRIOR), np.nan)
        if "hint" in names:
            model = fit_ratings(user, item, rating, users, items)
            self.offset = model.mean + model.item[:, 0]
            self.features = np.concatenate([np.ones((items, 1)), model.item[:, 1:], attributes], axis=1)
            self.ridge = np.diag([BIAS_RIDGE] + [FACTOR_RIDGE] * FACTORS + attribute_ridge)
        if "near" in names:
            of_item, of_user = np.zeros(items), np.zeros(users)
            given = np.bincount(user, minlength=users)
            for _ in range(OFFSET_ROUNDS):
                left = np.bincount(item, rating - mean - of_user[user], minlength=items)
                of_item = left / (self.count + OFFSET_PRIOR)
                left = np.bincount(user, rating - mean - of_item[item], minlength=users)
                of_user = left / (given + OFFSET_PRIOR)
            self.level = mean + of_item
            self.residual = np.zeros((users, items), dtype=np.float32)
            self.residual[user, item] = rating - self.level[item] - of_user[user]
            self.power = np.square(self.residual).sum(axis=0)

    def hints(
        self, past: np.ndarray, rating: np.ndarray, starts: np.ndarray, wanted: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Predicted ratings of the items wanted[l] by a user who has given rating[:starts[l]] to past[:starts[l]].

        past, rating: the user's [ratings] in time order; starts: ascending.
        """
        width = self.features.shape[1]
        gram, moment = self.ridge.copy(), np.zeros(width)
        grams, moments = np.empty((len(starts), width, width)), np.empty((len(starts), width, 1))
        for number, (first, last) in enumerate(itertools.pairwise([0, *starts.tolist()])):
            features = self.features[past[first:last]]
            gram += features.T @ features
            moment += (rating[first:last] - self.offset[past[first:last]]) @ features
            grams[number], moments[number, :, 0] = gram, moment
        weights = np.linalg.solve(grams, moments)[:, :, 0]
        return [self.offset[items] + self.features[items] @ own for items, own in zip(wanted, weights)]

    def near(
        self, past: np.ndarray, rating: np.ndarray, starts: np.ndarray, wanted: list[np.ndarray]
    ) -> list[np.ndarray]:
        """As `hints`: how far the user's ratings of the items most alike were above expectation; NaN: none is alike."""
        items, place = np.unique(np.concatenate(wanted), return_inverse=True)
        products = self.residual[:, items].T @ self.residual[:, past]
        scale = np.sqrt(np.outer(self.power[items], self.power[past])) + NEAR_SHRINK
        alike = np.maximum(products, 0.0) / scale
        left = rating - self.level[past]
        found, cuts = [], np.cumsum([len(some) for some in wanted])[:-1]
        for start, rows in zip(starts.tolist(), np.split(place, cuts)):
            own = left[:start] - left[:start].sum() / (start + OFFSET_PRIOR)
            weight = alike[rows, :start]
            if start > NEIGHBOURS:
                least = np.partition(weight, -NEIGHBOURS, axis=1)[:, [-NEIGHBOURS]]
                weight = np.where(weight < least, 0.0, weight)
            total = weight.sum(axis=1)
            found.append(np.where(total > 0, weight @ own / (total + NEAR_PRIOR), np.nan))
        return found


def item_attributes(titles: list[str], categories: list[str]) -> tuple[np.ndarray, list[float]]:
    """float64 [items, attributes]: categories, then decades, the rows of either of length 1 or 0; a ridge per column.

    Categories are the parts of the text between commas or bars; a year is four digits in brackets at a title's end.
    """
    parts = [list(dict.fromkeys(part for part in re.split(r"\s*[|,]\s*", text) if part)) for text in categories]
    counted = Counter(itertools.chain.from_iterable(parts))
    known = sorted(sorted(counted, key=lambda name: (-counted[name], name))[:MOST_ATTRIBUTES])
    column = {name: number for number, name in enumerate(known)}
    of_category = np.zeros((len(titles), len(known)))
    for row, names in enumerate(parts):
        for name in names:
            if name in column:
                of_category[row, column[name]] = 1.0
    years = [re.search(r"\((\d{4})\)\s*$", title) for title in titles]
    year = np.array([float(found[1]) if found else np.nan for found in years])
    of_year = np.exp(-(((year[:, None] - DECADES) / DECADE_WIDTH) ** 2)) if any(years) else np.zeros((len(titles), 0))
    both = [_of_length_one(np.nan_to_num(some)) for some in (of_category, of_year)]
    return np.concatenate(both, axis=1), [ATTRIBUTE_RIDGE] * len(known) + [YEAR_RIDGE] * of_year.shape[1]


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-9)


class _Columns:
    """The signals of one split, filled in fold by fold."""

    def __init__(self, built: Built, split: str, names: Sequence[str]) -> None:
        self.users, self.starts = built.windows[split]
        self.rows = {name: _Rows(built.lists[split][name]) for name in ("history", "candidates")}
        self.values: dict[str, np.ndarray] = {}  # column -> float64, all lists end to end
        for name in (one for one in SIGNALS if one in names):
            for part in ("candidates",) if name in OF_CANDIDATES else ("history", "candidates"):
                self.values[signal_column(name, part)] = np.full(len(self.rows[part].items), np.nan)

    def fill(self, side: ItemSide, timeline: Timeline, mine: np.ndarray) -> None:
        """What `side` says of the lists of users that are `mine`, bool [users]."""
        for name in SIGNALS:
            for part, rows in self.rows.items():
                if name not in OF_CANDIDATES and (column := signal_column(name, part)) in self.values:
                    here = np.repeat(mine[self.users], rows.lengths)
                    self.values[column][here] = getattr(side, name)[rows.items[here]]
        predicted = {name: signal_column(name, "candidates") for name in OF_CANDIDATES}
        for name, compute in {"hint": side.hints, "near": side.near}.items():
            if predicted[name] in self.values:
                self._predict(self.values[predicted[name]], compute, timeline, mine)

    def _predict(self, values: np.ndarray, compute: Callable, timeline: Timeline, mine: np.ndarray) -> None:
        """Fill in what is computed user by user; lists stand by user, then time."""
        rows, cuts = self.rows["candidates"], self.rows["candidates"].cuts
        first_lists = np.flatnonzero(np.diff(self.users, prepend=-1))
        for first, last in itertools.pairwise([*first_lists.tolist(), len(self.users)]):
            user = self.users[first]
            if not mine[user]:
                continue
            own = slice(*timeline.offsets[user : user + 2])
            past, rating = timeline.item[own].astype(np.int64), timeline.rating[own].astype(np.float64)
            wanted = [rows.items[cuts[l] : cuts[l + 1]] for l in range(first, last)]
            values[cuts[first] : cuts[last]] = np.concatenate(compute(past, rating, self.starts[first:last], wanted))

    def series(self) -> list[pl.Series]:
        return [
            self.rows["history" if column.startswith("history_") else "candidates"].series(column, values)
            for column, values in self.values.items()
        ]


class _Rows:
    """A list column of items, end to end, and values beside it as another."""

    def __init__(self, column: pl.Series) -> None:
        self.lengths = column.list.len().to_numpy().astype(np.int64)
        self.cuts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.items = column.filter(column.list.len() > 0).explode().to_numpy().astype(np.int64)

    def series(self, name: str, values: np.ndarray) -> pl.Series:
        """A List(Float32) column; NaN: null."""
        row = np.repeat(np.arange(len(self.lengths), dtype=np.uint32), self.lengths)
        table = pl.DataFrame({"row": row, "value": values.astype(np.float32)}).with_columns(
            pl.col("value").fill_nan(None)
        )
        grouped = table.group_by("row", maintain_order=True).agg("value")
        every = pl.DataFrame({"row": np.arange(len(self.lengths), dtype=np.uint32)})
        joined = every.join(grouped, on="row", how="left", maintain_order="left")["value"]
        return joined.fill_null([]).cast(pl.List(pl.Float32)).alias(name)
