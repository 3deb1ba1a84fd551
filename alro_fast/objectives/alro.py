"""ALRO (arXiv 2403.19181): cross-entropy + soft lambda + permutation-sensitive loss (docs/methods.md 1)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..data.records import RankingList
from ..data.seeds import draw
from ..errors import AlroFastError
from ..losses import Grades, RankingLists, alro_loss
from ..losses.alro import term_weights
from ..modeling.packing import PackedBatch
from ..options import Where
from ..prompts import PromptBuilder
from .base import ALWAYS, Description, Example, LossTerm, describe_run
from .sft import SFTObjective, answer_form

if TYPE_CHECKING:
    from ..modeling.lm_head import Head
    from ..options import ObjectiveArguments


class ALROTargets(NamedTuple):
    """The lists of a batch in tensors, and what the mean of each term runs over (Python ints: no sync)."""

    lists: RankingLists
    counts: dict[str, int]


class ALROObjective(SFTObjective):
    """Each list in its stored order and in `permutations` random re-orderings, drawn anew every epoch.

    Every re-ordering is the twin of the stored order; cross-entropy and soft lambda run over all of them.
    """

    def __init__(self, arguments: ObjectiveArguments, builder: PromptBuilder, *, answer: str, seed: int) -> None:
        if answer == "ratings" and (arguments.score, arguments.score_space) != ("logprob", "candidates"):
            raise AlroFastError(
                f"--score {arguments.score} --score_space {arguments.score_space} belong to --answer ranking; grades "
                "are read as their expected value: leave both out"
            )
        super().__init__(arguments, builder, answer=answer, seed=seed)

    def orders(self, ranking_list: RankingList, index: int, epoch: int) -> list[list[int] | None]:
        """The stored order, then `permutations` others, never the identity."""
        size = len(ranking_list.candidates)
        drawn = draw(self.seed, epoch, index)
        return [None, *(permutation(size, drawn) for _ in range(self.arguments.permutations if size > 1 else 0))]

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[ALROTargets, dict[str, int]]:
        """Rows, identifiers, ratings and target ranks of every presentation, padded to the longest list."""
        # A view is one list in one order; the first view of an example is the stored order, the others are its twins.
        views = [(t, v) for t, example in enumerate(examples) for v in range(len(example.views))]
        sources = [cast(RankingList, example.source) for example in examples]
        width = max(len(source.candidates) for source in sources)
        slot_rows = torch.full((len(views), width), -1, dtype=torch.long)
        candidate_ids = torch.full((len(views), width), -1, dtype=torch.long)
        ratings = torch.full((len(views), width), torch.nan)
        ranks = torch.zeros((len(views), width), dtype=torch.long)
        twin = torch.full((len(views),), -1, dtype=torch.long)
        grades = None
        original = branch = 0  # of the example at hand: its first view's index; its first branch not yet read
        for l, (t, v) in enumerate(views):
            view = examples[t].views[v]
            m = len(sources[t].candidates)
            if v == 0:
                original, branch = l, 0
            else:
                twin[l] = original
            if self.answer == "ranking":  # a branch per view; a row for every slot of the answer
                ratings[l, :m] = torch.tensor(sources[t].ratings)
                ranks[l, :m] = torch.tensor(view.ranks)
                slot_rows[l, :m] = packed.label_rows[packed.branch_rows[t][v] + torch.tensor(view.slot_offsets)]
                candidate_ids[l, :m] = torch.tensor(view.candidate_ids)
            else:  # a branch per view and rated candidate, a row where its grade is predicted
                # An unrated candidate has no grade, hence no row: it is left out, ranks stay those of the rest.
                rated = [i for i, branch in enumerate(view.branches) if branch.answer_ids]
                ratings[l, : len(rated)] = torch.tensor([sources[t].ratings[i] for i in rated])
                ranks[l, : len(rated)] = torch.tensor([view.ranks[i] for i in rated])
                firsts = packed.branch_rows[t][branch : branch + len(rated)]
                places = [first + view.branches[i].grade_offset for i, first in zip(rated, firsts)]
                slot_rows[l, : len(rated)] = packed.label_rows[torch.tensor(places)]
                grades = Grades(torch.tensor(view.grade_ids), torch.tensor(view.grade_values))
                branch += len(rated)
        twins = sum(len(example.views) - 1 for example in examples)
        counts = {"sft": len(packed.labels), "soft_lambda": len(views), "permutation": twins}
        lists = RankingLists(slot_rows, candidate_ids, ratings, ranks, twin, grades)
        return ALROTargets(lists, counts), counts

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: ALROTargets) -> list[LossTerm]:
        """The three terms of `alro_loss`, with their weights."""
        options = self.arguments
        out = alro_loss(
            hidden, head.weight, packed.label_table, targets.lists,
            alpha=options.alpha, beta=options.beta, gamma=sharpness(options.gamma, options.score), sigma=options.sigma,
            score=options.score, score_space=options.score_space,
            psl=options.psl, psl_space=options.psl_space, psl_detach=options.psl_detach,
            psl_mask_emitted=options.psl_mask_emitted,
            **head.terms, backend=options.backend,
        )  # fmt: skip
        weights = term_weights(options.alpha, options.beta)
        return [LossTerm(name, getattr(out, name), weight, targets.counts[name]) for name, weight in weights.items()]


class Scoring(NamedTuple):
    """What the soft-argmax of an expected slot reads, and how sharply (docs/methods.md 1.2)."""

    score: str = "logprob"  # or prob, logit
    score_space: str = "candidates"  # or vocab
    gamma: float = 1.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Scoring:
        """As a run trained with these options does; the defaults for an objective that reads no `--score`."""
        if "score" not in describe_run(options).reads:
            return cls()
        score = options.get("score", "logprob")
        return cls(score, options.get("score_space", "candidates"), sharpness(options.get("gamma"), score))


def sharpness(gamma: float | None, score: str) -> float:
    """`--gamma`; where it is not given, what suits the score: at 1 the softmax of probabilities is nearly flat."""
    return gamma if gamma is not None else (10.0 if score == "prob" else 1.0)


def permutation(size: int, generator: random.Random) -> list[int]:
    """A uniform draw from the permutations of range(size) other than the identity; size >= 2."""
    identity = list(range(size))
    while True:
        order = generator.sample(identity, size)
        if order != identity:
            return order


IN_ORDER = Where("with --answer ranking", lambda o: o.answer == "ranking", ("answer",))
NORMALISED = Where(
    "with --answer ranking and a --score that is normalised, not logit",
    lambda o: o.answer == "ranking" and o.score != "logit",
    ("answer", "score"),
)
TWINS = Where("with --permutations above 0", lambda o: o.permutations > 0, ("permutations",))
SLOTWISE = Where(
    "with --answer ranking, --psl_space candidates, and --permutations and --beta above 0",
    lambda o: o.answer == "ranking" and o.psl_space == "candidates" and o.permutations > 0 and o.beta > 0,
    ("answer", "psl_space", "permutations", "beta"),
)
ALRO = Description(
    name="alro",
    summary="ranks whole lists: cross-entropy, soft lambda and permutation-sensitive loss (arXiv 2403.19181)",
    objective=ALROObjective,
    run="lists",
    prompts=PromptBuilder,
    answers=("ranking", "ratings"),
    reads={
        "answer": ALWAYS,
        "alpha": ALWAYS,
        "beta": TWINS,
        "gamma": IN_ORDER,
        "sigma": ALWAYS,
        "permutations": ALWAYS,
        "score": IN_ORDER,
        "score_space": NORMALISED,
        "psl": TWINS,
        "psl_space": TWINS,
        "psl_detach": TWINS,
        "psl_mask_emitted": SLOTWISE,
    },
    logs={"sft": "cross-entropy", "soft_lambda": "soft lambda", "permutation": "permutation"},
    learns=answer_form,
)
