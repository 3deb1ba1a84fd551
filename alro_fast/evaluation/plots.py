"""The report's plots and the numbers behind them. matplotlib (the `plots` extra) is imported when one is drawn."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import AlroFastError
from ..objectives.base import descriptions
from . import metrics
from .results import LABELS

if TYPE_CHECKING:
    from ..data.first_stage.build import Hinted

COLOURS = {
    "random": "#9aa0a6",
    "popularity": "#c58b2a",
    "mean_rating": "#7a5195",
    "shrunk_mean": "#9467bd",
    "biased_mf": "#5254a3",
    "lambdamart": "#2c3e8f",
    "sasrec": "#a55194",
    "retriever": "#8c564b",
    "generate": "#d45087",
    "untuned": "#5b8fd0",
    "tuned": "#1a9850",
    "fused": "#0b5d33",
    "oracle": "#333333",
    "hints": "#bcbd22",
    "pointwise": "#17a2b8",
    "pairwise": "#b07aa1",
    "listwise": "#e377c2",
}


class Picture(NamedTuple):
    """A title, and a PNG as a data: URL, which travels inside the page."""

    title: str
    source: str


class Plots:
    """PNG files in `folder`, and each as a picture for the page."""

    def __init__(self, folder: Path) -> None:
        try:
            import matplotlib
        except ImportError as error:
            raise AlroFastError("plots need matplotlib; install it with: pip install 'alro-fast[plots]'") from error
        matplotlib.use("Agg")
        self.folder = folder

    def draw(self, name: str, title: str, plot: Callable[[Any, Any], bool], data: Any) -> Picture | None:
        """The picture, or None when `plot(axes, data)` found nothing to draw."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 3.9), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        if not plot(axes, data):
            return None
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{name}.png"
        figure.savefig(path, metadata={"Software": None})
        code = base64.b64encode(path.read_bytes()).decode()
        return Picture(title, f"data:image/png;base64,{code}")


def ndcg_plot(axes: Any, results: dict) -> bool:
    """Means with their intervals, by cutoff; one mark per ranker."""
    names = rankers(results)
    cutoffs = cutoffs_of(results)
    step = min(0.11, 0.8 / max(len(names), 1))  # the marks of a cutoff stay by themselves
    for at, name in enumerate(names):
        means = np.array([results[name][f"ndcg@{k}"] for k in cutoffs], dtype=np.float64)
        ends = np.array([results[name][f"ndcg@{k}_interval"] for k in cutoffs], dtype=np.float64)
        reach = np.nan_to_num(np.abs(ends.T - means))  # no interval: nothing to reach
        place = np.arange(len(cutoffs)) + (at - (len(names) - 1) / 2) * step
        axes.errorbar(
            place,
            means,
            yerr=reach,
            fmt="o",
            markersize=5,
            capsize=3,
            color=COLOURS.get(name),
            label=LABELS.get(name, name),
        )
    axes.set_xticks(range(len(cutoffs)), [f"NDCG@{k}" for k in cutoffs])
    axes.legend(frameon=False, fontsize=9, ncols=min(len(names), 6), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return bool(names)


def position_plot(axes: Any, data: tuple[list[dict], Sequence[str]]) -> bool:
    """Score minus the list's mean score, averaged by the place a candidate was shown at: flat for a fair model.

    data: predictions, and whose scores of them to show.
    """
    predictions, names = data
    by_ranker = {name: mean_by_position(predictions, name) for name in names}
    for name, (means, errors) in by_ranker.items():
        if len(means) > 1:
            places = np.arange(1, len(means) + 1)
            axes.plot(places, means, marker="o", markersize=4, color=COLOURS[name], label=name)
            axes.fill_between(
                places, means - 1.96 * errors, means + 1.96 * errors, color=COLOURS[name], alpha=0.15, linewidth=0
            )
    if not axes.lines:
        return False
    axes.axhline(0, color="#9aa0a6", linewidth=1)
    axes.set_xlabel("place on the page, 1 = first candidate shown")
    axes.set_ylabel("score - mean of its list")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    return True


def order_plot(axes: Any, predictions: list[dict]) -> bool:
    """How often each list's order agrees with itself, from its presentations."""
    taus = {name: order_taus(predictions, name) for name in ("untuned", "tuned")}
    taus = {name: values for name, values in taus.items() if len(values)}
    if not taus:
        return False
    names = list(taus)
    axes.hist(
        list(taus.values()), bins=np.linspace(-1, 1, 21), color=[COLOURS[name] for name in names], label=names,
        weights=[np.full(len(values), 1 / len(values)) for values in taus.values()],
    )  # fmt: skip
    axes.set_xlabel("mean Kendall tau of a list (1: the order of presentation never matters)")
    axes.set_ylabel("share of lists")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return True


def loss_plot(axes: Any, history: list[dict]) -> bool:
    """The loss and its parts by optimiser step; nothing for a single point."""
    parts = {"loss": "loss"}
    for objective in descriptions().values():
        parts |= objective.logs
    return _curves(axes, history, parts)


def validation_plot(axes: Any, history: list[dict]) -> bool:
    """NDCG on the validation lists by optimiser step; nothing for a single point."""
    return _curves(axes, history, {f"eval_ndcg@{k}": f"NDCG@{k}" for k in metrics.CUTOFFS})


def _curves(axes: Any, history: list[dict], keys: dict[str, str]) -> bool:
    for key, label in keys.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3.5, label=label)
    if not axes.lines:
        return False
    axes.set_xlabel("optimiser step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    return True


def mean_by_position(predictions: list[dict], ranker: str) -> tuple[np.ndarray, np.ndarray]:
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


def order_taus(predictions: list[dict], ranker: str) -> np.ndarray:
    """Per list that was presented several times: mean Kendall tau over the pairs of its presentations."""
    taus = []
    for document in predictions:
        shown = document["rankings"].get(ranker, {}).get("presentations", [])
        pairs = list(itertools.combinations([each["scores"] for each in shown], 2))
        if pairs:
            taus.append(np.mean(metrics.kendall_tau(*(np.array(side) for side in zip(*pairs, strict=True)))))
    return np.array([tau for tau in taus if not np.isnan(tau)])


def rankers(results: dict) -> list[str]:
    """Names of the rankers in results.json, in its order."""
    return [name for name in results if name != "about"]


def cutoffs_of(results: dict) -> list[int]:
    """Cutoffs of NDCG in results.json."""
    found = next(iter(results.values()))
    return [int(key.split("@")[1]) for key in found if key.startswith("ndcg@") and "_" not in key]


def sampling_plot(axes: Any, built: Hinted) -> bool:
    """Share of users by number of likes: all that can be drawn, the pool, and the users drawn."""
    likes = built.like_count
    everyone = np.flatnonzero(built.sample.cluster >= 0)
    pool = np.repeat(np.arange(len(likes)), built.sample.pool)
    bins = np.geomspace(likes[everyone].min(), likes[everyone].max() + 1, 25)
    groups = {"all users": everyone, "pool": pool, "drawn": built.sample.drawn}
    for (label, users), colour in zip(groups.items(), ("#9aa0a6", "#5b8fd0", "#1a9850"), strict=True):
        weights = np.full(len(users), 1 / len(users))
        axes.hist(likes[users], bins=bins, weights=weights, histtype="step", linewidth=1.8, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("training likes of a user")
    axes.set_ylabel("share of users")
    axes.legend(frameon=False, fontsize=9)
    return True
