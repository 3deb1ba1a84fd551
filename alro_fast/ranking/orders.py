"""Orders of candidates: how a list is presented, and how scores become a ranking. No model in here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..data.seeds import generator
from ..errors import AlroFastError

if TYPE_CHECKING:
    from ..data.records import RankingList

MOST_SHUFFLES = 10_000
MERGES = ("mean", "borda", "kemeny")
EXACT_KEMENY = 10  # candidates; above, Borda improved by swaps of neighbours


@dataclass(frozen=True, eq=False)
class Ranking:
    """One ordered list. `order`: candidate numbers, best first; `scores` [m] per candidate, higher is better."""

    list_id: str
    order: tuple[int, ...]
    scores: np.ndarray
    presented: np.ndarray  # int64 [B, m]: presentation b shows candidate presented[b, p] at place p
    presentation_scores: np.ndarray  # float64 [B, m] per candidate


def presentations(entry: RankingList, shuffles: int, seed: int) -> np.ndarray:
    """int64 [shuffles, m]: the stored order, then permutations that depend on (seed, list_id) alone."""
    m = len(entry.candidates)
    drawn = generator(seed, name=entry.list_id)
    return np.stack([np.arange(m), *(drawn.permutation(m) for _ in range(shuffles - 1))])


def check_presentations(shuffles: int, merge_by: str, seed: int) -> None:
    """AlroFastError for presentations that nobody can make or merge."""
    if shuffles < 1:
        raise AlroFastError(f"shuffles is at least 1; given {shuffles}")
    if shuffles > MOST_SHUFFLES:
        raise AlroFastError(f"shuffles is at most {MOST_SHUFFLES:,}; given {shuffles}")
    if seed < 0:
        raise AlroFastError(f"seed is at least 0; given {seed}")
    if seed >= 2**32:
        raise AlroFastError(f"seed is below {2**32:,}; given {seed}")
    if merge_by not in MERGES:
        raise AlroFastError(f"unknown merge {merge_by!r}; expected one of {', '.join(MERGES)}")


def check_finite(entry: RankingList, values: np.ndarray) -> None:
    """AlroFastError naming the list when a score is NaN or infinite."""
    if not np.isfinite(values).all():
        raise AlroFastError(
            f"list {entry.list_id}: the model's scores are not finite numbers; did its training diverge?"
        )


def unlabelled(entry: RankingList) -> RankingList:
    """The list without its ratings, so that none can reach a prompt; AlroFastError when it cannot be ranked."""
    if not entry.candidates:
        raise AlroFastError(f"list {entry.list_id} has no candidates; give at least one")
    seen: set[str] = set()
    for item in entry.candidates:
        if item.item_id in seen:
            raise AlroFastError(
                f"list {entry.list_id} names candidate {item.item_id!r} twice; give every candidate once"
            )
        seen.add(item.item_id)
    return replace(entry, ratings=(math.nan,) * len(entry.candidates))


def slide(lists: list[RankingList], width: int, rank: Callable[[list[RankingList]], list[Ranking]]) -> list[Ranking]:
    """Windows of `width` candidates from the end of each list to its start, half a window at a time, each ranked and
    put back: the best half of every window meets the next. `rank` orders short lists. Scores are minus the final place.
    """
    if lists and width < 2:
        raise AlroFastError(f"only {width} identifier is available; ranking a list by windows needs at least 2")
    orders = [np.arange(len(entry.candidates)) for entry in lists]
    starts = [[*range(len(order) - width, 0, -(width // 2)), 0] for order in orders]
    for turn in range(max(map(len, starts), default=0)):
        due = [i for i in range(len(lists)) if turn < len(starts[i])]
        windows = [orders[i][starts[i][turn] : starts[i][turn] + width] for i in due]
        parts = [lists[i].select(window) for i, window in zip(due, windows, strict=True)]
        for i, window, ranking in zip(due, windows, rank(parts), strict=True):
            orders[i][starts[i][turn] : starts[i][turn] + width] = window[list(ranking.order)]
    rankings = []
    for entry, order in zip(lists, orders, strict=True):
        scores = -np.argsort(order) - 1.0
        shown = np.arange(len(order))[None]
        rankings.append(Ranking(entry.list_id, tuple(order.tolist()), scores, shown, scores[None]))
    return rankings


def make_ranking(entry: RankingList, presented: np.ndarray, by_presentation: np.ndarray, merge_by: str) -> Ranking:
    """Scores of every presentation, [B, m], merged into one order; candidates that tie keep their stored order."""
    check_finite(entry, by_presentation)
    scores = merge(by_presentation, merge_by)
    order = np.argsort(-scores, kind="stable")
    return Ranking(entry.list_id, tuple(order.tolist()), scores, presented, by_presentation)


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
