"""The numbers behind the report's figures, from the files of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...ranking.hybrid import constants_of
from ...run_folder import as_now_called
from .. import metrics
from ..results import BASELINES, LABELS


def rankers(results: Mapping[str, Any]) -> list[str]:
    """Names of the rankers in results.json, in its order."""
    return [name for name in results if name != "about"]


def headline(results: Mapping[str, Any]) -> str:
    """The metric a comparison in one number is made by; files of before this was recorded: as then."""
    about = results["about"]
    return str(about.get("headline", "ndcg@5" if "ceiling" in about else "ndcg@3"))


def varying(results: Mapping[str, Any], wanted: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """The metrics that tell rankers apart, and those that cannot (HR@10 of ten candidates): name -> what all have."""
    names, kept, same = rankers(results), [], {}
    for metric in wanted:
        values = {results[name][metric] for name in names}
        if len(names) > 1 and len(values) == 1 and None not in values:
            same[metric] = values.pop()
        else:
            kept.append(metric)
    return kept, same


def best_without_a_model(results: Mapping[str, Any]) -> str | None:
    """The ranker that needs no model and has the highest headline, beside a tuned model; None: there is none."""
    metric = headline(results)
    plain = [name for name in BASELINES if name in results]
    measured = [name for name in plain if results[name].get(metric) is not None and "tuned" in results]
    return max(measured, key=lambda name: results[name][metric], default=None)


def placed_rankers(results: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Whose scores are shown by place, and what to know of them.

    A hybrid whose constants have a weight for the place in the list as given (those of the code: 0.05) counts it by
    definition: its listwise task alone tells whether the model itself looks at the place.
    """
    made = re.match(r"method hybrid \((.+?) constants", results["about"].get("conventions", {}).get("rankings", ""))
    constants = as_now_called({"hybrid": made[1]})["hybrid"] if made else "figure"
    if not constants_of(constants).order:
        return ("untuned", "tuned"), ""
    note = (
        "The hybrid's own scores are not shown: they count the place in the list as given by definition. Unless "
        "presentations were shuffled that is the first stage's order, so that a slope of the listwise task may be "
        "merit as well."
    )
    return ("listwise",), note


def told_by(results: Mapping[str, Any], key: str) -> dict[str, float]:
    """A figure per ranker, of those that have it."""
    found = {name: results[name].get(key) for name in rankers(results)}
    return {name: tau for name, tau in found.items() if tau is not None}


def only_validation(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The validation's figures where there was one alone, too few for a curve."""
    measured = [entry for entry in history if any(key.startswith("eval_ndcg@") for key in entry)]
    return measured[0] if len(measured) == 1 else None


def speed_rows(results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Lists per second when ranking and training, and the peak memory: what, how much, of what."""
    rows = [
        (f"ranking, {LABELS.get(name, name)}", float(results[name]["lists_per_second"]), "lists/s")
        for name in rankers(results)
        if results[name].get("lists_per_second") is not None
    ]
    if results["about"].get("peak_memory_gib") is not None:
        rows.append(("ranking, peak memory", results["about"]["peak_memory_gib"], "GiB"))
    for key, label, unit in (
        ("lists_per_second", "training, median", "lists/s"),
        ("unique_tokens_per_second", "training, median", "distinct tokens/s"),
        ("sharing_ratio", "training, tokens without sharing / with it", "x"),
    ):
        values = [entry[key] for entry in history if key in entry]
        if values:
            rows.append((label, float(np.median(values)), unit))
    return rows


def mean_by_position(predictions: Sequence[Mapping[str, Any]], ranker: str) -> tuple[np.ndarray, np.ndarray]:
    """Per place on the page: mean and standard error of (score - mean score of the list) over all presentations."""
    rows = []
    for document in predictions:
        prediction = document["rankings"].get(ranker)
        if prediction is None:
            continue
        plain = {"shown": range(len(document["candidates"])), "scores": prediction["scores"]}
        for shown in prediction.get("presentations", [plain]):
            scores = np.asarray(shown["scores"], dtype=np.float64)
            rows.append((scores - scores.mean())[list(shown["shown"])])
    table = metrics.pad(rows)
    counts = (~np.isnan(table)).sum(axis=0)
    means = np.nansum(table, axis=0) / np.maximum(counts, 1)
    spread = np.sqrt(np.nansum((table - means) ** 2, axis=0) / np.maximum(counts - 1, 1))
    return means, spread / np.sqrt(np.maximum(counts, 1))


def order_taus(predictions: Sequence[Mapping[str, Any]], ranker: str) -> np.ndarray:
    """Per list that was presented several times: mean Kendall tau over the pairs of its presentations."""
    taus = []
    for document in predictions:
        shown = document["rankings"].get(ranker, {}).get("presentations", [])
        pairs = list(itertools.combinations([each["scores"] for each in shown], 2))
        if pairs:
            taus.append(np.mean(metrics.kendall_tau(*(np.array(side) for side in zip(*pairs, strict=True)))))
    return np.array([tau for tau in taus if not np.isnan(tau)])


def gain_of(results: Mapping[str, Any]) -> str:
    """The gain that NDCG was measured with."""
    convention = results["about"].get("conventions", {}).get("gain", "")
    return "linear" if "ceiling" in results["about"] or convention == "the rating itself" else "exp2"
