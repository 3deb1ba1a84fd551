"""Best-fit-decreasing bin packing of trees by their rows."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

import numpy as np

from ...errors import AlroFastError

POOL_BUDGETS = (
    64  # a seeded plan packs this many batches' worth of trees at a time, so that neighbours change with the seed
)


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
    lengths, token_budget = of_their_own(lengths, token_budget, common)
    if seed is None:
        return sorted(sorted(batch) for batch in _best_fit_decreasing(range(len(lengths)), lengths, token_budget, most))
    return shuffled_plan(lengths, token_budget, seed, most=most)


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


def of_their_own(lengths: np.ndarray, token_budget: int, common: int) -> tuple[np.ndarray, int]:
    """Sizes and budget without the rows that all trees have alike; of each tree a row is left, to be planned with."""
    common = min(common, int(lengths.min(initial=token_budget)) - 1)
    return lengths - common, token_budget - common


def shuffled_plan(
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
