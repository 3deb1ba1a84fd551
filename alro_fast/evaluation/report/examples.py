"""Lists to look at: where the judged ranker is best and worst, and a seeded draw of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import metrics
from ..results import judged

ENDS, DRAWN = 4, 12  # lists of either end, and of the draw


class Column(NamedTuple):
    """What one ranker made of a list."""

    ranker: str
    value: float  # the headline metric
    items: list[Mapping[str, Any]]  # best first: title, rating


class Example(NamedTuple):
    """A list, and the last of its history, oldest first."""

    list_id: str
    columns: list[Column]
    history: Sequence[Mapping[str, Any]]
    history_length: int


def examples(
    predictions: Sequence[Mapping[str, Any]], targets: bool, metric: str, gain: str = "exp2"
) -> dict[str, list[Example]]:
    """Heading -> lists that have something to rank, each once. Of equal ones, those come first in which the judged
    ranker gained (or lost) most on the untuned model.

    targets: lists are for one target each, the one rated candidate, and those that hold it are shown.
    """
    cutoff, made = int(metric.partition("@")[2]), []
    for document in predictions:
        grades = _grades(document, targets)
        if len(np.unique(grades[~np.isnan(grades)])) > 1:
            made.append(_example(document, grades, cutoff, gain))
    if not made:
        return {}
    mine = judged(predictions[0]["rankings"])
    order = sorted(range(len(made)), key=lambda at: (*_goodness(made[at], mine), at))
    ends = min(ENDS, len(made) // 4)
    worst, best = order[:ends], order[::-1][:ends]
    others = np.array(order[ends : len(order) - ends])
    drawn = sorted(np.random.default_rng(0).permutation(np.sort(others))[:DRAWN].tolist())
    found = {"Where it is best": best, "Where it is worst": worst, "Drawn at random, seed 0": drawn}
    return {heading: [made[at] for at in rows] for heading, rows in found.items() if rows}


def compared(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], names: tuple[str, str], targets: bool, metric: str,
    gain: str,
) -> dict[str, list[Example]]:  # fmt: skip
    """Heading -> the lists on which the second of two runs gained and lost most; pairs: a line of predictions each."""
    cutoff, made = int(metric.partition("@")[2]), []
    for lines in pairs:
        grades = _grades(lines[0], targets)
        if len(np.unique(grades[~np.isnan(grades)])) > 1:
            own = {name: line["rankings"][judged(line["rankings"])] for name, line in zip(names, lines)}
            made.append(_example({**lines[0], "rankings": own}, grades, cutoff, gain))
    change = np.array([example.columns[1].value - example.columns[0].value for example in made])
    order = np.argsort(change, kind="stable")
    lost, won = order[change[order] < 0][:ENDS], order[::-1][change[order[::-1]] > 0][:ENDS]
    found = {f"Most gained by {names[1]}": won, f"Most lost by {names[1]}": lost}
    return {heading: [made[at] for at in rows] for heading, rows in found.items() if len(rows)}


def _goodness(example: Example, mine: str) -> tuple[float, float]:
    value = {column.ranker: column.value for column in example.columns}
    own = value.get(mine, 0.0)
    return own, own - value.get("untuned", 0.0)


def _grades(document: Mapping[str, Any], targets: bool) -> np.ndarray:
    """float64 [candidates] that NDCG is taken over; NaN: none. targets: 1 for the rated candidate, 0 for the others."""
    ratings = np.array([np.nan if c["rating"] is None else c["rating"] for c in document["candidates"]])
    return np.where(np.isnan(ratings), 0.0, 1.0) if targets else ratings


def _example(document: Mapping[str, Any], grades: np.ndarray, cutoff: int, gain: str) -> Example:
    candidates = document["candidates"]
    columns = [
        Column(
            name,
            float(metrics.ndcg(np.array([prediction["scores"]]), grades[None], cutoff, gain)[0]),
            [candidates[i] for i in prediction["order"]],
        )
        for name, prediction in document["rankings"].items()
    ]
    history = document.get("history", ())  # files of before had none
    return Example(document["list_id"], columns, history, document.get("history_length", len(history)))
