"""Ratings -> ranking lists: `build_lists`.

A user's ratings in chronological order are cut into windows of `list_size` candidates. The last `test_lists` windows
are the test lists, the one before them the validation list; training windows slide back from there, `train_stride`
ratings at a time.
The history of a list is the last `history_length` ratings before its window. So an item of a held-out list stands in no
earlier list or history of its user (each user rates an item once, see interactions.py), and no history item is later
than a candidate. Equal timestamps are ordered by TIE_RULE.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ..errors import AlroFastError
from .item_draws import ItemDraws
from .lists import LIST_SCHEMA, SPLITS, train_statistics
from .seeds import hash_ids, splitmix64, uniform
from .sources.interactions import Interactions

TIE_RULE = (
    "ratings of one user with equal timestamps are ordered by a 64-bit hash of (seed, user id, item id): "
    "splitmix64(splitmix64(seed + blake2b64(user id)) xor blake2b64(item id)), smaller first"
)
SPLIT_RULE = (
    "per user and by time: the last list_size ratings are the test list, the list_size before them the validation "
    "list, training lists end where the validation list begins and slide back by train_stride; "
    "history = the last history_length ratings before a list"
)
SPLIT_RULE_OF_MORE = (
    "per user and by time: the last {test_lists} x list_size ratings are {test_lists} test lists one after the other "
    "(those with min_history ratings before them), the list_size before them the validation list, training lists "
    "end where the validation list begins and slide back by train_stride; history = the last history_length ratings "
    "before a list, so a later test list shows the ratings of an earlier one"
)
ORDER_RULE = "candidates are presented in the order of a hash of (seed, user id, list position, item id)"
SORT_ROWS = 4_000_000
CHUNK_LISTS = 1 << 16
MAX_DRAWS = 32
MOST_TEST_LISTS = 1000  # of a user
MOST = 2**32  # of a number of things
UNGRADED = ("unrated", "as_zero")


@dataclass(frozen=True, slots=True)
class ListOptions:
    """How lists are cut. Every count is of ratings (history, list) or items (negatives)."""

    history_length: int = 20
    list_size: int = 10  # rated candidates per list
    min_history: int = 5  # a list with fewer earlier ratings is not made
    train_stride: int | None = None  # ratings between the starts of two training lists; None: list_size (no overlap)
    max_train_lists_per_user: int | None = None  # the latest ones are kept; None: all
    test_lists: int = 1  # per user, one after the other
    negatives: int = 0  # unrated candidates added to every list: items the user never rated, without a grade
    negatives_by: str = "uniform"  # or "popularity": drawn with probability proportional to train_count
    ungraded: str = "unrated"  # what a negative counts as; or "as_zero": rated 0, for feedback that is no rating
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ungraded not in UNGRADED:
            raise AlroFastError(f"--ungraded {self.ungraded!r}; expected one of {', '.join(UNGRADED)}")
        least = 1 if self.negatives and self.ungraded == "as_zero" else 2  # rated candidates, to be told apart
        lowest = {"history_length": 1, "list_size": least, "min_history": 1, "test_lists": 1, "negatives": 0, "seed": 0}
        for name in ("train_stride", "max_train_lists_per_user"):
            if getattr(self, name) is not None:
                lowest[name] = 1
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise AlroFastError(f"--{name} {getattr(self, name)} is too small; at least {least} is needed")
            most = {"test_lists": MOST_TEST_LISTS + 1, "seed": 2**63}.get(name, MOST)
            if getattr(self, name) >= most:
                raise AlroFastError(f"--{name} {getattr(self, name)} is too large; it must be below {most:,}")
        if self.negatives_by not in {"uniform", "popularity"}:
            raise AlroFastError(f"--negatives_by {self.negatives_by!r}; expected 'uniform' or 'popularity'")

    @property
    def least_ratings(self) -> int:
        """Of a user who has a list."""
        return self.min_history + self.list_size

    @property
    def split_rule(self) -> str:
        """What the manifest says of how ratings are split."""
        return SPLIT_RULE if self.test_lists == 1 else SPLIT_RULE_OF_MORE.format(test_lists=self.test_lists)

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest says of these options; of those that older ones do not have, what is not the default."""
        defaults = {"test_lists": 1, "ungraded": "unrated"}
        return {name: value for name, value in asdict(self).items() if defaults.get(name) != value}


class Timeline(NamedTuple):
    """Ratings grouped by user, each user's in time order; user u has rows offsets[u] to offsets[u + 1]."""

    offsets: np.ndarray  # int64 [users + 1]
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray


