"""near: what a user's own ratings of the items most alike say of an item; item-based neighbours on residuals.

    e(v, i) = r(v, i) - mean - b_i - b_v,      b by ROUNDS alternating shrunk means
    sim(c, h) = max(0, sum_v e(v, c) e(v, h)) / (sqrt(sum_v e(v, c)^2 sum_v e(v, h)^2) + SHRINKAGE)
    m(h) = r(u, h) - mean - b_h, less sum_h (r(u, h) - mean - b_h) / (n + BIAS_PRIOR)
    near(u, c) = sum_h sim(c, h) m(h) / (sum_h sim(c, h) + PRIOR),      h: the NEIGHBOURS most alike of the user's n

The v are others than u. Constants and shrinkages are our choice.
"""

from __future__ import annotations

import numpy as np

from ..errors import AlroFastError

NEIGHBOURS, SHRINKAGE, PRIOR = 40, 4.0, 0.5
BIAS_PRIOR, ROUNDS = 5.0, 6  # as many ratings that say "the mean", in the offset of an item or a user
MOST_CELLS = 250_000_000  # of the float32 table of items x users behind the similarities: 1 GB
CHUNK = 256  # lists whose similarities are taken at once


def check_cells(users: int, items: int) -> None:
    """AlroFastError where the table of similarities' residuals would not fit."""
    if users * items > MOST_CELLS:
        raise AlroFastError(
            f"--signals near compares items by a table of {items:,} items x {users:,} users, and has room for "
            f"{MOST_CELLS:,} cells; leave near out"
        )


class Residuals:
    """Residuals of some users' ratings.

    level: float64 [items], mean + b_i; user, item, value [ratings]: users numbered anew, float32.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, rating: np.ndarray, items: int) -> None:
        known, user = np.unique(user, return_inverse=True)
        mean, users = rating.mean(), len(known)
        of_item, of_user = np.bincount(item, minlength=items), np.bincount(user, minlength=users)
        b_item, b_user = np.zeros(items), np.zeros(users)
        for _ in range(ROUNDS):
            b_item = np.bincount(item, rating - mean - b_user[user], items) / (of_item + BIAS_PRIOR)
            b_user = np.bincount(user, rating - mean - b_item[item], users) / (of_user + BIAS_PRIOR)
        self.level = mean + b_item
        self.users, self.user, self.item = users, user.astype(np.uint32), item.astype(np.uint32)
        self.value = (rating - self.level[item] - b_user[user]).astype(np.float32)

    def neighbours(self) -> Neighbours:
        """What `near` is read from; a table of items x users."""
        table = np.zeros((len(self.level), self.users), np.float32)
        table[self.item, self.user] = self.value
        return Neighbours(table, self.level)


class Neighbours:
    """table: float32 [items, users], residuals, 0 where there is no rating; level: float64 [items]."""

    def __init__(self, table: np.ndarray, level: np.ndarray) -> None:
        self.table, self.level = table, level
        self.power = np.square(table).sum(axis=1)

    def near(
        self, past: np.ndarray, rating: np.ndarray, starts: np.ndarray, wanted: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Of the items wanted[l], for a user who has given rating[:starts[l]] to past[:starts[l]]."""
        above, own, found = rating - self.level[past], self.table[past], []
        for first in range(0, len(wanted), CHUNK):
            part = wanted[first : first + CHUNK]
            asked = np.concatenate(part)
            power = np.sqrt(self.power[asked][:, None] * self.power[past])
            alike = np.maximum(self.table[asked] @ own.T, 0.0) / (power + np.float32(SHRINKAGE))
            rows = np.split(alike, np.cumsum([len(items) for items in part])[:-1])
            found += [_weighted(row[:, :start], above[:start]) for row, start in zip(rows, starts[first:])]
        return found


def _weighted(alike: np.ndarray, above: np.ndarray) -> np.ndarray:
    """[candidates, ratings] similarities and what the user gave above the items' level -> near [candidates]."""
    above = above - above.sum() / (len(above) + BIAS_PRIOR)
    if len(above) > NEIGHBOURS:
        least = np.partition(alike, -NEIGHBOURS, axis=1)[:, [-NEIGHBOURS]]
        alike = np.where(alike < least, 0.0, alike)
    return alike @ above / (alike.sum(axis=1) + PRIOR)
