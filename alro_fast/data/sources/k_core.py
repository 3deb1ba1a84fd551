"""The k-core of ratings: the users and items that keep at least k of them when all others are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...errors import AlroFastError
from .interactions import Interactions

CORE_RULE = (
    "ratings of users and items with fewer than k_core ratings are left out, again and again until every user and item "
    "has k_core of those that remain; counted over all ratings, of any value, before anything is held out; items "
    "without a rating leave the catalogue"
)


def k_core(interactions: Interactions, k: int) -> Interactions:
    """CORE_RULE. Rows, users and items keep their order; `counts` gains k_core: users, items, ratings before and after.

    k: at least 2. Raises AlroFastError when nothing remains; the line says which core is the last to hold anything.
    """
    user, item = interactions.user, interactions.item
    kept = core_rows(user, item, k)
    if not kept.any():
        raise nothing_left(k, len(user), lambda k: _sizes(user, item, core_rows(user, item, k)))
    known_users, user_codes = np.unique(user[kept], return_inverse=True)
    known_items, item_codes = np.unique(item[kept], return_inverse=True)
    sizes = {"before": _sizes(user, item, np.ones_like(kept)), "after": _sizes(user, item, kept)}
    return replace(
        interactions,
        user=user_codes.astype(np.uint32),
        item=item_codes.astype(np.uint32),
        rating=interactions.rating[kept],
        time=interactions.time[kept],
        user_ids=interactions.user_ids.gather(known_users),
        items=interactions.items[known_items],
        counts=interactions.counts | {"k_core": sizes},
    )


def core_rows(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """bool [ratings]: which belong to the k-core. user, item: codes from 0 [ratings], every pair once."""
    rows = np.arange(len(user))
    while len(rows):
        enough = [np.bincount(codes[rows])[codes[rows]] >= k for codes in (user, item)]
        both = enough[0] & enough[1]
        if both.all():
            break
        rows = rows[both]
    kept = np.zeros(len(user), dtype=bool)
    kept[rows] = True
    return kept


def nothing_left(k: int, ratings: int, sizes: Callable[[int], dict[str, int]]) -> AlroFastError:
    """The error of a core that is empty, with the last that holds anything. sizes: of the core of a number."""
    least, empty = 1, k  # 1 holds everything
    while empty - least > 1:
        middle = (least + empty) // 2
        if sizes(middle)["ratings"]:
            least = middle
        else:
            empty = middle
    held = ", ".join(f"{n:,} {name}" for name, n in sizes(least).items())
    return AlroFastError(
        f"--k_core {k} leaves nothing of {ratings:,} ratings; "
        + (f"--k_core {least} is the last that leaves anything: {held}" if least > 1 else "nor does any other")
    )


def _sizes(user: np.ndarray, item: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    return {"users": len(np.unique(user[kept])), "items": len(np.unique(item[kept])), "ratings": int(kept.sum())}
