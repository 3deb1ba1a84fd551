"""The k-core of ratings that are read again and again, one partition after the other: see sources/k_core.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ..sources.k_core import nothing_left

Pairs = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # user and item codes of the ratings, in pieces


class Core(NamedTuple):
    """Who stays: bool [users], bool [items]; a rating stays with both of its own."""

    users: np.ndarray
    items: np.ndarray


def streamed_core(pairs: Pairs, users: int, items: int, k: int) -> tuple[Core, dict[str, Any]]:
    """The k-core, and what the manifest counts of it; AlroFastError where nothing remains."""
    everything = Core(np.ones(users, dtype=bool), np.ones(items, dtype=bool))
    before, core = _sizes(pairs, everything), _core(pairs, everything, k)
    after = _sizes(pairs, core)
    if not after["ratings"]:
        raise nothing_left(k, before["ratings"], lambda k: _sizes(pairs, _core(pairs, everything, k)))
    return core, {"before": before, "after": after}


def _core(pairs: Pairs, core: Core, k: int) -> Core:
    while True:
        counts = _counts(pairs, core)
        less = Core(*(count >= k for count in counts))
        if all(np.array_equal(a & b, a) for a, b in zip(core, less)):
            return core
        core = Core(*(a & b for a, b in zip(core, less)))


def _counts(pairs: Pairs, core: Core) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of each user and of each item, of those that stay."""
    of_user, of_item = np.zeros(len(core.users), np.int64), np.zeros(len(core.items), np.int64)
    for user, item in pairs():
        rows = core.users[user] & core.items[item]
        of_user += np.bincount(user[rows], minlength=len(of_user))
        of_item += np.bincount(item[rows], minlength=len(of_item))
    return of_user, of_item


def _sizes(pairs: Pairs, core: Core) -> dict[str, int]:
    of_user, of_item = _counts(pairs, core)
    return {"users": int((of_user > 0).sum()), "items": int((of_item > 0).sum()), "ratings": int(of_user.sum())}
