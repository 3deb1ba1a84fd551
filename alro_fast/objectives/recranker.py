"""Instruction tuning on RecRanker's three tasks, mixed (Luo et al., arXiv 2312.16018).

    loss = sum over tasks of weight * mean over the task's answer tokens of -log p(token)

A list's questions are one tree: pointwise ones follow the rated items, pairwise and listwise ones the liked ones. What
is asked, and in what order things are shown (position shifting: the two of a pair, the candidates, the history), is a
function of (seed, epoch, list) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..data.records import RankingList
from ..data.seeds import draw
from ..errors import AlroFastError
from ..modeling.packing import Branch, PackedBatch, Tree
from ..prompts.recranker import Ask, Question, RecRankerPrompts, TaskPrompts
from .base import ALWAYS, Description, Example, LossTerm

if TYPE_CHECKING:
    from ..modeling.lm_head import Head
    from ..options import ObjectiveArguments
    from ..prompts.recranker import Listing

TASKS = ("pointwise", "pairwise", "listwise")


class TaskRows(NamedTuple):
    """Which task an answer row belongs to, int64 [N] (an index into TASKS), and the rows of each task."""

    task: Tensor
    counts: tuple[int, ...]


class RecRankerObjective:
    """Questions about a list whose ratings tell the answer:

    pointwise  `points_per_list` of the rated candidates, drawn anew every epoch
    pairwise   `pairs_per_list` pairs of a liked candidate and one that is not liked, drawn alike; in either order
    listwise   the best rated five of all candidates
    """

    def __init__(
        self, arguments: ObjectiveArguments, prompts: RecRankerPrompts, *, answer: str = "tasks", seed: int = 0
    ) -> None:
        self.arguments, self.prompts, self.seed = arguments, prompts, seed
        self.weights = parse_weights(arguments.task_weights)

    def ask(self, source: RankingList, index: int, epoch: int) -> Ask:
        """The questions of one list in one epoch; none where its ratings tell no answer."""
        drawn, options = draw(self.seed, epoch, index), self.arguments
        rated = [i for i, rating in enumerate(source.ratings) if rating == rating]
        liked = self.prompts.liked(source)
        others = sorted(set(range(len(source.candidates))) - set(liked))
        pairs = [(i, j) for i in liked for j in others]
        points = sorted(drawn.sample(rated, min(options.points_per_list, len(rated))))
        pairs = drawn.sample(pairs, min(options.pairs_per_list, len(pairs)))
        order, past = list(range(len(source.candidates))), list(range(len(source.history)))
        if options.position_shifting:
            pairs = [pair if drawn.random() < 0.5 else pair[::-1] for pair in pairs]
            drawn.shuffle(order)
            drawn.shuffle(past)
        point, pair, listing = self.weights
        return Ask(
            source, points if point else [], pairs if pair else [], [order] if rated and listing else [], past
        )  # fmt: skip

    def usable(self, source: RankingList) -> bool:
        """Whether there is anything to ask about a list that its ratings answer."""
        ask = self.ask(source, 0, 0)
        return bool(ask.points or ask.pairs or ask.orders)

    def examples(self, lists: Sequence[RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """A tree per list: questions that follow the rated items, and those that follow the liked ones."""
        asks = [self.ask(source, index, epoch) for source, index in zip(lists, indices)]
        made = self.prompts.encode(asks)
        return [
            Example(Tree(branches_of(prompts), name=f"list {source.list_id}"), (prompts,), source)
            for source, prompts in zip(lists, made)
        ]

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[TaskRows, dict[str, int]]:
        """The task of every answer row."""
        task: list[int] = []
        for example in examples:
            for number, questions in enumerate(_by_task(example.views[0])):
                task += [number] * sum(len(question.answer_ids) for question in questions)
        counts = tuple(task.count(number) for number in range(len(TASKS)))
        return TaskRows(torch.tensor(task), counts), dict(zip(TASKS, counts))

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: TaskRows) -> list[LossTerm]:
        """A term per task: the mean cross-entropy of its answers' tokens, full vocabulary."""
        logprobs = head.label_logprobs(hidden, packed, backend=self.arguments.backend)
        sums = logprobs.new_zeros(len(TASKS)).index_add(0, targets.task, logprobs)
        return [
            LossTerm(name, -total / max(count, 1), weight, count)
            for name, total, weight, count in zip(TASKS, sums, self.weights, targets.counts)
        ]


def parse_weights(text: str) -> tuple[float, float, float]:
    """Weights of the pointwise, pairwise and listwise task out of text such as "1,1,1"."""
    try:
        weights = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        weights = ()
    if len(weights) != len(TASKS) or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise AlroFastError(
            f"--task_weights {text!r}: expected three numbers of at least 0, not all 0, such as 1,1,1 "
            f"({', '.join(TASKS)}); 0 leaves a task out"
        )
    pointwise, pairwise, listwise = weights
    return pointwise, pairwise, listwise


def branches_of(prompts: TaskPrompts) -> list[Branch]:
    """The questions of one list with their answers, task after task; those without an answer are left out."""
    pages = prompts.rated_ids, prompts.liked_ids, prompts.liked_ids
    return [
        Branch(page + one.ids + one.answer_ids, len(page) + len(one.ids))
        for page, questions in zip(pages, _by_task(prompts))
        for one in questions
    ]


def _by_task(prompts: TaskPrompts) -> list[list[Question | Listing]]:
    """Questions whose answer is known, by task."""
    return [[one for one in each if one.answer_ids] for each in (prompts.points, prompts.pairs, prompts.listings)]


RECRANKER = Description(
    name="recranker",
    summary="grades, pairs and best fives, mixed, with a first stage's hints (arXiv 2312.16018)",
    objective=RecRankerObjective,
    run="tasks",
    prompts=RecRankerPrompts,
    reads=dict.fromkeys(
        ("task_weights", "points_per_list", "pairs_per_list", "position_shifting", "hints", "hybrid"), ALWAYS
    ),
    logs={"pointwise": "pointwise", "pairwise": "pairwise", "listwise": "listwise"},
    learns=lambda options: "tasks",
)
