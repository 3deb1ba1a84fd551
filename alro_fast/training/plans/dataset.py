"""Ranking lists as packed batches, built when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...data.records import RankingList
from ...errors import AlroFastError
from ...modeling.packing import collate
from ...modeling.planning import EpochPlans
from ...modeling.trie import Common
from ...objectives.base import Batch, Example, Objective
from ..batches import PlannedBatches
from ..speed.costs import Costs

SIZING_CHUNK = 512


class TreeDataset(Dataset[Batch]):
    """Ranking lists as packed batches, built when asked for: an index is (epoch, the lists of one batch).

    The first epoch's trees are built once at the start for their sizes; what is drawn later may differ from them by
    some percent, so that a batch may be a little over its budget, never in the number of trees of a batch.

    common: tokens that all of them have alike, which a batch takes once. share: as `packing.collate` takes it.
    prices: by which batches of training are levelled; None: they are packed by tokens alone. An index without lists is
    a batch that counts nothing.
    """

    def __init__(
        self,
        lists: Sequence[RankingList],
        objective: Objective,
        progress: bool = False,
        share: str = "batch",
        prices: Costs | None = None,
    ) -> None:
        self.lists, self.objective, self.share = lists, objective, share
        common, extents = Common(), []
        self.unshared_tokens = self.dropped_history = 0
        starts = range(0, len(lists), SIZING_CHUNK)
        for start in tqdm(starts, desc="prompts", unit="chunk", disable=not progress or len(starts) < 4, leave=False):
            indices = list(range(start, min(start + SIZING_CHUNK, len(lists))))
            for example in objective.examples([lists[i] for i in indices], indices, epoch=0):
                extents.append(example.tree.extent(share, prices.windows if prices else (None,)))
                self.unshared_tokens += example.tree.unshared_tokens
                self.dropped_history += example.views[0].dropped_history
                if share == "batch":
                    common.add(example.tree.contexts)
        self.common = common.num_rows
        self.sizes = [extent.rows for extent in extents]
        self.answer_rows = sum(extent.answer_rows for extent in extents)
        self.costs = None if prices is None else prices.of_lists(extents, common.positions)
        self._plans: dict[tuple[int, int | None, int | None], EpochPlans] = {}

    def __len__(self) -> int:
        return len(self.lists)

    def example(self, tokenizer: Any) -> tuple[str, str]:
        """The first prompt of the first list and its answer, decoded."""
        tree = self.objective.examples([self.lists[0]], [0], epoch=0)[0].tree
        ids, start = tree.ids[0].tolist(), tree.answer_starts[0]
        return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])

    def check(self, token_budget: int, option: str = "--tokens_per_batch") -> None:
        """AlroFastError, naming the list, when one list alone exceeds the budget that `option` sets."""
        longest = max(range(len(self.sizes)), key=self.sizes.__getitem__, default=None)
        if longest is not None and self.sizes[longest] > token_budget:
            raise AlroFastError(
                f"list {self.lists[longest].list_id} has {self.sizes[longest]} distinct tokens, more than "
                f"{option} {token_budget}; raise it, or shorten histories with --max_length"
            )

    def plans(self, token_budget: int, seed: int | None, most: int | None = None) -> EpochPlans:
        """The batches of every epoch, planned once; levelled where there is a seed, for training."""
        key = token_budget, seed, most
        if key not in self._plans:
            costs = None if seed is None else self.costs
            self._plans[key] = EpochPlans(self.sizes, token_budget, seed, most, self.common, costs)
        return self._plans[key]

    def __getitem__(self, index: tuple[int, list[int]]) -> Batch:
        epoch, indices = index
        if not indices:  # a process that has nothing to train in a step goes along with a list that counts nothing
            batch = self[epoch, [0]]
            return replace(batch, counts=dict.fromkeys(batch.counts, 0), lists=0, sources=[])
        examples = self.objective.examples([self.lists[i] for i in indices], indices, epoch)
        return build_batch(examples, self.objective, self.share)


def build_batch(examples: Sequence[Example], objective: Objective, share: str = "batch") -> Batch:
    """Pack the examples' trees into one stream and read the objective's targets off it."""
    packed = collate([example.tree for example in examples], range(len(examples)), share)
    targets, counts = objective.targets(packed, examples)
    return Batch(packed, targets, counts, len(examples), [example.source for example in examples])


class PlannedLoader(DataLoader[Batch]):
    """A DataLoader whose dataset returns whole batches; tells its sampler the epoch, as the Trainer expects."""

    batch_sampler: PlannedBatches

    def __init__(self, dataset: TreeDataset, batches: PlannedBatches, **options: Any) -> None:
        # a generator of its own: else every iteration would draw from the one that dropout draws from
        generator = torch.Generator().manual_seed(0)
        super().__init__(dataset, batch_sampler=batches, collate_fn=only, generator=generator, **options)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def only(batches: list[Batch]) -> Batch:
    """What the dataset returned, as a collator: whole batches already."""
    return batches[0]
