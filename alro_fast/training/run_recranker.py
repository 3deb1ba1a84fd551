"""Training runs of objective recranker: one model for three tasks, on the lists of a first stage.

`alro_fast.train` starts these for `--objective recranker`; they differ from its runs in their prompts, in what is asked
about a list, and in the closing table, which has a row per task and one, `tuned`, for their hybrid.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.records import RankingList
from ..errors import AlroFastError
from ..objectives.base import LEARNED, Objective, build_objective
from ..objectives.recranker import RecRankerObjective, parse_weights
from ..prompts.recranker import RecRankerPrompts
from ..ranking.hybrid import of_tasks
from ..ranking.orders import Ranking
from ..ranking.ranker import Ranker
from ..ranking.tasks import TASK_METHODS
from .config import Config
from .run import Run


class RecRankerRun(Run):
    """A run of objective recranker."""

    objective: RecRankerObjective

    @staticmethod
    def settle(config: Config) -> None:
        """The hybrid adds up trained tasks alone; AlroFastError for constants that no hybrid has."""
        chosen = config.objective
        chosen.hybrid = of_tasks(chosen.hybrid, parse_weights(chosen.task_weights))

    @property
    def answers(self) -> str:
        return LEARNED[super().answers]

    def build_prompts(self) -> RecRankerPrompts:
        """Prompts of the three tasks; liked and disliked are what they were to the first stage, if it says."""
        data, made_with = self.config.data, self.prepared.manifest.get("options", {})
        return RecRankerPrompts(
            self.tokenizer, data.template, identifiers=data.identifiers, max_length=data.max_length,
            items=self.prepared.items, like=made_with.get("like"), dislike=made_with.get("dislike"),
            hints=self.config.objective.hints,
        )  # fmt: skip

    def build_objective(self) -> Objective:
        """The objective, and the ranker that measures it."""
        options = self.config.objective
        self.builder = self.build_prompts()
        self.ranker = Ranker(
            self.model, self.tokenizer, self.builder, answer="tasks", hybrid=options.hybrid,
            token_budget=self.config.budget, share=self.training.share,
        )  # fmt: skip
        return build_objective(options, self.builder, answer="tasks", seed=self.training.seed)

    def asked(self, split: str) -> Sequence[RankingList]:
        """The lists whose ratings answer a question."""
        usable = [one for one in self.lists[split] if self.objective.usable(one)]
        if split == "train" and not usable:
            raise AlroFastError(
                f"{self.prepared.path} holds no training list with a rated candidate; make one with: "
                "python -m alro_fast.first_stage"
            )
        return usable

    def rank_tuned(self, lists: Sequence[RankingList]) -> dict[str, list[Ranking]]:
        """Every task alone, and the hybrid."""
        return {
            "tuned" if method == "hybrid" else method: self.ranker.rank(lists, method=method) for method in TASK_METHODS
        }
