"""Baselines that are fitted on what a prepared folder holds: nothing they learn from is in a list they order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ..data.rating_model import fit_ratings
from ..data.signal_table import SIGNALS, signal_features
from ..errors import AlroFastError
from . import metrics
from .results import Scores

if TYPE_CHECKING:
    from ..data.lists import Lists, PreparedData
    from ..data.records import RankingList

QUICK_RATINGS = 300_000  # a biased matrix factorisation of as many is fitted in some 3 seconds on one core
ROUNDS, PATIENCE, CUTOFF = 600, 50, 3  # trees at most, rounds without a better NDCG@3 on the validation lists
LAMBDAMART = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [CUTOFF], "learning_rate": 0.05, "num_leaves": 15,
    "min_data_in_leaf": 100, "feature_fraction": 0.6, "bagging_fraction": 0.7, "bagging_freq": 1, "lambda_l2": 10.0,
    "lambdarank_truncation_level": 6, "seed": 0, "deterministic": True, "force_row_wise": True, "num_threads": 1,
    "verbose": -1,
}  # fmt: skip
LIKE = 4.0  # of a folder that does not say what a like is


def rating_model_scores(
    prepared: PreparedData, lists: Sequence[RankingList], split: str, most: int | None = None
) -> Scores | None:
    """biased_mf: predicted ratings (data/rating_model.py), fitted on all ratings that the folder knows before the
    lists of `split`. None for training lists, whose ratings it would have seen, and for more than `most` ratings."""
    if split == "train":
        return None
    known = prepared.known_ratings(split)
    if not known.height or (most is not None and known.height > most):
        return None
    users = known["user_id"].unique(maintain_order=True)
    code = dict(zip(users, range(len(users))))
    user = known["user_id"].replace_strict(code, return_dtype=pl.Int64).to_numpy()
    rating = known["rating"].to_numpy().astype(np.float64)
    model = fit_ratings(user, known["item"].to_numpy(), rating, len(users) + 1, len(prepared.items))
    whose = [code.get(one.user_id, len(users)) for one in lists]  # one more, without ratings, for the unknown
    index = [np.array([item.index for item in one.candidates]) for one in lists]
    return [model.predict(np.full(len(row), user), row) for user, row in zip(whose, index)]


def lambdamart_scores(prepared: PreparedData, lists: Sequence[RankingList], split: str) -> Scores:
    """lambdamart: LightGBM's LambdaMART on the signals of the lists, trained on the training lists; as many trees as
    give the best NDCG on the validation lists.

    Features of a candidate: every signal, and its difference from the list's mean. AlroFastError, saying what is
    missing, where it cannot be fitted.
    """
    train, valid = prepared.lists("train"), prepared.lists("valid")
    names = [name for name in SIGNALS if name in train.signals]
    if not names:
        raise AlroFastError("the lists carry no signals; prepare them with --signals")
    try:
        import lightgbm
    except ImportError:
        raise AlroFastError("LightGBM is not here: pip install 'alro-fast[baselines]'") from None
    grades = np.unique([rating for one in train for rating in one.ratings if rating == rating])
    chosen, held = (_Ranked.of(some, names, grades) for some in (train, valid))
    if not len(chosen.sizes) or not len(held.sizes):
        raise AlroFastError("there are no training or no validation lists with something to rank")
    gain = (metrics.gains(grades) / max(metrics.gains(grades).max(), 1e-9)).tolist()
    data = lightgbm.Dataset(chosen.features, chosen.labels, group=chosen.sizes)
    checked = lightgbm.Dataset(held.features, held.labels, group=held.sizes, reference=data)
    model = lightgbm.train(
        LAMBDAMART | {"label_gain": gain}, data, ROUNDS, valid_sets=[checked],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )  # fmt: skip
    rows = [signal_features(one, names) for one in lists]
    scores = model.predict(np.concatenate(rows), num_iteration=model.best_iteration, num_threads=1)
    return np.split(scores, np.cumsum([len(row) for row in rows])[:-1])


class _Ranked:
    """Rated candidates of the lists that have something to rank. labels: number of the grade; sizes: rows per list."""

    def __init__(self, features: list[np.ndarray], labels: list[np.ndarray]) -> None:
        self.sizes = [len(row) for row in labels]
        self.features = np.concatenate(features) if features else np.zeros((0, 0))
        self.labels = np.concatenate(labels) if labels else np.zeros(0)

    @classmethod
    def of(cls, lists: Lists, names: Sequence[str], grades: np.ndarray) -> _Ranked:
        features, labels = [], []
        for one in lists:
            ratings = np.asarray(one.ratings)
            rated = ~np.isnan(ratings)
            if not one.all_equal:
                features.append(signal_features(one, names)[rated])
                labels.append(np.minimum(np.searchsorted(grades, ratings[rated] - 1e-6), len(grades) - 1))
        return cls(features, labels)


def sasrec_scores(prepared: PreparedData, lists: Sequence[RankingList], split: str) -> Scores:
    """sasrec: for lists with one target each, the self-attentive retriever (data/first_stage/sasrec.py), trained on the
    likes of all histories of `split`, in time order."""
    from ..data.first_stage.retrieval import DEFAULTS
    from ..data.first_stage.sasrec import train_sasrec

    like = prepared.manifest.get("options", {}).get("like") or LIKE
    every = prepared.lists(split)
    sequences = [
        np.array([item.index for item, rating in zip(one.history, one.history_ratings) if rating >= like], dtype=int)
        for one in every
    ]
    chosen = {name: DEFAULTS["sasrec"][name] for name in ("factors", "iterations", "learning_rate")}
    users, items = train_sasrec(sequences, len(prepared.items), seed=0, **chosen)
    state = {one.list_id: users[row] for row, one in enumerate(every)}
    return [items[[item.index for item in one.candidates]] @ state[one.list_id] for one in lists]
