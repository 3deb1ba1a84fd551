"""How good rankings are, on the same lists for every ranker: the table, results.json, predictions and TREC files."""

from __future__ import annotations

import json
import logging
import math
import textwrap
import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import numpy as np

from ..errors import AlroFastError
from . import metrics

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList
    from ..ranking.orders import Ranking

Scores = Sequence[Sequence[float] | np.ndarray]  # per list, per candidate in the list's own order; higher is better
Scorer = Scores | Callable[["Sequence[RankingList]"], Scores]

logger = logging.getLogger(__name__)
LABELS = {
    "mean_rating": "mean rating", "shrunk_mean": "shrunk mean", "biased_mf": "biased MF", "lambdamart": "LambdaMART",
    "sasrec": "SASRec", "generate": "tuned, generate", "oracle": "best possible",
}  # fmt: skip
LAST = 10  # items of a history that predictions.jsonl keeps
SIDES = ("above", "not told apart from", "below")
BASELINES = (  # what needs no language model
    "popularity", "mean_rating", "shrunk_mean", "biased_mf", "sasrec", "lambdamart", "retriever", "hints",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Every metric of every ranker per list, over the lists that have something to rank."""

    split: str
    lists: int  # lists given
    all_equal: int  # of them, set apart
    cutoffs: tuple[int, ...]
    users: np.ndarray  # [ranked lists]
    per_list: dict[str, dict[str, np.ndarray]]  # ranker -> metric -> [ranked lists]
    seconds: dict[str, float]  # ranker -> seconds for all lists, where it was timed
    conventions: dict[str, str]
    bootstrap: int = 1000  # resamples behind an interval; 0: none
    about: dict[str, Any] = field(default_factory=dict)  # what else results.json should say of the measurement
    sensitivity: dict[str, float] = field(default_factory=dict)  # ranker -> mean Kendall tau between presentations
    repeated: dict[str, float] = field(default_factory=dict)  # ranker -> mean Kendall tau with the order shown

    @property
    def headline(self) -> str:
        """The metric that a comparison in one number is made by: NDCG@3, where 3 is a cutoff."""
        return f"ndcg@{3 if 3 in self.cutoffs else self.cutoffs[-1]}"

    def mean(self, ranker: str, metric: str) -> float:
        """Mean over the ranked lists; NaN when there are none."""
        values = self.per_list[ranker][metric]
        return float(values.mean()) if len(values) else math.nan

    def means(self, ranker: str) -> dict[str, float]:
        """Every metric of one ranker: {"ndcg@1": ..., "mrr": ...}."""
        return {metric: self.mean(ranker, metric) for metric in self.per_list[ranker]}

    def interval(self, ranker: str, metric: str) -> metrics.Interval:
        """Mean with its 95 % bootstrap interval over users; NaN ends with bootstrap = 0."""
        if not self.bootstrap:
            return metrics.Interval(self.mean(ranker, metric), math.nan, math.nan)
        return metrics.bootstrap_interval(self.per_list[ranker][metric], self.users, resamples=self.bootstrap)

    def compare(self, first: str, second: str, metric: str) -> metrics.Comparison:
        """Paired difference first - second on the same lists."""
        one, two = self.per_list[first][metric], self.per_list[second][metric]
        return metrics.compare(one, two, self.users, resamples=self.bootstrap or 1000)

    def noting(self, **conventions: str) -> Self:
        """The same with more conventions."""
        return replace(self, conventions=self.conventions | conventions)

    def table(self) -> str:
        """What a command prints, in 80 columns: a row per ranker, and in a sentence what the rows say. Conventions, and
        the intervals of every metric, are in results.json and in the report."""
        ranked, users, mine = self.lists - self.all_equal, len(np.unique(self.users)), judged(self.per_list)
        lines = [f"{self.split}: {ranked} lists of {users} users, each ranker on the same lists", ""]
        header = f"{'':<15}"
        for k in self.cutoffs:
            header += f"{f'NDCG@{k}':>{8 if k < 10 else 9}}"
            header += f"{'95 %':^14}" if f"ndcg@{k}" == self.headline and self.bootstrap else ""
        lines.append(f"{header}{'difference':>11}{'p':>7}")
        for ranker in self.per_list:
            row = name_cell(ranker)
            for k in self.cutoffs:
                row += f"{self.mean(ranker, f'ndcg@{k}'):>{8 if k < 10 else 9}.4f}"
                row += self.interval_cell(ranker, self.headline) if f"ndcg@{k}" == self.headline else ""
            lines.append((row + self.difference_cells(mine, ranker, self.headline)).rstrip())
        lines += ["", *self.verdict(self.headline)]
        if self.sensitivity:
            each = (f"{name} {tau:.3f}" for name, tau in self.sensitivity.items())
            lines.append(f"order agreement (Kendall tau, 1: order never matters): {', '.join(each)}")
        lines += [*self.repeating(), *self.speed()]
        return "\n".join(lines)

    def interval_cell(self, ranker: str, metric: str) -> str:
        """The 95 % interval of a row; nothing without resamples."""
        if not self.bootstrap:
            return ""
        _, low, high = self.interval(ranker, metric)
        return f"[{_short(low)}, {_short(high)}]".center(14)

    def difference_cells(self, mine: str, other: str, metric: str) -> str:
        """`mine` minus `other` on the same lists, and its p."""
        if other in (mine, "oracle") or mine not in self.per_list or self.lists == self.all_equal:
            return ""
        change = self.compare(mine, other, metric)
        return f"{change.difference:>+11.4f}{_p(change.p_value):>7}"

    def verdict(self, metric: str) -> list[str]:
        """What the rows say of the ranker they are about, and of `fused`, in a sentence each."""
        told: dict[str, dict[str, list[str]]] = {}
        for first, second in contests(self.per_list) if self.lists > self.all_equal else ():
            if second in ("random", "untuned", "tuned", *BASELINES):
                change = self.compare(first, second, metric)
                side = (
                    "not told apart from" if change.p_value >= 0.05 else "above" if change.difference > 0 else "below"
                )
                told.setdefault(first, {}).setdefault(side, []).append(LABELS.get(second, second))
        lines = []
        for first, sides in told.items():
            parts = [f"{side} {', '.join(sides[side])}" for side in SIDES if side in sides]
            sentence = f"{metric.upper()}, {first} - row, paired over users: {first} is {'; '.join(parts)} (p < .05)"
            lines += textwrap.wrap(sentence, 80, break_on_hyphens=False)
        return lines

    def speed(self) -> list[str]:
        """Lists per second of what was timed, in a line."""
        each = [f"{LABELS.get(name, name)} {self.lists / max(t, 1e-9):.1f}" for name, t in self.seconds.items()]
        return textwrap.wrap(f"lists/s: {', '.join(each)}", 80) if each else []

    def repeating(self) -> list[str]:
        """A line that says how far rankers repeat the order shown."""
        shown = {name: tau for name, tau in self.repeated.items() if name in ("untuned", "tuned", "fused")}
        each = (f"{name} {tau:+.3f}" for name, tau in shown.items())
        return [f"order shown is repeated (Kendall tau, 1: wholly): {', '.join(each)}"] if shown else []

    def to_json(self) -> dict[str, Any]:
        """{"tuned": {"ndcg@3": mean, "ndcg@3_interval": [low, high], ...}, ..., "about": counts and conventions}."""
        document: dict[str, Any] = {}
        for ranker, measured in self.per_list.items():
            entry: dict[str, Any] = {}
            for metric in measured:
                interval = self.interval(ranker, metric)
                entry[metric] = plain(interval.mean)
                entry[f"{metric}_interval"] = [plain(interval.low), plain(interval.high)]
            if ranker in self.seconds:
                entry["lists_per_second"] = plain(self.lists / max(self.seconds[ranker], 1e-9))
            if ranker in self.sensitivity:
                entry["order_kendall_tau"] = plain(self.sensitivity[ranker])
            if ranker in self.repeated:
                entry["shown_kendall_tau"] = plain(self.repeated[ranker])
            document[ranker] = entry
        document["about"] = {
            "split": self.split,
            "lists": self.lists,
            "lists_all_equal": self.all_equal,
            "lists_ranked": self.lists - self.all_equal,
            "users_ranked": len(np.unique(self.users)),
            "headline": self.headline,
            "conventions": self.conventions,
            "comparisons": self._comparisons(),
            **self.about,
        }
        return document

    def _comparisons(self) -> list[dict[str, Any]]:
        """Of all contests, paired on the same lists."""
        made = []
        for first, second in contests(self.per_list) if self.lists > self.all_equal else ():
            for metric in (f"ndcg@{k}" for k in self.cutoffs):
                change = {name: plain(value) for name, value in self.compare(first, second, metric)._asdict().items()}
                made.append({"first": first, "second": second, "metric": metric, **change})
        return made

    def save(self, folder: str | Path) -> Path:
        """Write results.json; returns its path."""
        path = Path(folder) / "results.json"
        path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path


def evaluate_lists(
    lists: Sequence[RankingList],
    scorers: Mapping[str, Scorer],
    *,
    prepared: PreparedData | None = None,
    split: str = "test",
    cutoffs: Sequence[int] = metrics.CUTOFFS,
    gain: str = "exp2",
    bootstrap: int = 1000,
) -> Results:
    """Measure every scorer on the same lists.

    scorers: name -> scores per list and candidate (the list's own candidate order, higher is better), or a function of
    the lists that gives them, which is then timed. prepared: where the lists come from, for the tie rule it states.
    bootstrap: resamples behind an interval; 0: no intervals.
    """
    ratings = metrics.pad([entry.ratings for entry in lists])
    ranked = ~metrics.all_equal(ratings)
    per_list: dict[str, dict[str, np.ndarray]] = {}
    seconds: dict[str, float] = {}
    for name in sorted(scorers, key=row_of):
        scores = scorers[name]
        if callable(scores):
            start = time.perf_counter()
            scores = scores(lists)
            seconds[name] = time.perf_counter() - start
        _check_shape(name, scores, lists)
        per_list[name] = metrics.measure(metrics.pad(scores)[ranked], ratings[ranked], cutoffs, gain)
    apart = int((~ranked).sum())
    conventions = metrics.CONVENTIONS | {
        "gain": "2^rating - 1" if gain == "exp2" else "the rating itself",
        "lists whose ratings are all equal": f"{apart} of {len(lists)}, set apart: every order of them is perfect",
    }
    if "random" in scorers:
        conventions["random"] = "the exact mean over all orders"
    if prepared is not None:
        conventions["equal timestamps in the data"] = str(prepared.manifest.get("tie_rule", "not recorded"))
    return Results(
        split=split,
        lists=len(lists),
        all_equal=apart,
        cutoffs=tuple(cutoffs),
        users=np.array([entry.user_id for entry, keep in zip(lists, ranked, strict=True) if keep]),
        per_list=per_list,
        seconds=seconds,
        conventions=conventions,
        bootstrap=bootstrap,
    )


def write_predictions(
    path: str | Path, lists: Sequence[RankingList], rankings: Mapping[str, Sequence[Ranking]]
) -> None:
    """predictions.jsonl: a line per list with its candidates as stored, the last LAST of its history (oldest first) and
    that history's length, and, per ranker, `order` (candidate numbers from 0, best first), `scores` per candidate and,
    of a list presented several times, each presentation's order and scores.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for at, entry in enumerate(lists):
            document = {
                "list_id": entry.list_id,
                "user_id": entry.user_id,
                "candidates": [
                    {"id": item.item_id, "title": item.title, "rating": plain(rating)}
                    for item, rating in zip(entry.candidates, entry.ratings, strict=True)
                ],
                "history_length": len(entry.history),
                "history": [
                    {"title": item.title, "rating": plain(rating)}
                    for item, rating in list(zip(entry.history, entry.history_ratings, strict=True))[-LAST:]
                ],
                "rankings": {name: _prediction(each[at]) for name, each in rankings.items()},
            }
            file.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")


def _prediction(ranking: Ranking) -> dict[str, Any]:
    document: dict[str, Any] = {"order": list(ranking.order), "scores": ranking.scores.tolist()}
    if len(ranking.presented) > 1:
        document["presentations"] = [
            {"shown": shown.tolist(), "scores": scores.tolist()}
            for shown, scores in zip(ranking.presented, ranking.presentation_scores, strict=True)
        ]
    return document


def write_trec(folder: str | Path, lists: Sequence[RankingList], scores: Scores, tag: str) -> int | None:
    """run.trec and qrels.trec of the graded candidates of the lists that have something to rank, so that any TREC tool
    with the same conventions gives our means. Returns the factor that made the ratings whole numbers; None, with a
    warning and without files, when no factor up to 1000 does.

    Names are percent-encoded (the format knows no spaces). NDCG with linear gain does not change with the factor.
    """
    factor = _whole_factor(lists)
    if factor is None:
        logger.warning("no run.trec and qrels.trec: they hold whole numbers, ratings here have over three decimals")
        for name in ("run.trec", "qrels.trec"):  # of an earlier measurement in this folder
            (Path(folder) / name).unlink(missing_ok=True)
        return None
    kept = [(entry, row) for entry, row in zip(lists, scores, strict=True) if not entry.all_equal]
    folder = Path(folder)
    with (folder / "run.trec").open("w", encoding="utf-8") as run, (folder / "qrels.trec").open("w") as qrels:
        for entry, row in kept:
            graded = [i for i, rating in enumerate(entry.ratings) if not math.isnan(rating)]
            names = [quote(item.item_id, safe="") for item in entry.candidates]
            query = quote(entry.list_id, safe="")
            for rank, i in enumerate(sorted(graded, key=lambda i: -row[i]), start=1):
                run.write(f"{query} Q0 {names[i]} {rank} {float(row[i])!r} {tag}\n")
            for i in graded:
                qrels.write(f"{query} 0 {names[i]} {round(entry.ratings[i] * factor)}\n")
    return factor


def _whole_factor(lists: Sequence[RankingList]) -> int | None:
    ratings = np.unique([rating for entry in lists for rating in entry.ratings if not math.isnan(rating)])
    for factor in (1, 2, 4, 5, 10, 20, 100, 1000):
        if np.allclose(ratings * factor, np.round(ratings * factor), atol=1e-6):
            return factor
    return None


def _check_shape(name: str, scores: Scores, lists: Sequence[RankingList]) -> None:
    if len(scores) != len(lists):
        raise AlroFastError(f"scorer {name!r} gave scores for {len(scores)} lists; expected {len(lists)}")
    for row, entry in zip(scores, lists, strict=True):
        if len(row) != len(entry.candidates):
            raise AlroFastError(
                f"scorer {name!r} gave {len(row)} scores for list {entry.list_id}, which has "
                f"{len(entry.candidates)} candidates"
            )


_ROWS = ("random", *BASELINES, "untuned", "generate", "pointwise", "pairwise", "listwise", "tuned", "fused")


def judged(rankers: Container[str]) -> str:
    """The ranker that a measurement is about: the tuned model, or a base alone."""
    return "tuned" if "tuned" in rankers else "untuned"


def contests(rankers: Collection[str]) -> list[tuple[str, str]]:
    """Which rankers are compared: the judged one with every other, then `fused`, where there is one."""
    mine = judged(rankers)
    rows = sorted(rankers, key=row_of) if mine in rankers else []
    pairs = [(mine, other) for other in rows if other not in (mine, "fused")]
    return pairs + [("fused", other) for other in rows if other != "fused" and "fused" in rows]


def row_of(name: str) -> tuple[int, str]:
    """Where a ranker stands in a table: a key to sort by."""
    if name == "oracle":
        return len(_ROWS) + 1, name
    return (_ROWS.index(name) if name in _ROWS else len(_ROWS)), name


def name_cell(ranker: str) -> str:
    """The first cell of a ranker's row."""
    return f"{LABELS.get(ranker, ranker):<15}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _short(value: float) -> str:
    return "1.00" if value >= 0.9995 else f"{value:.3f}".removeprefix("0")


def plain(value: float) -> float | None:
    """A JSON number; null for NaN and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
