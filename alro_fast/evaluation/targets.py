"""Rankings of lists with one target each: a first stage's candidates, and the one item the user took next.

RecRanker's protocol (Luo et al., arXiv 2312.16018): HR@k and NDCG@k of the target among a retriever's best candidates,
over all users, a user whose target was not retrieved counting 0. Beside it the same within the lists that hold their
target, which is what a ranker can change; the retriever's own order; and the ceiling, the share of such lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run_folder import LEFT_BY_AN_EVALUATION, OF_PREFERENCES, replacing
from . import metrics
from .baselines import first_stage_scores
from .breakdown import breakdown, repeated_order
from .results import (
    Results,
    Scores,
    evaluate_lists,
    judged,
    name_cell,
    plain,
    row_of,
    write_predictions,
    write_trec,
)

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList
    from ..ranking.orders import Ranking

CUTOFFS = (1, 3, 5, 10)
OF_RANKINGS = LEFT_BY_AN_EVALUATION - OF_PREFERENCES - {"comparison"}


def has_targets(prepared: PreparedData, split: str) -> bool:
    """Whether the lists of a split are a first stage's, each for one held-out target, found or missed."""
    return split != "train" and "targets.parquet" in prepared.manifest.get("files", {})


@dataclass(frozen=True)
class TargetResults(Results):
    """Metrics per user; 0 where the list lacks its target, or there is none. `found`: bool [users], it holds it."""

    found: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def ceiling(self) -> float:
        """Share of users whose list holds their target: what a perfect ranker reaches."""
        return float(self.found.mean())

    def within(self, ranker: str, metric: str) -> float:
        """Mean over the lists that hold their target; NaN when none does."""
        return float(self.per_list[ranker][metric][self.found].mean()) if self.found.any() else math.nan

    @property
    def headline(self) -> str:
        """NDCG@5 over all users."""
        return "ndcg@5"

    def table(self) -> str:
        """As Results: HR@5 and NDCG@5 over all users, then within the lists that hold the target."""
        held, mine = int(self.found.sum()), judged(self.per_list)
        lines = [
            f"{self.split}: {self.lists} users, of whom {held} have their target among the candidates",
            "",
            f"{'':<15}{'all users':^29}{'lists with it':^18}",
            f"{'':<15}{'HR@5':>7}{'NDCG@5':>8}{'95 %' if self.bootstrap else '':^14}{'HR@5':>9}{'NDCG@5':>9}"
            f"{'difference':>11}{'p':>7}",
        ]
        for ranker in self.per_list:
            row = f"{name_cell(ranker)}{self.mean(ranker, 'hr@5'):>7.4f}{self.mean(ranker, 'ndcg@5'):>8.4f}"
            row += self.interval_cell(ranker, "ndcg@5") or f"{'':14}"
            row += "".join(_cell(self.within(ranker, name)) for name in ("hr@5", "ndcg@5"))
            lines.append((row + self.difference_cells(mine, ranker, "ndcg@5")).rstrip())
        best = _cell(1.0 if held else math.nan)
        lines.append(f"{'ceiling':<15}{self.ceiling:>7.4f}{self.ceiling:>8.4f}{'':14}{best}{best}")
        lines += ["", *self.verdict("ndcg@5"), *self.repeating(), *self.speed()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As Results, with `within_hr@3` and so on per ranker, and the ceiling in `about`."""
        document = super().to_json()
        for ranker in self.per_list:
            document[ranker] |= {f"within_{name}": plain(self.within(ranker, name)) for name in self.per_list[ranker]}
        document["about"] |= {"lists_with_their_target": int(self.found.sum()), "ceiling": self.ceiling}
        return document


def evaluate_rankers(
    lists: Sequence[RankingList],
    scores: Mapping[str, Scores],
    *,
    targets: bool,
    prepared: PreparedData | None = None,
    split: str = "test",
    gain: str = "exp2",
    bootstrap: int = 1000,
) -> Results:
    """With `targets` (has_targets): `evaluate_targets`, with the first stage's own orders; else `evaluate_lists`."""
    if targets:
        scores = first_stage_scores(lists) | dict(scores)
        return evaluate_targets(lists, scores, prepared=prepared, split=split, bootstrap=bootstrap)
    return evaluate_lists(lists, scores, prepared=prepared, split=split, gain=gain, bootstrap=bootstrap)


def save_measurement(
    folder: Path,
    results: Results,
    lists: Sequence[RankingList],
    rankings: Mapping[str, Sequence[Ranking]],
    *,
    targets: bool,
    prepared: PreparedData | None = None,
) -> Results:
    """Write results.json, predictions.jsonl and the TREC files of `tuned` (of a base alone: `untuned`) in place of
    those of an earlier measurement, whose report goes with them; the results, with what breakdown.py finds, and what
    the TREC files hold.

    TREC files of lists with targets: 1 for the target and 0 for the others; a list without its target has no lines.
    """
    with replacing(folder, OF_RANKINGS) as work:
        write_predictions(work / "predictions.jsonl", lists, rankings)
        graded = as_grades(lists) if targets else lists
        factor = write_trec(work, graded, [ranking.scores for ranking in rankings[judged(rankings)]], tag="alro_fast")
        results = _told(results, factor, lists, rankings, targets, prepared)
        results.save(work)
    return results


def _told(
    results: Results,
    factor: int | None,
    lists: Sequence[RankingList],
    rankings: Mapping[str, Sequence[Ranking]],
    targets: bool,
    prepared: PreparedData | None,
) -> Results:
    """The results with what breakdown.py finds, and what the TREC files hold."""
    if factor is None:
        held = "no run.trec and qrels.trec, which hold whole numbers: ratings have over three decimals"
    elif targets:
        held = "lists that hold their target alone, 1 for it and 0 for every other candidate"
    else:
        scale = "ratings" if factor == 1 else f"ratings x {factor}, as qrels.trec holds whole numbers,"
        held = f"{scale} of the rated candidates of lists that have something to rank"
    return replace(
        results.noting(trec=held),
        repeated={name: repeated_order(each) for name, each in rankings.items()},
        about=results.about | {"breakdown": breakdown(results, lists, prepared, targets)},
    )


def _cell(value: float) -> str:
    return "-".rjust(9) if math.isnan(value) else f"{value:>9.4f}"


def as_grades(lists: Sequence[RankingList]) -> list[RankingList]:
    """Lists of one target each with 1 for the target and 0 for every other candidate, unrated no longer."""
    return [replace(one, ratings=tuple(0.0 if math.isnan(rating) else 1.0 for rating in one.ratings)) for one in lists]


def evaluate_targets(
    lists: Sequence[RankingList],
    scores: Mapping[str, Scores],
    *,
    prepared: PreparedData | None = None,
    split: str = "test",
    bootstrap: int = 1000,
) -> TargetResults:
    """Measure every ranker's scores (per list and candidate, higher is better) on lists with one target each.

    Ties count as their mean over all orders of the tied. With `prepared` and all lists of the split, users with a
    target and without a list (they have seen every item that can be retrieved) count as misses.
    """
    absent = _users_without_a_list(prepared, split, len(lists))
    relevant = metrics.pad([one.ratings for one in as_grades(lists)])
    found = np.nanmax(relevant, axis=1, initial=0.0) > 0
    per_list: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(scores, key=row_of):
        padded = metrics.pad(scores[name])
        per_list[name] = {}
        for k in CUTOFFS:
            hits = metrics.hit_rate(padded, relevant, k, relevant=1.0)
            gains = metrics.ndcg(padded, relevant, k, "linear")
            per_list[name] |= {f"hr@{k}": np.where(found, hits, 0.0), f"ndcg@{k}": np.where(found, gains, 0.0)}
        per_list[name]["mrr"] = np.where(found, metrics.reciprocal_rank(padded, relevant, relevant=1.0), 0.0)
        per_list[name] = {metric: np.append(row, np.zeros(len(absent))) for metric, row in per_list[name].items()}
    conventions = {
        "target": "the one rated candidate; every other candidate counts as not relevant",
        "all users": "a user whose target is not among the candidates counts 0; ndcg: 1 / log2(1 + place)",
        "ties in scores": metrics.CONVENTIONS["ties in scores"],
        "interval": metrics.CONVENTIONS["interval"],
    }
    if prepared is not None:
        conventions["equal timestamps in the data"] = str(prepared.manifest.get("tie_rule", "not recorded"))
    return TargetResults(
        split=split, lists=len(lists) + len(absent), all_equal=0, cutoffs=CUTOFFS,
        users=np.array([*(entry.user_id for entry in lists), *absent]), per_list=per_list, seconds={},
        conventions=conventions, bootstrap=bootstrap, found=np.append(found, np.zeros(len(absent), dtype=bool)),
    )  # fmt: skip


def _users_without_a_list(prepared: PreparedData | None, split: str, lists: int) -> list[str]:
    """Users of targets.parquet that have no list; none where the lists measured are only some of the split's."""
    if prepared is None or prepared.targets is None or len(prepared.lists(split)) != lists:
        return []
    targets = prepared.targets
    return sorted(set(targets["user_id"].filter(targets["split"] == split)) - set(prepared.lists(split).user_ids))
