"""What an objective is, and the registry of them.

An objective turns ranking lists into token trees (`examples`), the batch's trees into targets (`targets`, on the CPU,
in a loader worker), and the hidden states of the answer rows into loss terms (`loss`, on the device). A term is a mean
over `count` things; the trainer re-weights terms by their share of the whole accumulated step, so that accumulation is
exact.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.records import RankingList
from ..errors import AlroFastError
from ..modeling.packing import PackedBatch, Tree

if TYPE_CHECKING:
    from ..data.preferences import Preference
    from ..modeling.lm_head import Head
    from ..options import ObjectiveArguments
    from ..prompts import PromptBuilder
    from ..prompts.preference import PreferencePrompts
    from ..prompts.recranker import RecRankerPrompts

REGISTRY = {  # --objective -> module:class
    "sft": "sft:SFTObjective",
    "alro": "alro:ALROObjective",
    "dmpo": "dmpo:DMPOObjective",
    "sft_chosen": "dmpo:ChosenObjective",
    "recranker": "recranker:RecRankerObjective",
}


class Example(NamedTuple):
    """One ranking list, ready to train on: its tree, and what the objective needs to read the answers back."""

    trees: tuple[Tree, ...]  # one for all presentations, or one for each
    views: tuple[Any, ...]  # the presentations, in branch order
    source: RankingList | Preference

    @property
    def tree(self) -> Tree:
        """The only tree of an example that has one."""
        (tree,) = self.trees
        return tree


class LossTerm(NamedTuple):
    """`value` (a scalar) is the mean of this term over `count` things; the loss adds `weight * value`."""

    name: str
    value: Tensor
    weight: float
    count: int


@dataclass
class Batch:
    """What the loader hands to the trainer: the packed tokens, the objective's targets and what to count."""

    packed: PackedBatch
    targets: Any
    counts: dict[str, int]  # per loss term: how many things its mean runs over in this batch
    lists: int
    sources: list[RankingList | Preference]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.packed.to(device, non_blocking=non_blocking), move(self.targets, device, non_blocking),
            self.counts, self.lists, self.sources,
        )  # fmt: skip


class Objective(Protocol):
    """The interface of the files beside this one.

    An objective may also have `complete(model, batch, forward) -> Batch`, called before the forward pass: what it needs
    of the model beyond the hidden states, such as log-probabilities of a reference; `forward(packed)` runs the model.
    """

    def examples(self, lists: Sequence[RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """Trees of `lists`; whatever is drawn depends only on the seed, the epoch and each list's index."""

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[Any, dict[str, int]]:
        """What the loss needs besides hidden states, and the count behind each of its terms."""

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: Any) -> list[LossTerm]:
        """Loss terms of one packed batch; `hidden` [N, H] holds its answer rows."""


def build_objective(
    arguments: ObjectiveArguments,
    builder: PromptBuilder | PreferencePrompts | RecRankerPrompts,
    *,
    answer: str,
    seed: int,
    **more: Any,
) -> Objective:
    """The objective named by `arguments.objective`; AlroFastError for a name nobody registered."""
    if arguments.objective not in REGISTRY:
        raise AlroFastError(f"--objective {arguments.objective!r} is unknown; expected one of {', '.join(REGISTRY)}")
    module, name = REGISTRY[arguments.objective].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)(
        arguments, builder, answer=answer, seed=seed, **more
    )


def move(value: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """A tensor, or a (named) tuple of tensors and other things, with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple):
        moved = [move(entry, device, non_blocking) for entry in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