class Built(NamedTuple):
    """items: frame of lists.ITEM_SCHEMA; lists: split -> frame of lists.LIST_SCHEMA; counts for the manifest.

    timeline: what was cut; windows: split -> (user, position of the first candidate among the user's ratings) per list.
    """

    items: pl.DataFrame
    lists: dict[str, pl.DataFrame]
    counts: dict[str, Any]  # int, or int by split
    timeline: Timeline
    windows: dict[str, tuple[np.ndarray, np.ndarray]]


def build_lists(interactions: Interactions, options: ListOptions, notice: Callable[[str], None] = print) -> Built:
    """Cut the lists; time linear in the number of ratings. Raises AlroFastError if no user has enough ratings."""
    user_hash = hash_ids(interactions.user_ids)
    item_hash = hash_ids(interactions.items["item_id"])
    timeline, unsorted_users = chronological(interactions, user_hash, item_hash, options.seed)
    if unsorted_users:
        notice(f"ratings of {unsorted_users:,} users were not in time order: sorted")
    ratings_of = np.diff(timeline.offsets)
    windows = plan_windows(ratings_of, options)
    skipped = int((ratings_of < options.least_ratings).sum())
    say_skipped(skipped, len(ratings_of), int(ratings_of.max()), options, notice)
    items = _with_statistics(interactions.items, timeline, windows, options)
    negatives = Negatives(timeline, items["train_count"].to_numpy(), item_hash, options) if options.negatives else None
    cutter = Cutter(timeline, interactions.user_ids, user_hash, item_hash, options, negatives)
    lists = {split: cutter.frame(*windows[split]) for split in SPLITS}
    counts = {
        "users_skipped": skipped,
        "users_not_in_time_order": unsorted_users,
        **count_lists(timeline, windows, lists),
    }
    say_empty(counts["lists"], options, notice)
    return Built(items, lists, counts, timeline, windows)


def say_skipped(skipped: int, users: int, most: int, options: ListOptions, notice: Callable[[str], None]) -> None:
    """Notice how many users have too few ratings for a list; AlroFastError where all have. most: ratings of a user."""
    if skipped == users:
        raise AlroFastError(
            f"no user has {options.least_ratings} ratings (min_history {options.min_history} + "
            f"list_size {options.list_size}; the most is {most}); lower --list_size or --min_history"
        )
    if skipped:
        notice(f"{skipped:,} of {users:,} users skipped: fewer than {options.least_ratings} ratings")


def say_empty(lists: Mapping[str, int], options: ListOptions, notice: Callable[[str], None]) -> None:
    """Notice splits without a list."""
    empty = [split for split in SPLITS if not lists[split]]
    if empty:
        sizes = f"--list_size {options.list_size}, --test_lists {options.test_lists}"
        notice(f"no {' and no '.join(empty)} lists: users have too few ratings for {sizes}; lower them")


def count_lists(
    timeline: Timeline, windows: Mapping[str, tuple[np.ndarray, np.ndarray]], lists: Mapping[str, pl.DataFrame]
) -> dict[str, Any]:
    """What the manifest counts of lists that were cut at these windows: ints, or ints by split."""
    same_time = np.diff(timeline.time) == 0
    same_time[timeline.offsets[1:-1] - 1] = False  # the last rating of a user and the first of the next
    return {
        "ratings_sharing_a_timestamp": int((np.append(same_time, False) | np.append(False, same_time)).sum()),
        "lists": {split: frame.height for split, frame in lists.items()},
        "lists_all_equal": {split: int(frame["all_equal"].sum()) for split, frame in lists.items()},
        "lists_with_a_tie_at_their_start": {
            split: int(same_time[timeline.offsets[users] + starts - 1].sum())
            for split, (users, starts) in windows.items()
        },
    }


def chronological(
    interactions: Interactions, user_hash: np.ndarray, item_hash: np.ndarray, seed: int
) -> tuple[Timeline, int]:
    """Rows by user, time and TIE_RULE; and how many users' rows were not in time order in the file."""
    user, item, rating, time = (getattr(interactions, name) for name in ("user", "item", "rating", "time"))
    if (user[1:] < user[:-1]).any():
        rows = np.argsort(user, kind="stable")
        user, item, rating, time = (column[rows] for column in (user, item, rating, time))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_hash)))])
    backwards = (time[1:] < time[:-1]) & (user[1:] == user[:-1])
    unsorted_users = len(np.unique(user[1:][backwards]))
    user_key = splitmix64(user_hash + np.uint64(seed))
    item, rating, time = (np.array(column) for column in (item, rating, time))
    for span in _whole_user_slices(offsets, SORT_ROWS):
        tie = splitmix64(user_key[user[span]] ^ item_hash[item[span]])
        order = np.lexsort((tie, time[span], user[span]))
        for column in (item, rating, time):
            column[span] = column[span][order]
    return Timeline(offsets, item, rating, time), unsorted_users


