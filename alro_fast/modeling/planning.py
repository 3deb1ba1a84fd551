"""Which trees go into which batch: best-fit-decreasing bin packing by rows, the same number of batches every epoch, of
training then levelled by cost.

Rows are what memory bounds, cost is what a step takes: rows, visible pairs of attention and answer rows each at their
price (`alro_fast.training.speed.costs`). Packing leaves the last batches emptier than the others; `levelled` moves and
swaps trees until all cost alike, so that no process waits for another.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from ..errors import AlroFastError

POOL_BUDGETS = (
    64  # a seeded plan packs this many batches' worth of trees at a time, so that neighbours change with the seed
)
SPREAD = 0.02  # of the mean cost, between the dearest and the cheapest batch of a levelled plan
MOST_EXCHANGES, PARTNERS = 50, 8  # of each batch; cheapest batches that are asked to take something
LOOSER = (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)  # times the fewest batches: full ones leave nothing to exchange
PROBED = 3  # epochs
DEALS = 4  # draws of an epoch, of which the most level is taken
COST_CLASSES = 8  # trees are dealt class after class, the dearest first
MOST_IN_TWOS = 16  # trees of a batch that are exchanged in twos; larger batches have enough single ones to choose from


def plan_batches(
    sizes: Sequence[int],
    token_budget: int,
    seed: int | None = None,
    names: Sequence[str] | None = None,
    most: int | None = None,
    common: int = 0,
) -> list[list[int]]:
    """Best-fit-decreasing bin packing: which trees, by index, go into which batch.

    A pure function of its arguments, so a resumed run that skips the first k batches continues the same epoch.

    Args:
        sizes: rows of each tree (`Tree.num_tokens`).
        token_budget: rows a batch may hold.
        seed: None packs everything at once, batches in the order of their smallest index. A number shuffles the trees,
            packs them pool by pool (`POOL_BUDGETS` batches' worth each: which trees meet changes with the seed) and
            shuffles the batches.
        names: what to call the trees in errors.
        most: trees a batch may hold; None: as many as fit.
        common: rows that all trees have alike (`trie.Common`), which a batch takes once.

    Raises:
        AlroFastError: a tree is larger than the budget, or the budget is not positive.
    """
    if token_budget < 1:
        raise AlroFastError(f"token_budget is {token_budget}; expected at least 1")
    lengths = np.asarray(sizes, dtype=np.int64)
    if len(lengths) and lengths.max() > token_budget:
        worst = int(lengths.argmax())
        name = names[worst] if names is not None else "tree"
        raise AlroFastError(
            f"{name} (number {worst}) takes {lengths[worst]} tokens, more than token_budget {token_budget}: a tree is "
            f"never split; raise token_budget to {lengths[worst]} or more, or shorten the history"
        )
    lengths, token_budget = _of_their_own(lengths, token_budget, common)
    if seed is None:
        return sorted(sorted(batch) for batch in _best_fit_decreasing(range(len(lengths)), lengths, token_budget, most))
    return _shuffled_plan(lengths, token_budget, seed, most=most)


class EpochPlans:
    """Plans of every epoch over the same trees: other neighbours each time, and always the same number of batches.

    With costs, batches are levelled, and their number is the first of LOOSER at which those of the first PROBED epochs
    are no further than SPREAD apart; where none of them does it, that of packing.

    An epoch's plan is that of `plan_batches(sizes, token_budget, seed + epoch)`, the first to the letter, brought to
    `num_batches`: packed pool by pool, one order of the trees needs a few batches more than another. A plan of fewer
    halves its batches of most trees; one of more packs its emptiest batches anew, together. That always suffices,
    because `num_batches` is no less than best-fit-decreasing over all trees needs, whatever their order.

    Args:
        sizes: rows of each tree.
        token_budget: rows a batch may hold.
        seed: None for one plan that all epochs share (`plan_batches` without a seed).
        most: trees a batch may hold; None: as many as fit.
        common: rows that all trees have alike.
        costs: of each tree, whole numbers of any unit; None: plans are not levelled.

    Raises:
        AlroFastError: as `plan_batches`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        token_budget: int,
        seed: int | None,
        most: int | None = None,
        common: int = 0,
        costs: Sequence[int] | None = None,
    ) -> None:
        densest = plan_batches(sizes, token_budget, most=most, common=common)
        first = densest if seed is None else plan_batches(sizes, token_budget, seed, most=most, common=common)
        self.lengths, self.token_budget = _of_their_own(np.asarray(sizes, dtype=np.int64), token_budget, common)
        self.seed, self.most, self.costs = seed, most, None if costs is None else np.asarray(costs, dtype=np.int64)
        self.num_batches = packed = max(len(first), len(densest))
        if self.costs is None or seed is None:
            return
        for more in LOOSER:
            self.num_batches = math.ceil(packed * more)
            if all(spread(self(epoch), self.costs) <= SPREAD for epoch in range(PROBED)):
                return
        self.num_batches = packed

    def __call__(self, epoch: int) -> list[list[int]]:
        """Which trees go into which batch of an epoch: every tree once, `num_batches` batches within the budget."""
        if self.costs is None or self.seed is None:
            return self.level(self._packed(epoch))
        plans = (self.level(self._dealt(epoch, attempt) or self._packed(epoch)) for attempt in range(DEALS))
        best: list[list[int]] = []
        for plan in plans:
            if not best or spread(plan, self.costs) < spread(best, self.costs):
                best = plan
            if spread(best, self.costs) <= SPREAD:
                break
        return best

    def _dealt(self, epoch: int, attempt: int) -> list[list[int]] | None:
        """Batches in which long and short trees meet, where packing puts like with like; None where they are too full.

        A draw within each class of costs keeps neighbours changing.
        """
        costs = cast(np.ndarray, self.costs)
        drawn = np.random.default_rng([cast(int, self.seed), epoch, attempt]).permutation(len(self.lengths))
        classes = np.empty(len(drawn), dtype=np.int64)
        classes[np.argsort(-costs, kind="stable")] = np.arange(len(drawn)) * COST_CLASSES // max(len(drawn), 1)
        order = drawn[np.argsort(classes[drawn], kind="stable")].tolist()
        return _dealt(order, self.num_batches, costs, self.lengths, self.token_budget, self.most)

    def level(self, batches: list[list[int]]) -> list[list[int]]:
        """`levelled` by the costs, where there are any."""
        if self.costs is None:
            return batches
        return levelled(batches, self.costs, self.lengths, self.token_budget, self.most)

    def _packed(self, epoch: int) -> list[list[int]]:
        if self.seed is None:
            return plan_batches(self.lengths.tolist(), self.token_budget, most=self.most)
        # trees of fewer than two pools are halved: one pool of all trees is packed much alike in every epoch
        pool = POOL_BUDGETS if epoch == 0 else min(POOL_BUDGETS, -(-self.num_batches // 2))
        return _shuffled_plan(self.lengths, self.token_budget, self.seed + epoch, pool, self.num_batches, self.most)


def spread(batches: Sequence[list[int]], costs: np.ndarray) -> float:
    """What the dearest batch costs more than the cheapest, over the mean; empty ones left out."""
    loads = [int(costs[batch].sum()) for batch in batches if batch]
    return (max(loads) - min(loads)) * len(loads) / sum(loads) if loads else 0.0


def levelled(
    batches: Sequence[list[int]], costs: np.ndarray, lengths: np.ndarray, budget: int, most: int | None = None
) -> list[list[int]]:
    """The same trees in as many batches within the budget, their costs SPREAD of the mean apart where they can be.

    Again and again the dearest batch and the cheapest one that takes something of it come as near to each other as an
    exchange of up to two trees each brings them. A function of its arguments; an empty batch stays empty.
    """
    level, held = [list(batch) for batch in batches], [b for b, batch in enumerate(batches) if batch]
    loads = np.array([costs[level[b]].sum() for b in held], dtype=np.float64)
    for _ in range(MOST_EXCHANGES * len(held)):
        order = np.argsort(loads, kind="stable")
        dear = order[-1]
        if loads[dear] - loads[order[0]] <= SPREAD * loads.mean():
            break
        for cheap in order[:PARTNERS]:
            pair = level[held[dear]], level[held[cheap]]
            moved = _exchange(*pair, loads[dear] - loads[cheap], costs, lengths, budget, most)
            if moved > 0:
                loads[dear] -= moved
                loads[cheap] += moved
                break
        else:
            break
    return [sorted(batch) for batch in level]


def _dealt(
    trees: Sequence[int], num_batches: int, costs: np.ndarray, lengths: np.ndarray, budget: int, most: int | None
) -> list[list[int]] | None:
    """Trees dealt in the order given, each to the batch that costs least so far; None where one finds no room."""
    dealt: list[list[int]] = [[] for _ in range(num_batches)]
    room = [budget] * num_batches
    heap = [(0, b) for b in range(num_batches)]
    for tree in trees:
        full = []
        while heap and room[heap[0][1]] < lengths[tree]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heapq.heappop(heap)
        dealt[b].append(tree)
        room[b] -= int(lengths[tree])
        for entry in full:
            heapq.heappush(heap, entry)
        if len(dealt[b]) != most:
            heapq.heappush(heap, (load + int(costs[tree]), b))
    return dealt


def _exchange(
    dear: list[int],
    cheap: list[int],
    gap: float,
    costs: np.ndarray,
    lengths: np.ndarray,
    budget: int,
    most: int | None,
) -> float:
    """Give up to two trees of one batch for up to two of the other, so that their costs come nearest; how much went
    over, 0 for nothing."""
    given, taken = _handfuls(len(dear)), _handfuls(len(cheap))
    dear_costs, dear_lengths, dear_counts = _sums(dear, given, costs, lengths)
    cheap_costs, cheap_lengths, cheap_counts = _sums(cheap, taken, costs, lengths)
    less, shorter = dear_costs[:, None] - cheap_costs, dear_lengths[:, None] - cheap_lengths
    fewer = dear_counts[:, None] - cheap_counts
    fits = (lengths[cheap].sum() + shorter <= budget) & (lengths[dear].sum() - shorter <= budget)
    fits &= (fewer < len(dear)) & (-fewer < len(cheap))
    if most is not None:
        fits &= (len(cheap) + fewer <= most) & (len(dear) - fewer <= most)
    off = np.where(fits & (less > 0) & (less < gap), np.abs(less - gap / 2), np.inf)
    i, j = np.unravel_index(off.argmin(), off.shape)
    if not np.isfinite(off[i, j]):
        return 0.0
    leaving, coming = {dear[k] for k in given[i] if k >= 0}, {cheap[k] for k in taken[j] if k >= 0}
    dear[:] = [tree for tree in dear if tree not in leaving] + sorted(coming)
    cheap[:] = [tree for tree in cheap if tree not in coming] + sorted(leaving)
    return float(less[i, j])


@functools.cache
def _handfuls(count: int) -> np.ndarray:
    """[choices, 2]: none, one or two of so many, -1 for none; of many trees no two."""
    two = [[i, j] for i in range(count) for j in range(i)] if count <= MOST_IN_TWOS else []
    return np.array([[-1, -1], *([i, -1] for i in range(count)), *two])


def _sums(
    batch: list[int], choices: np.ndarray, costs: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cost, rows and number of trees of each choice."""
    sums = [np.append(values[batch], 0)[choices].sum(axis=1) for values in (costs, lengths)]
    return sums[0], sums[1], (choices >= 0).sum(axis=1)


def halve(batches: list[list[int]], place: int) -> None:
    """Put two batches in the place of one, in their order, in the list itself."""
    middle = len(batches[place]) // 2
    batches[place : place + 1] = [batches[place][:middle], batches[place][middle:]]


def plan_forwards(sizes: Sequence[int], token_budget: int, common: int = 0) -> list[list[int]]:
    """`plan_batches` where a tree larger than the budget is no error, but a batch of its own. 0: every tree is."""
    fitting = [i for i, size in enumerate(sizes) if size <= token_budget]
    plan = plan_batches([sizes[i] for i in fitting], token_budget, common=common) if fitting else []
    alone = [[i] for i, size in enumerate(sizes) if size > token_budget]
    return sorted([[fitting[i] for i in batch] for batch in plan] + alone)


def _of_their_own(lengths: np.ndarray, token_budget: int, common: int) -> tuple[np.ndarray, int]:
    """Sizes and budget without the rows that all trees have alike; of each tree a row is left, to be planned with."""
    common = min(common, int(lengths.min(initial=token_budget)) - 1)
    return lengths - common, token_budget - common


def _shuffled_plan(
    lengths: np.ndarray,
    budget: int,
    seed: int,
    pool: int = POOL_BUDGETS,
    num_batches: int | None = None,
    most: int | None = None,
) -> list[list[int]]:
    """The plan of a seed (`plan_batches`), from pools of `pool` batches' worth; of `num_batches` if that is given."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    taken = lengths[order] if most is None else np.maximum(lengths[order], -(-budget // most))  # of a batch, by each
    pool_of = (np.cumsum(taken) - 1) // (pool * budget)
    pools = np.split(order, np.flatnonzero(np.diff(pool_of)) + 1)
    batches = [sorted(batch) for pool in pools for batch in _best_fit_decreasing(pool.tolist(), lengths, budget, most)]
    if num_batches is not None:
        batches = _condensed(batches, num_batches, lengths, budget, most)
        while len(batches) < num_batches:
            halve(batches, max(range(len(batches)), key=lambda b: len(batches[b])))
    return [batches[b] for b in generator.permutation(len(batches))]


def _condensed(
    batches: list[list[int]], limit: int, lengths: np.ndarray, budget: int, most: int | None
) -> list[list[int]]:
    """The same trees in at most `limit` batches: the emptiest are packed anew, twice as many until that suffices."""
    fullest_first = sorted(batches, key=lambda batch: -lengths[batch].sum())
    loose = len(batches) - limit
    while len(batches) > limit:
        loose = min(2 * loose, len(fullest_first))
        kept, items = fullest_first[:-loose], [item for batch in fullest_first[-loose:] for item in batch]
        batches = kept + [sorted(batch) for batch in _best_fit_decreasing(items, lengths, budget, most)]
    return batches


def _best_fit_decreasing(items: Sequence[int], lengths: np.ndarray, budget: int, most: int | None) -> list[list[int]]:
    """Largest first, each into the fullest batch that still has room; of several, into the one opened first. A batch of
    `most` trees has none."""
    batches: list[list[int]] = []
    frees: list[int] = []  # rows that some batch has free, ascending
    having: dict[int, list[int]] = {}  # free rows -> a heap of the batches that have them
    for item in sorted(items, key=lambda i: -lengths[i]):
        size = int(lengths[item])
        place = bisect.bisect_left(frees, size)
        if place < len(frees):
            free = frees[place]
            batch = heapq.heappop(having[free])
            batches[batch].append(item)
            if not having[free]:
                del having[free], frees[place]
        else:
            free, batch = budget, len(batches)
            batches.append([item])
        if len(batches[batch]) == most:
            continue
        if free - size not in having:
            having[free - size] = []
            bisect.insort(frees, free - size)
        heapq.heappush(having[free - size], batch)
    return batches
