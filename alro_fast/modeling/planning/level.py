"""Batches brought to one cost: trees dealt to the batch that costs least so far, then exchanged between batches."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from itertools import chain

import numpy as np

SPREAD = 0.02  # of the mean cost, between the dearest and the cheapest batch of a levelled plan
ROUNDS = 60  # of exchanges
PARTNERS = 8  # cheapest batches that the dearest ones ask to take something
TWOS = 16  # trees of a batch that are exchanged in twos; larger batches have enough single ones to choose from
SEEN = 32  # trees of a batch that an exchange chooses from
FEW = 100_000  # choices of all pairs in twos; where there are more, most pairs are served by single trees
CHOICES = 1_000_000  # looked at together, to bound memory


def spread(batches: Sequence[list[int]], costs: np.ndarray) -> float:
    """What the dearest batch costs more than the cheapest, over the mean; empty ones left out."""
    loads = _loads([batch for batch in batches if batch], costs)
    return float((loads.max() - loads.min()) / loads.mean()) if len(loads) else 0.0


def dealt(
    trees: np.ndarray, num_batches: int, costs: np.ndarray, lengths: np.ndarray, budget: int, most: int | None
) -> list[list[int]] | None:
    """Trees dealt in the order given, each to the batch that costs least so far; None where one finds no room."""
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    room = [budget] * num_batches
    heap = [(0, b) for b in range(num_batches)]
    for tree, cost, length in zip(trees.tolist(), costs[trees].tolist(), lengths[trees].tolist()):
        full = []
        while heap and room[heap[0][1]] < length:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heap[0]
        batches[b].append(tree)
        room[b] -= length
        if len(batches[b]) == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + cost, b))
        for entry in full:
            heapq.heappush(heap, entry)
    return batches


def levelled(
    batches: Sequence[list[int]], costs: np.ndarray, lengths: np.ndarray, budget: int, most: int | None = None
) -> list[list[int]]:
    """The same trees in as many batches within the budget, their costs SPREAD of the mean apart where they can be.

    In every round all batches that are too dear are paired with cheap ones, and each pair comes as near to each other
    as an exchange of up to two trees each brings it: the batches are sorted, and those that are not level looked at.
    A function of its arguments; an empty batch stays empty.
    """
    level, held = [list(batch) for batch in batches], [b for b, batch in enumerate(batches) if batch]
    loads, idle = _loads([level[b] for b in held], costs), 0
    for number in range(ROUNDS if len(held) > 1 else 0):
        order, mean = np.argsort(loads, kind="stable"), loads.mean()
        if loads[order[-1]] - loads[order[0]] <= SPREAD * mean or idle == PARTNERS:
            break
        off = max((loads > (1 + SPREAD / 2) * mean).sum(), (loads < (1 - SPREAD / 2) * mean).sum())
        pairs = min(int(off), len(held) // 2)
        asked = min(max(pairs, PARTNERS), len(held) - pairs)
        dear, cheap = order[: -pairs - 1 : -1], order[(np.arange(pairs) + number) % asked]
        pair = [[held[b] for b in side.tolist()] for side in (dear, cheap)]
        gaps = loads[dear] - loads[cheap]
        moved = _exchange(level, pair[0], pair[1], gaps, costs, lengths, budget, most)
        loads[dear] -= moved
        loads[cheap] += moved
        idle = 0 if 20 * np.count_nonzero(moved) >= pairs else idle + 1
    return [sorted(batch) for batch in level]


def _exchange(
    level: list[list[int]],
    dear: list[int],
    cheap: list[int],
    gaps: np.ndarray,
    costs: np.ndarray,
    lengths: np.ndarray,
    budget: int,
    most: int | None,
) -> np.ndarray:
    """Between the batches dear[p] and cheap[p] of every pair, `gaps` [pairs] apart: give up to two trees for up to two,
    so that their costs come nearest. How much went over, float64 [pairs]; 0 for nothing."""
    moved = np.zeros(len(dear))
    width = min(max(len(level[b]) for b in (*dear, *cheap)), SEEN)
    twos = width <= TWOS and len(dear) * len(_handfuls(width, True)) ** 2 <= FEW
    choices = _handfuls(width, twos)
    step = max(CHOICES // len(choices) ** 2, 1)
    for start in range(0, len(dear), step):
        part = slice(start, start + step)
        sides = [_Side([level[b] for b in side[part]], choices, costs, lengths) for side in (dear, cheap)]
        less, shorter, fewer = (a[:, :, None] - b[:, None, :] for a, b in zip(sides[0].sums, sides[1].sums))
        gap, (of_dear, of_cheap) = gaps[part, None, None], [side.whole[..., None, None] for side in sides]
        fits = (less > 0) & (less < gap) & (of_cheap[1] + shorter <= budget) & (of_dear[1] - shorter <= budget)
        fits &= (fewer < of_dear[2]) & (-fewer < of_cheap[2])
        if most is not None:
            fits &= (of_cheap[2] + fewer <= most) & (of_dear[2] - fewer <= most)
        off = np.where(fits, np.abs(less - gap / 2), np.inf).reshape(len(gap), -1)
        best = off.argmin(axis=1)
        for p in np.flatnonzero(np.isfinite(off[np.arange(len(best)), best])).tolist():
            i, j = divmod(int(best[p]), len(choices))
            moved[start + p] = less[p, i, j]
            _swap(level[dear[start + p]], level[cheap[start + p]], choices[i], choices[j])
    return moved


class _Side:
    """The dear, or the cheap, batches of several pairs.

    Attributes:
        sums: cost, rows and number of trees of each choice, [pairs, choices] each.
        whole: cost, rows and number of trees of the batch, [3, pairs].
    """

    def __init__(self, batches: list[list[int]], choices: np.ndarray, costs: np.ndarray, lengths: np.ndarray) -> None:
        width = int(choices.max(initial=0)) + 1
        counts = np.array([len(batch) for batch in batches])
        flat = np.fromiter(chain.from_iterable(batches), np.int64, counts.sum())
        starts = counts.cumsum() - counts
        place = np.arange(width)
        seen = place < counts[:, None]
        trees = flat[np.where(seen, starts[:, None] + place, 0)]
        self.sums = []
        for values in (np.where(seen, costs[trees], 0), np.where(seen, lengths[trees], 0), seen.astype(np.int64)):
            self.sums.append(np.pad(values, ((0, 0), (0, 1)))[:, choices].sum(axis=2))  # -1: the pad
        self.whole = np.stack([*(np.add.reduceat(values[flat], starts) for values in (costs, lengths)), counts])


def _swap(dear: list[int], cheap: list[int], given: np.ndarray, taken: np.ndarray) -> None:
    """Exchange the trees at the places chosen; a place beyond a batch's end is none."""
    leaving, coming = ([b[k] for k in c.tolist() if 0 <= k < len(b)] for b, c in ((dear, given), (cheap, taken)))
    for batch, out, into in ((dear, leaving, coming), (cheap, coming, leaving)):
        batch[:] = [tree for tree in batch if tree not in out] + into


def _loads(batches: Sequence[list[int]], costs: np.ndarray) -> np.ndarray:
    """float64: what each costs; none is empty."""
    counts = np.array([len(batch) for batch in batches], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(batches), np.int64, counts.sum())
    return np.add.reduceat(costs[flat], counts.cumsum() - counts).astype(np.float64) if len(flat) else np.zeros(0)


@functools.cache
def _handfuls(count: int, twos: bool) -> np.ndarray:
    """[choices, 2]: none, one or two of so many places, -1 for none."""
    pairs = [[i, j] for i in range(count) for j in range(i)] if twos else []
    return np.array([[-1, -1], *([i, -1] for i in range(count)), *pairs])
