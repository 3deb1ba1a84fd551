"""Rankers that need no language model, to stand beside one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.oracle import read_oracle
from .results import Scores

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList


def baseline_scores(prepared: PreparedData, lists: Sequence[RankingList]) -> dict[str, Scores]:
    """Rankers that need no model.

    random: all tied, so that averaged ties give its exact mean. popularity: training ratings of the item. mean_rating:
    its mean in training (never rated there: the mean of all training ratings). oracle: the best possible scores, where
    the folder's maker knows them (oracle.parquet).
    """
    count, mean = np.asarray(prepared.train_count, dtype=np.float64), np.asarray(prepared.train_mean, dtype=np.float64)
    rated = count > 0
    overall = float(np.average(mean[rated], weights=count[rated])) if rated.any() else 0.0
    mean = np.where(rated, mean, overall)
    index = [[item.index for item in entry.candidates] for entry in lists]
    scores: dict[str, Scores] = {
        "random": [np.zeros(len(row)) for row in index],
        "popularity": [count[row] for row in index],
        "mean_rating": [mean[row] for row in index],
    }
    oracle = Path(prepared.path) / "oracle.parquet"
    if oracle.is_file():
        known = read_oracle(oracle)
        if all(entry.list_id in known for entry in lists):
            scores["oracle"] = [known[entry.list_id] for entry in lists]
    return scores


def first_stage_scores(lists: Sequence[RankingList]) -> dict[str, Scores]:
    """The first stage as a ranker. retriever: the order in which candidates are stored. hints: by predicted rating,
    unknown ones last; only where every list has hints."""
    scores: dict[str, Scores] = {"retriever": [-np.arange(len(entry.candidates), dtype=np.float64) for entry in lists]}
    if lists and all(entry.hints for entry in lists):
        scores["hints"] = [np.nan_to_num(np.asarray(entry.hints), nan=-1e9) for entry in lists]
    return scores
