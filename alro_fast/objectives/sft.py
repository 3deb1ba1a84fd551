"""Supervised fine-tuning: cross-entropy of the answer tokens (docs/methods.md 1.1), for both answer forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.records import RankingList
from ..modeling.packing import Branch, PackedBatch, Tree
from ..prompts import PromptBuilder
from .base import ALWAYS, Description, Example, LossTerm

if TYPE_CHECKING:
    from ..modeling.lm_head import Head
    from ..options import ObjectiveArguments
    from ..prompts import RankingPrompt, RatingPrompt


class SFTObjective:
    """One presentation per list, as stored; loss = mean over answer tokens of -log p(token)."""

    def __init__(self, arguments: ObjectiveArguments, builder: PromptBuilder, *, answer: str, seed: int) -> None:
        self.arguments, self.builder, self.answer, self.seed = arguments, builder, answer, seed

    def orders(self, ranking_list: RankingList, index: int, epoch: int) -> list[list[int] | None]:
        """The presentations of one list; None is the order in which its candidates are stored."""
        return [None]

    def examples(self, lists: Sequence[RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """The presentations of each list as one tree: a branch for each ranking, or for each candidate's grade."""
        orders = [self.orders(source, index, epoch) for source, index in zip(lists, indices)]
        repeated = [source for source, each in zip(lists, orders) for _ in each]
        build = self.builder.rankings if self.answer == "ranking" else self.builder.rates
        views: Iterator[Any] = iter(build(repeated, [order for each in orders for order in each]))
        examples = []
        for source, each in zip(lists, orders):
            mine = tuple(next(views) for _ in each)
            branches = list(chain.from_iterable(map(branches_of, mine)))
            examples.append(Example(Tree(branches, name=f"list {source.list_id}"), mine, source))
        return examples

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[Any, dict[str, int]]:
        """Nothing beyond the labels that the packed batch carries."""
        return None, {"sft": len(packed.labels)}

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: Any) -> list[LossTerm]:
        """The mean cross-entropy, full vocabulary."""
        logprobs = head.label_logprobs(hidden, packed, backend=self.arguments.backend)
        return [LossTerm("sft", -logprobs.mean(), 1.0, len(packed.labels))]


def branches_of(view: RankingPrompt | RatingPrompt) -> list[Branch]:
    """The token branches of one presentation: one for a ranking answer, one per rated candidate for grades."""
    if hasattr(view, "branches"):
        return [
            Branch(question + branch.answer_ids, len(question))
            for branch in view.branches
            if branch.answer_ids
            for question in [view.prompt_ids + branch.question_ids]
        ]
    return [Branch(view.prompt_ids + view.answer_ids, len(view.prompt_ids))]


def answer_form(options: Mapping[str, Any]) -> str:
    """What a model learns to answer that is trained on whole lists: what `--answer` says."""
    answer: str = options.get("answer", "ranking")
    return answer


SFT = Description(
    name="sft",
    summary="cross-entropy of the answer alone; with --preferences, of the chosen answers",
    objective=SFTObjective,
    run="lists",
    prompts=PromptBuilder,
    answers=("ranking", "ratings"),
    reads={"answer": ALWAYS},
    logs={"sft": "cross-entropy"},
    learns=answer_form,
)
