"""Several scorings of the same candidates into one."""

from __future__ import annotations

import numpy as np

MERGES = ("mean", "borda", "kemeny")
EXACT_KEMENY = 10  # candidates; above, Borda improved by adjacent swaps


def merge(scores: np.ndarray, by: str = "mean") -> np.ndarray:
    """float64 [B, m] scores, higher is better -> [m].

    mean: of the scores. borda: minus the mean place. kemeny: minus the place in the order that disagrees with the
    fewest pairs of the B orders (Kemeny 1959), exact for up to EXACT_KEMENY candidates.
    """
    if by == "mean" or len(scores) == 1:
        return scores.mean(axis=0)
    places = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    if by == "borda":
        return -places.mean(axis=0)
    order = kemeny_order(places)
    return -np.argsort(order).astype(np.float64)


def kemeny_order(places: np.ndarray) -> np.ndarray:
    """The order [m], best first, with the fewest disagreeing pairs over the B rows of `places` [B, m] (0 = best)."""
    against = (places[:, :, None] > places[:, None, :]).sum(axis=0)  # [i, j]: rows that put j before i
    if places.shape[1] <= EXACT_KEMENY:
        return _exact(against)
    return _improve(np.argsort(places.mean(axis=0), kind="stable"), against)


def _exact(against: np.ndarray) -> np.ndarray:
    """Held-Karp over sets: best[S] = cheapest order of the candidates of S, put first."""
    m = len(against)
    best = np.zeros(1 << m)
    last = np.zeros(1 << m, dtype=np.int64)
    member = (np.arange(1 << m)[:, None] >> np.arange(m)) & 1  # [sets, m]
    broken = member @ against  # [S, i]: (row, candidate of S) pairs that put i first, should i come after all of S
    for subset in range(1, 1 << m):
        items = np.flatnonzero(member[subset])
        before = subset ^ (1 << items)
        costs = best[before] + broken[before, items]
        choice = int(np.argmin(costs))
        best[subset], last[subset] = costs[choice], items[choice]
    order, subset = [], (1 << m) - 1
    while subset:
        order.append(last[subset])
        subset ^= 1 << int(last[subset])
    return np.array(order[::-1])


def _improve(order: np.ndarray, against: np.ndarray) -> np.ndarray:
    """Swap neighbours while that lowers the number of disagreeing pairs."""
    order = order.copy()
    changed = True
    while changed:
        changed = False
        for place in range(len(order) - 1):
            i, j = order[place], order[place + 1]
            if against[i, j] > against[j, i]:
                order[[place, place + 1]] = j, i
                changed = True
    return order
