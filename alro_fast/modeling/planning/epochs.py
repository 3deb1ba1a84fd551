"""The plans of all epochs of a run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from .best_fit import POOL_BUDGETS, of_their_own, plan_batches, shuffled_plan
from .level import SPREAD, dealt, levelled, spread

LOOSER = (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)  # times the fewest batches: full ones leave nothing to exchange
PROBED = 3  # epochs
DEALS = 4  # draws of an epoch, of which the most level is taken
MANY = 10_000  # trees, of which one draw is as level as another
SOME = 3000  # trees, by which the number of batches of more is found
COST_CLASSES = 8  # trees are dealt class after class, the dearest first


class EpochPlans:
    """Plans of every epoch over the same trees: other neighbours each time, and always the same number of batches.

    Without costs, an epoch's plan is that of `plan_batches(sizes, token_budget, seed + epoch)`, the first to the
    letter, brought to `num_batches`: packed pool by pool, one order of the trees needs a few batches more than another.
    A plan of fewer halves its batches of most trees; one of more packs its emptiest batches anew, together. That always
    suffices, because `num_batches` is no less than best-fit-decreasing over all trees needs, whatever their order.

    With costs, long and short trees meet, where packing puts like with like: a draw of the trees is dealt class after
    class of costs, each tree to the batch that costs least so far, and levelled. `num_batches` is the least of LOOSER,
    and of what gives every batch as many trees, at which every tree finds room and the first PROBED epochs are no
    further than SPREAD apart. More batches are not always more level, so each number is tried; where none does it, the
    most level of these plans and of the packed ones, levelled too, is taken. Of more than SOME trees so many show which
    number it is. The time is that of sorting: some microseconds a tree.

    Args:
        sizes: rows of each tree.
        token_budget: rows a batch may hold.
        seed: None for one plan that all epochs share (`plan_batches` without a seed).
        most: trees a batch may hold; None: as many as fit.
        common: rows that all trees have alike.
        costs: of each tree, whole numbers from 1 of any unit; None: plans are not levelled.

    Attributes:
        num_batches: of every epoch.
        fingerprint: of the arguments, for a record of what a run has made batches of.

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
        self.lengths, self.token_budget = of_their_own(np.asarray(sizes, dtype=np.int64), token_budget, common)
        self.seed, self.most, self.costs = seed, most, None if costs is None else np.asarray(costs, dtype=np.int64)
        self.num_batches = packed = max(len(first), len(densest))
        self._deals = self.costs is not None and seed is not None and self._choose(packed)
        self._last: tuple[int, list[list[int]]] | None = None
        given = [token_budget, -1 if seed is None else seed, self.num_batches, *sizes]
        given += ([] if most is None else [-most]) + ([0, common] if common else []) + [*(costs or ())]
        self.fingerprint = hashlib.sha256(np.asarray(given, np.int64).tobytes()).hexdigest()[:16]

    def __call__(self, epoch: int) -> list[list[int]]:
        """Which trees go into which batch of an epoch: every tree once, `num_batches` batches within the budget, none
        of them empty. The last one asked for is kept: samplers of a run ask for the same."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, (self._deals and self._dealt(epoch)) or self.level(self._packed(epoch))
        return self._last[1]

    def level(self, batches: list[list[int]]) -> list[list[int]]:
        """`levelled` by the costs, where there are any."""
        if self.costs is None:
            return batches
        return levelled(batches, self.costs, self.lengths, self.token_budget, self.most)

    def _choose(self, packed: int) -> bool:
        """Settle `num_batches`; whether trees are dealt to so many, rather than packed."""
        apart: dict[int, float] = {}
        for number in self._numbers(packed):
            self.num_batches = number
            apart[number] = self._apart()
            if apart[number] <= SPREAD:
                return True
        self.num_batches, least = packed, min(apart.values())
        if math.isinf(least) or spread(self.level(self._packed(0)), cast(np.ndarray, self.costs)) <= least:
            return False
        self.num_batches = min(apart, key=apart.__getitem__)
        return True

    def _numbers(self, packed: int) -> list[int]:
        """Of batches to try, fewest first: LOOSER, and what gives every batch as many trees as the others. Of more than
        SOME trees the one that so many of them, drawn, take."""
        trees = len(self.lengths)
        if trees > SOME:
            some = np.random.default_rng(self.seed).permutation(trees)[:SOME]
            own, costs = (of_trees[some].tolist() for of_trees in (self.lengths, cast(np.ndarray, self.costs)))
            few = EpochPlans(own, self.token_budget, self.seed, self.most, costs=costs)
            return [max(packed, math.ceil(few.num_batches * trees / SOME))]
        tried = {min(math.ceil(packed * more), trees) for more in LOOSER}
        alike = math.ceil(trees / max(trees // max(packed, 1), 1))
        return sorted(tried | {alike} if alike <= max(tried) else tried)

    def _apart(self) -> float:
        """`spread` of the first of the probed plans that is not level, or of the least level; infinite for none."""
        costs, apart = cast(np.ndarray, self.costs), 0.0
        for epoch in range(1 if len(self.lengths) > MANY else PROBED):
            plan = self._dealt(epoch)
            apart = max(apart, math.inf if plan is None else spread(plan, costs))
            if apart > SPREAD:
                break
        return apart

    def _dealt(self, epoch: int) -> list[list[int]] | None:
        """The most level of a few draws, up to the first that is within SPREAD; None where trees find no room."""
        costs, best, least = cast(np.ndarray, self.costs), None, math.inf
        for attempt in range(1 if len(self.lengths) > MANY else DEALS):
            plan = dealt(
                self._drawn(epoch, attempt), self.num_batches, costs, self.lengths, self.token_budget, self.most
            )
            if plan is None:
                continue
            plan = self.level(plan)
            apart = spread(plan, costs)
            best, least = (plan, apart) if apart < least else (best, least)
            if least <= SPREAD:
                break
        return best

    def _drawn(self, epoch: int, attempt: int) -> np.ndarray:
        """An order of the trees: class after class of costs, drawn within each."""
        drawn = np.random.default_rng([cast(int, self.seed), epoch, attempt]).permutation(len(self.lengths))
        classes = np.empty(len(drawn), dtype=np.int64)
        classes[np.argsort(-cast(np.ndarray, self.costs), kind="stable")] = (
            np.arange(len(drawn)) * COST_CLASSES // max(len(drawn), 1)
        )
        return drawn[np.argsort(classes[drawn], kind="stable")]

    def _packed(self, epoch: int) -> list[list[int]]:
        if self.seed is None:
            return plan_batches(self.lengths.tolist(), self.token_budget, most=self.most)
        # trees of fewer than two pools are halved: one pool of all trees is packed much alike in every epoch
        pool = POOL_BUDGETS if epoch == 0 else min(POOL_BUDGETS, -(-self.num_batches // 2))
        return shuffled_plan(self.lengths, self.token_budget, self.seed + epoch, pool, self.num_batches, self.most)
