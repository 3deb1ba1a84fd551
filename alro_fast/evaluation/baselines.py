"""Rankers that need no language model, to stand beside one. Those that are fitted: fitted_baselines.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.oracle import read_oracle
from ..data.signals import AVERAGE_PRIOR
from ..errors import AlroFastError
from .fitted_baselines import QUICK_RATINGS, lambdamart_scores, rating_model_scores, sasrec_scores
from .results import Scores

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList

WHICH = ("cheap", "all", "none")


def check_which(which: str) -> None:
    """AlroFastError for what --baselines does not take."""
    if which not in WHICH:
        raise AlroFastError(f"--baselines {which!r}: expected one of {', '.join(WHICH)}")


def baseline_scores(
    prepared: PreparedData,
    lists: Sequence[RankingList],
    which: str = "cheap",
    *,
    split: str = "test",
    notice: Callable[[str], None] = print,
) -> dict[str, Scores]:
    """Rankers that need no language model, on lists of one split.

    random: all tied, so that averaged ties give its exact mean. popularity: training ratings of the item. mean_rating:
    its mean in training (never rated there: the mean of all training ratings). shrunk_mean: with AVERAGE_PRIOR ratings
    more that say the mean of all. hints: the order of the hints, where every list has them. biased_mf, lambdamart,
    sasrec: see fitted_baselines. oracle: the best possible scores, where the folder's maker knows them
    (oracle.parquet).

    which: "cheap" leaves out what takes seconds to fit: lambdamart (sasrec where lists have one target each), and
    biased_mf of more than QUICK_RATINGS ratings; "all": everything, a line to `notice` for what cannot be had; "none":
    random alone.
    """
    check_which(which)
    index = [[item.index for item in entry.candidates] for entry in lists]
    scores: dict[str, Scores] = {"random": [np.zeros(len(row)) for row in index]}
    if which != "none":
        count, mean = (np.asarray(x, dtype=np.float64) for x in (prepared.train_count, prepared.train_mean))
        rated = count > 0
        overall = float(np.average(mean[rated], weights=count[rated])) if rated.any() else 0.0
        mean = np.where(rated, mean, overall)
        shrunk = (count * mean + AVERAGE_PRIOR * overall) / (count + AVERAGE_PRIOR)
        by_item = {"popularity": count, "mean_rating": mean, "shrunk_mean": shrunk}
        scores |= {name: [values[row] for row in index] for name, values in by_item.items()}
        scores |= hint_scores(lists)
        fitted = rating_model_scores(prepared, lists, split, None if which == "all" else QUICK_RATINGS)
        scores |= {} if fitted is None else {"biased_mf": fitted}
    if which == "all":
        one_target = prepared.targets is not None and split != "train"
        name, fit = ("sasrec", sasrec_scores) if one_target else ("lambdamart", lambdamart_scores)
        try:
            scores[name] = fit(prepared, lists, split)
        except AlroFastError as error:
            notice(f"no row {name}: {error}")
    oracle = Path(prepared.path) / "oracle.parquet"
    if oracle.is_file():
        known = read_oracle(oracle)
        if all(entry.list_id in known for entry in lists):
            scores["oracle"] = [known[entry.list_id] for entry in lists]
    return scores


def hint_scores(lists: Sequence[RankingList]) -> dict[str, Scores]:
    """hints: by predicted rating, unknown ones last; only where every list has hints."""
    if not lists or not all(entry.hints for entry in lists):
        return {}
    return {"hints": [np.nan_to_num(np.asarray(entry.hints), nan=-1e9) for entry in lists]}


def first_stage_scores(lists: Sequence[RankingList]) -> dict[str, Scores]:
    """The first stage as a ranker. retriever: the order in which candidates are stored. hints: see hint_scores."""
    stored: Scores = [-np.arange(len(entry.candidates), dtype=np.float64) for entry in lists]
    return {"retriever": stored} | hint_scores(lists)
