"""What a mean hides: how far rankings repeat the order they were shown, and for which users and items they are good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics
from .results import BASELINES, Results, judged, plain

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList
    from ..ranking.orders import Ranking

LENGTHS = (0, 10, 20, 50, 100, 200)  # ratings known of a user: where a segment begins
SHARES = 3  # segments of lists by the popularity of their candidates, equally many lists each


def repeated_order(rankings: Sequence[Ranking]) -> float:
    """Mean Kendall tau, over lists, between a ranking's scores and the order in which its candidates were shown.

    1: it repeats that order; 0: no relation, as where candidates are shown in random order to a model that does not
    mind. A list shown several times counts with the mean over its presentations. NaN for no list of two candidates.
    """
    shown, scores, of_list = [], [], []
    for number, ranking in enumerate(rankings):
        for order, row in zip(ranking.presented, ranking.presentation_scores, strict=True):
            shown.append(-np.argsort(order).astype(np.float64))
            scores.append(row)
            of_list.append(number)
    taus = metrics.kendall_tau(metrics.pad(scores), metrics.pad(shown)) if shown else np.zeros(0)
    known = ~np.isnan(taus)
    lists = np.array(of_list, dtype=np.int64)[known]
    counts = np.bincount(lists)
    means = np.bincount(lists, weights=taus[known])[counts > 0] / counts[counts > 0]
    return float(means.mean()) if len(means) else float("nan")


def breakdown(
    results: Results, lists: Sequence[RankingList], prepared: PreparedData | None, targets: bool
) -> dict[str, list[dict[str, Any]]]:
    """Segments of the measured lists: what they are cut by -> per segment its range, lists, users and, per ranker, the
    mean of `results.headline` with its interval. A cut that leaves every list in one segment says nothing: left out.

    Rankers: the judged one, `fused`, `untuned` and the best of BASELINES. Cut by the items of the history shown; with a
    folder also by the median number of training ratings of the candidates and, but for training lists, by the ratings
    that the folder knows of the user before the lists of the split, and by whether the user has a training list.
    """
    chosen = [one for one in lists if targets or not one.all_equal]
    if not chosen:
        return {}
    found = {"items in the history shown": _by_length(results, np.array([len(one.history) for one in chosen]))}
    if prepared is not None and results.split != "train":
        known = prepared.known_ratings(results.split)["user_id"].value_counts()
        count = dict(zip(known["user_id"], known["count"]))
        found["ratings known of the user"] = _by_length(
            results, np.array([count.get(one.user_id, 0) for one in chosen])
        )
        trained = set(prepared.lists("train").user_ids)
        new = np.array([one.user_id not in trained for one in chosen])
        sides = {"new: in no training list": new, "with training lists": ~new}
        found["user"] = _segments(results, {name: np.flatnonzero(rows) for name, rows in sides.items()})
    if prepared is not None:
        rated = np.asarray(prepared.train_count)
        popularity = np.array([np.median(rated[[item.index for item in one.candidates]]) for one in chosen])
        found["training ratings of the median candidate"] = _segments(results, _ranges(popularity, _thirds(popularity)))
    return {cut: segments for cut, segments in found.items() if len(segments) > 1}


def shown_rankers(means: Mapping[str, float]) -> list[str]:
    """Of rankers and their means: the judged one, fused, untuned and the best without a model."""
    plainer = [name for name in BASELINES if name in means]
    best = sorted(plainer, key=lambda name: means[name])[-1:]
    wanted = [judged(means), "fused", "untuned", *best]
    return [name for name in dict.fromkeys(wanted) if name in means]


def _by_length(results: Results, lengths: np.ndarray) -> list[dict[str, Any]]:
    """At LENGTHS, which are the same for every data set; in thirds where all lists fall between two of them."""
    made = _segments(results, _ranges(lengths, LENGTHS))
    return made if len(made) > 1 else _segments(results, _ranges(lengths, _thirds(lengths)))


def _thirds(values: np.ndarray) -> np.ndarray:
    return np.unique(np.quantile(values, np.arange(SHARES) / SHARES, method="higher"))


def _ranges(values: np.ndarray, edges: Sequence[float] | np.ndarray) -> dict[str, np.ndarray]:
    """What a segment is called -> the rows whose value is in it."""
    return {
        f"{low:g} or more" if high == np.inf else f"{low:g} to below {high:g}": np.flatnonzero(
            (values >= low) & (values < high)
        )
        for low, high in zip(edges, [*edges[1:], np.inf], strict=True)
    }


def _segments(results: Results, rows_of: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """rows_of: of the lists with a list; `results` may have more, of users without one."""
    rankers = shown_rankers({name: results.mean(name, results.headline) for name in results.per_list})
    made = []
    for name, rows in rows_of.items():
        if not len(rows):
            continue
        users = results.users[rows]
        entry: dict[str, Any] = {"range": name, "lists": len(rows), "users": len(np.unique(users))}
        for ranker in rankers:
            own = results.per_list[ranker][results.headline][rows]
            ends = metrics.bootstrap_interval(own, users, resamples=results.bootstrap)[1:] if results.bootstrap else ()
            entry[ranker] = [plain(float(own.mean())), *(plain(end) for end in ends)]
        made.append(entry)
    return made
