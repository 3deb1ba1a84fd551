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
from .near import NEIGHBOURS, PRIOR, SHRINKAGE, Residuals, check_cells
from .rating_model import BIAS_RIDGE, FACTOR_RIDGE, FACTORS, fit_ratings
from .seeds import hash_ids, splitmix64
from .signal_table import OF_CANDIDATES, PREPARED, SIGNALS
from .sources.interactions import Interactions
from .windows import Built, ListOptions, Timeline, held_out

FOLDS = 10
MOST_FOLDS = 1000  # of users
AVERAGE_PRIOR = 5.0  # as many ratings that say the mean of all, in the average
ATTRIBUTE_RIDGE, YEAR_RIDGE = 8.0, 12.0  # of the user's own regression on categories and on decades
MOST_ATTRIBUTES = 48  # the most frequent ones are kept
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
        "sum of sim(c, h) x (rating of h above its level and the user's) / (sum of sim + "
        f"{PRIOR:g}) over the {NEIGHBOURS} items h most alike of the user's; sim: cosine of the residuals of other "
        f"users, with {SHRINKAGE:g} added to its denominator, 0 where negative; candidates only"
    ),
}


@dataclass(frozen=True, slots=True)
class SignalOptions:
    """Which signals, and how many folds of users they are fitted with."""

    names: tuple[str, ...]
    folds: int = FOLDS

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in PREPARED]
        if unknown or not self.names or len(set(self.names)) < len(self.names):
            found = ",".join(self.names)
            raise AlroFastError(
                f"--signals {found}: expected some of {', '.join(PREPARED)}, each once, with commas between"
            )
        if self.folds < 2:
            raise AlroFastError(f"--signal_folds {self.folds} is too small; at least 2 is needed")
        if self.folds > MOST_FOLDS:
            raise AlroFastError(f"--signal_folds {self.folds} is too large; at most {MOST_FOLDS:,} is taken")

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
    """Split -> its frame with SIGNAL_COLUMNS of lists.py, for the signals that the options name."""
    from threadpoolctl import threadpool_limits

    timeline, users = built.timeline, len(interactions.user_ids)
    if options.folds > users:
        raise AlroFastError(f"--signal_folds {options.folds} is more than the {users:,} users; lower it")
    if "near" in options.names:
        check_cells(len(interactions.user_ids), interactions.items.height)
    user_of_rating = np.repeat(np.arange(len(timeline.offsets) - 1), np.diff(timeline.offsets))
    key = splitmix64(splitmix64(hash_ids(interactions.user_ids)) + np.uint64(of_lists.seed))
    fold = (key % np.uint64(options.folds)).astype(np.int64)
    categories, titles = (interactions.items[name].to_list() for name in ("category", "title"))
    attributes, ridge = item_attributes(titles, categories)
    columns: dict[str, list[pl.Series]] = {}
    with threadpool_limits(1):  # the same seed, the same numbers
        for splits, hidden in ((("train", "valid"), ("valid", "test")), (("test",), ("test",))):
            kept = ~held_out(timeline, built.windows, hidden, of_lists.list_size)
            sides = []
            for k in range(options.folds):
                rows = np.flatnonzero(kept & (fold[user_of_rating] != k))
                if not len(rows):
                    raise AlroFastError(
                        f"no rating is left to compute --signals with beside fold {k} of --signal_folds "
                        f"{options.folds}; give ratings of more users"
                    )
                sides.append(ItemSide(timeline, user_of_rating, rows, attributes, ridge, options.names))
            for split in splits:
                columns[split] = _columns(built, split, options, fold, sides)
    return {split: built.lists[split].with_columns(columns[split]) for split in built.lists}


# (past, rating, starts, wanted) of one user -> a number for every item of wanted[l]; see ItemSide.hints
Predictor = Callable[[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]], list[np.ndarray]]


class ItemSide:
    """What some ratings say of the items.

    count: int64 [items]; average: float64 [items], NaN where count is 0; offset: float64 [items], the predicted rating
    but for the user; features: float64 [items, d], what a user's weights are for, 1 first; ridge: [d, d].
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
        self.count = np.bincount(item, minlength=items)
        total = np.bincount(item, weights=rating, minlength=items) + AVERAGE_PRIOR * rating.mean()
        self.average = np.where(self.count > 0, total / (self.count + AVERAGE_PRIOR), np.nan)
        if "near" in names:
            self.residuals = Residuals(user, item, rating, items)
        if "hint" in names:
            model = fit_ratings(user, item, rating, users, items)
            self.offset = model.mean + model.item[:, 0]
            self.features = np.concatenate([np.ones((items, 1)), model.item[:, 1:], attributes], axis=1)
            self.ridge = np.diag([BIAS_RIDGE] + [FACTOR_RIDGE] * FACTORS + attribute_ridge)

    def predictor(self, name: str) -> Predictor:
        """What predicts signal "hint" or "near"."""
        return self.hints if name == "hint" else self.residuals.neighbours().near

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


def _columns(
    built: Built, split: str, options: SignalOptions, fold: np.ndarray, sides: list[ItemSide]
) -> list[pl.Series]:
    """The signals of one split as columns."""
    frame, (users, starts) = built.lists[split], built.windows[split]
    shown = {part: _Rows(frame[name]) for part, name in (("history", "history"), ("candidate", "candidates"))}
    made = []
    for name in (one for one in PREPARED if one in options.names and one not in OF_CANDIDATES):
        of_fold = np.stack([getattr(side, name).astype(np.float64) for side in sides])
        for part, rows in shown.items():
            values = of_fold[np.repeat(fold[users], rows.lengths), rows.items]
            made.append(rows.series(f"{part}_{name}", values))
    for name in (one for one in OF_CANDIDATES if one in options.names):
        values = _predicted(name, built.timeline, users, starts, fold, sides, shown["candidate"])
        made.append(shown["candidate"].series("hints" if name == "hint" else f"candidate_{name}", values))
    return made


def _predicted(
    name: str,
    timeline: Timeline,
    users: np.ndarray,
    starts: np.ndarray,
    fold: np.ndarray,
    sides: list[ItemSide],
    rows: _Rows,
) -> np.ndarray:
    """float64, all candidates of all lists end to end; lists stand by user, then time."""
    values, cuts = np.empty(len(rows.items)), np.concatenate([[0], np.cumsum(rows.lengths)])
    if not len(users):
        return values
    first_lists = np.flatnonzero(np.diff(users, prepend=-1))
    of_user = np.stack([first_lists, np.append(first_lists[1:], len(users))], axis=1)
    for k, side in enumerate(sides):
        predict = side.predictor(name)
        for first, last in of_user[fold[users[first_lists]] == k].tolist():
            own = slice(*timeline.offsets[users[first] : users[first] + 2])
            wanted = [rows.items[cuts[l] : cuts[l + 1]] for l in range(first, last)]
            predicted = predict(
                timeline.item[own].astype(np.int64), timeline.rating[own].astype(np.float64), starts[first:last], wanted
            )
            values[cuts[first] : cuts[last]] = np.concatenate(predicted)
    return values


class _Rows:
    """A list column of items, end to end, and values beside it as another."""

    def __init__(self, column: pl.Series) -> None:
        self.lengths = column.list.len().to_numpy().astype(np.int64)
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
