"""What a finished run of a study measured, list by list (or record by record)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AlroFastError
from ..evaluation import metrics
from ..evaluation.preference_metrics import Scored
from ..evaluation.preferences import SCORES
from ..evaluation.report.files import list_of
from ..evaluation.results import Results, evaluate_lists
from ..evaluation.targets import evaluate_targets
from .plan import PlannedRun, Study
from .runs import evaluated

AGREEMENT = "order agreement"  # mean Kendall tau between presentations of a list: 1 where their order never matters
AGAIN = "remove the run's folder, and it is run again"


class Figures(NamedTuple):
    """One figure per list (or record) of one run: id -> value, id -> user, and what the users are users of."""

    values: dict[str, float]
    users: dict[str, str]
    catalogue: str

    @property
    def mean(self) -> float:
        """Over lists; NaN without any."""
        return float(np.mean(list(self.values.values()))) if self.values else float("nan")


def figures(study: Study, run: PlannedRun) -> dict[str, Figures]:
    """Measure -> figures per list of a finished run; checked against the mean that the run itself reported."""
    measured = rankings if study.ranks_lists else preferences
    found = {study.metric: measured(study, run)}
    if study.evaluate and evaluated(study, run):
        found[AGREEMENT] = agreement(study, run)
    return found


def rankings(study: Study, run: PlannedRun) -> Figures:
    """The study's metric of every ranked list, from predictions.jsonl."""
    with intact(run.measured / "results.json") as path:
        reported = _read(path)
        targets = "lists_with_their_target" in reported["about"]
    lists, scores = [], []
    results: Results
    with intact(run.measured / "predictions.jsonl") as path:
        for line in _lines(path):
            lists.append(list_of(line))
            scores.append(_ranking(line, study.ranker, run)["scores"])
        if targets:
            results, kept = evaluate_targets(lists, {study.ranker: scores}, bootstrap=0), lists
        else:
            results = evaluate_lists(lists, {study.ranker: scores}, bootstrap=0)
            kept = [one for one in lists if not one.all_equal]
    values = results.per_list[study.ranker][study.metric]
    names = [one.list_id for one in kept]
    found = Figures(
        dict(zip(names, map(float, values), strict=True)),
        {one.list_id: one.user_id for one in kept},
        _catalogue(run),
    )
    with intact(run.measured / "results.json"):
        _check(found, reported[study.ranker][study.metric], run.measured)
    return found


def preferences(study: Study, run: PlannedRun) -> Figures:
    """The study's metric of every valid record (of every pair, or user, where it is a mean over those)."""
    with intact(run.measured / "preference_results.json") as path:
        reported = _read(path)
        data = study.measured_on or next(iter(reported), "any")
        if data not in reported:
            raise AlroFastError(
                f"measured_on: {data!r} was not measured by {run.measured}: it has {', '.join(reported) or 'nothing'}"
            )
    values: dict[str, list[float]] = {}
    users: dict[str, str] = {}
    with intact(run.measured / SCORES) as path:
        for line in _lines(path):
            if line["data"] != data:
                continue
            scores = _ranking(line, study.ranker, run)
            chosen, rejected = (np.array(scores[side], dtype=np.float64) for side in ("chosen", "rejected"))
            record = Scored(line["user_id"], chosen, rejected, line["paired"])
            for name, value in _of_record(study.metric, line["record"], record):
                values.setdefault(name, []).append(value)
                users[name] = record.user_id
    found = Figures({name: float(np.mean(each)) for name, each in values.items()}, users, _catalogue(run, data))
    with intact(run.measured / "preference_results.json"):
        _check(found, reported[data][study.ranker][study.metric], run.measured)
    return found


def _of_record(metric: str, number: int, record: Scored) -> list[tuple[str, float]]:
    """What a record adds to a metric: (what the metric is a mean over, value)."""
    if metric == "valid":
        return [(str(number), float(record.valid()))]
    if not record.valid():
        return []
    if metric == "hit@1":
        return [(str(number), record.hit())]
    wins = record.wins()
    names = [record.user_id] * len(wins) if metric == "user_auc" else [f"{number}/{at}" for at in range(len(wins))]
    return list(zip(names, map(float, wins)))


def agreement(study: Study, run: PlannedRun) -> Figures:
    """Mean Kendall tau over all pairs of presentations, of every list that was shown more than once."""
    folder, values, users = study.evaluation(run), {}, {}
    with intact(folder / "results.json") as path:
        _read(path)
    with intact(folder / "predictions.jsonl") as path:
        for line in _lines(path):
            shown = [one["scores"] for one in _ranking(line, study.ranker, run).get("presentations", ())]
            pairs = list(itertools.combinations(shown, 2))
            if not pairs:
                continue
            taus = metrics.kendall_tau(*(np.array([pair[side] for pair in pairs]) for side in (0, 1)))
            if np.isfinite(taus).all() and len(taus):
                values[line["list_id"]], users[line["list_id"]] = float(np.mean(taus)), line["user_id"]
    return Figures(values, users, _catalogue(run))


def by_user(given: Figures) -> Figures:
    """The mean of every user's lists."""
    lists: dict[str, list[float]] = {}
    for name, value in given.values.items():
        lists.setdefault(given.users[name], []).append(value)
    return Figures(
        {user: float(np.mean(values)) for user, values in lists.items()}, {u: u for u in lists}, given.catalogue
    )


@contextmanager
def intact(path: Path) -> Iterator[Path]:
    """AlroFastError for a file that is gone, or that turns out within to be cut or changed."""
    try:
        yield path
    except AlroFastError:
        raise
    except FileNotFoundError:
        raise AlroFastError(f"{path} is gone; {AGAIN}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise AlroFastError(f"{path} is damaged; {AGAIN}") from None


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise TypeError(f"{path} is no object")
    return document


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _catalogue(run: PlannedRun, data: str | None = None) -> str:
    """What tells the items of a run's lists from others'; data: stands for them where a run has preferences alone."""
    with intact(run.measured / "data_manifest.json") as path:
        files = _read(path)["files"]
        return str(data if data is not None and "items.parquet" not in files else files["items.parquet"]["sha256"])


def _ranking(line: Mapping[str, Any], ranker: str, run: PlannedRun) -> dict[str, Any]:
    if ranker not in line["rankings"]:
        raise AlroFastError(f"ranker: {ranker!r} is none of {run.measured}: it has {', '.join(line['rankings'])}")
    return line["rankings"][ranker]


def _check(found: Figures, reported: float | None, folder: Path) -> None:
    mean = float("nan") if reported is None else reported
    if not np.isclose(found.mean, mean, rtol=0, atol=1e-9, equal_nan=True):
        raise AlroFastError(
            f"{folder}: predictions.jsonl gives {found.mean:.6f} where results.json reports {mean:.6f}: one "
            f"was changed; {AGAIN}"
        )