def plan_windows(ratings_of: np.ndarray, options: ListOptions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (user, position of the first candidate among the user's ratings) of every list, by user, then time.

    ratings_of: number of ratings of each user.
    """
    size, stride = options.list_size, options.train_stride or options.list_size
    windows = {}
    for split, from_the_end in (("test", np.arange(options.test_lists, 0, -1)), ("valid", options.test_lists + 1)):
        start = ratings_of[:, None] - np.atleast_1d(from_the_end) * size
        users, which = np.nonzero(start >= options.min_history)
        windows[split] = users, start[users, which]
    last = ratings_of - (options.test_lists + 2) * size  # where a user's last training list begins
    room = last - options.min_history
    many = np.where(room >= 0, room // stride + 1, 0)
    if options.max_train_lists_per_user is not None:
        many = np.minimum(many, options.max_train_lists_per_user)
    users = np.repeat(np.arange(len(ratings_of)), many)
    nth = np.arange(len(users)) - np.repeat(np.cumsum(many) - many, many)
    windows["train"] = users, last[users] - (many[users] - 1 - nth) * stride
    return windows


def held_out(
    timeline: Timeline, windows: dict[str, tuple[np.ndarray, np.ndarray]], splits: Sequence[str], size: int
) -> np.ndarray:
    """bool [ratings of the timeline]: in the window of a list of one of these splits."""
    held = np.zeros(len(timeline.item), dtype=bool)
    for split in splits:
        users, starts = windows[split]
        for k in range(size):
            held[timeline.offsets[users] + starts + k] = True
    return held


def _whole_user_slices(offsets: np.ndarray, rows: int) -> list[slice]:
    """Pieces of about `rows` rows that end between two users."""
    cuts = [0]
    while cuts[-1] < offsets[-1]:
        user = np.searchsorted(offsets, cuts[-1] + rows, side="right") - 1
        cuts.append(int(offsets[user]) if offsets[user] > cuts[-1] else int(offsets[offsets > cuts[-1]][0]))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _with_statistics(
    items: pl.DataFrame, timeline: Timeline, windows: dict[str, tuple[np.ndarray, np.ndarray]], options: ListOptions
) -> pl.DataFrame:
    held = held_out(timeline, windows, ("valid", "test"), options.list_size)
    count, mean = train_statistics(timeline.item[~held], timeline.rating[~held], items.height)
    return items.with_columns(train_count=count, train_mean=mean)


class Cutter:
    """Windows -> rows of LIST_SCHEMA. user_hash, item_hash: `hash_ids` of user_ids, and of the catalogue's ids."""

    def __init__(
        self,
        timeline: Timeline,
        user_ids: pl.Series,
        user_hash: np.ndarray,
        item_hash: np.ndarray,
        options: ListOptions,
        negatives: Negatives | None,
    ):
        self.timeline, self.user_ids, self.item_hash = timeline, user_ids, item_hash
        self.user_hash, self.options, self.negatives = user_hash, options, negatives

    def frame(self, users: np.ndarray, starts: np.ndarray) -> pl.DataFrame:
        pieces = range(0, len(users), CHUNK_LISTS)
        frames = [self._rows(users[a : a + CHUNK_LISTS], starts[a : a + CHUNK_LISTS]) for a in pieces]
        return pl.concat(frames) if frames else pl.DataFrame(schema=LIST_SCHEMA)

    def _rows(self, users: np.ndarray, starts: np.ndarray) -> pl.DataFrame:
        timeline, options = self.timeline, self.options
        first = timeline.offsets[users] + starts
        window = first[:, None] + np.arange(options.list_size)
        candidates, ratings = timeline.item[window], timeline.rating[window]
        list_key = splitmix64(splitmix64(self.user_hash[users] + np.uint64(options.seed)) + starts.astype(np.uint64))
        if self.negatives:
            drawn = self.negatives.draw(users, list_key)
            candidates = np.concatenate([candidates, drawn], axis=1)
            grade = 0.0 if options.ungraded == "as_zero" else np.nan
            ratings = np.concatenate([ratings, np.full(drawn.shape, grade, np.float32)], axis=1)
        all_equal = np.nanmin(ratings, axis=1) == np.nanmax(ratings, axis=1)
        presented = np.argsort(splitmix64(list_key[:, None] ^ self.item_hash[candidates]), axis=1, kind="stable")
        history = first[:, None] + np.arange(-options.history_length, 0)
        history = np.maximum(history, 0)  # rows before the user's first are cut off below
        return pl.DataFrame(
            {
                "user_id": self.user_ids.gather(users),
                "start": starts,
                "history": timeline.item[history],
                "history_ratings": timeline.rating[history],
                "candidates": np.take_along_axis(candidates, presented, axis=1),
                "ratings": np.take_along_axis(ratings, presented, axis=1),
                "all_equal": all_equal,
                "first_time": timeline.time[window[:, 0]],
                "last_time": timeline.time[window[:, -1]],
            }
        ).select(
            pl.format("{}-{}", "user_id", "start").alias("list_id"),
            "user_id",
            *(pl.col(name).arr.to_list().list.tail(pl.col("start")) for name in ("history", "history_ratings")),
            pl.col("candidates").arr.to_list(),
            pl.col("ratings").arr.to_list().list.eval(pl.element().fill_nan(None)),
            "all_equal",
            "first_time",
            "last_time",
        )


class Negatives:
    """Items a user never rated, drawn by hash: the same for the same list whatever else is prepared beside it."""

    def __init__(self, timeline: Timeline, train_count: np.ndarray, item_hash: np.ndarray, options: ListOptions):
        self.offsets, self.timeline, self.item_hash = timeline.offsets, timeline, item_hash
        self.per_list = options.negatives
        self.draws = ItemDraws(train_count, options.negatives_by)
        self.items = len(train_count)
        user = np.repeat(np.arange(len(timeline.offsets) - 1, dtype=np.uint64), np.diff(timeline.offsets))
        self.rated = user * np.uint64(self.items) + timeline.item
        self.rated.sort()
        most = int(np.add.reduceat(train_count[timeline.item] > 0, timeline.offsets[:-1], dtype=np.int64).max())
        eligible = len(self.draws.eligible)
        if eligible - most < options.negatives:
            raise AlroFastError(
                f"--negatives {options.negatives} is too many: one user rated {most:,} of the {eligible:,} "
                "items that have training ratings; lower --negatives"
            )

    def draw(self, users: np.ndarray, list_key: np.ndarray) -> np.ndarray:
        """uint32 [lists, negatives], distinct within a list, none rated by its user."""
        drawn = np.zeros((len(users), self.per_list), dtype=np.uint32)
        pending = np.ones(drawn.shape, dtype=bool)
        slots = np.arange(self.per_list, dtype=np.uint64)
        for turn in range(MAX_DRAWS):
            rows = np.flatnonzero(pending.any(1))
            if not len(rows):
                return drawn
            salt = slots + np.uint64(turn * self.per_list + 1)
            key = splitmix64(list_key[rows, None] ^ splitmix64(salt)[None, :])
            fresh = self.draws.at(uniform(key)).astype(np.uint32)
            drawn[rows] = np.where(pending[rows], fresh, drawn[rows])
            pending[rows] &= self._taken(users[rows], drawn[rows], pending[rows])
        for row in np.flatnonzero(pending.any(1)):
            self._fill(drawn[row], pending[row], users[row], list_key[row])
        return drawn

    def _taken(self, users: np.ndarray, drawn: np.ndarray, pending: np.ndarray) -> np.ndarray:
        """Which draws the user has rated, or stand earlier in the same list."""
        pair = users[:, None].astype(np.uint64) * np.uint64(self.items) + drawn
        at = np.minimum(np.searchsorted(self.rated, pair), len(self.rated) - 1)
        bad = self.rated[at] == pair
        order = np.argsort(drawn.astype(np.uint64) * np.uint64(2) + pending, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        repeats = np.zeros(drawn.shape, dtype=bool)
        repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        np.put_along_axis(bad, order, np.take_along_axis(bad, order, axis=1) | repeats, axis=1)
        return bad

    def _fill(self, drawn: np.ndarray, pending: np.ndarray, user: int, key: np.uint64) -> None:
        """The rare list whose draws kept failing: choose among all that is left."""
        rated = self.timeline.item[self.offsets[user] : self.offsets[user + 1]]
        left = np.setdiff1d(self.draws.eligible, np.concatenate([rated, drawn[~pending]]))
        order = np.argsort(splitmix64(self.item_hash[left] ^ key), kind="stable")
        drawn[pending] = left[order[: pending.sum()]]
