"""What a first stage says of a candidate: a predicted rating, and its place with the retriever.

Of training candidates by models that have not seen them, else a prompt would tell its answer: a retriever ranks what it
was fitted on first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...errors import AlroFastError
from ..rating_model import RatingModel, fit_ratings
from ..seeds import splitmix64
from .likes import LikeSplit
from .retrieval import Retriever

CELLS = 1 << 22  # comparisons held at once


class FoldedModels:
    """One rating model of all training ratings, and one per fold that has not seen the fold.

    The fold of a (user, item) pair is a hash of both and the seed, so it does not depend on which pairs are rated:
    a rated candidate and an unrated one of the same list are predicted by models of the same make.
    """

    def __init__(self, split: LikeSplit, folds: int, seed: int):
        from threadpoolctl import threadpool_limits

        user, item, rating = split.user, split.item, split.rating.astype(np.float64)
        self.folds, self.seed = folds, seed
        fold = self.fold(user, item)

        def fit(kept: np.ndarray) -> RatingModel:
            return fit_ratings(user[kept], item[kept], rating[kept], split.users, split.items, seed=seed)

        if (np.bincount(fold, minlength=folds) == len(fold)).any():
            raise AlroFastError(f"{len(fold)} training ratings are too few for --folds {folds}; give more ratings")
        with threadpool_limits(1):  # the same seed, the same numbers
            self.whole = fit(fold >= 0)
            self.without = [fit(fold != k) for k in range(folds)]
        out = self.out_of_fold(user, item)
        self.error = float(np.sqrt(np.mean((out - rating) ** 2)))  # root mean square, out of fold

    def fold(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """int64 [n] in 0 .. folds - 1."""
        return fold_of(user, item, self.folds, self.seed)

    def out_of_fold(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """float64 [n]: each pair predicted by the model that has not seen its fold."""
        fold = self.fold(user, item)
        predicted = np.empty(len(fold))
        for k, model in enumerate(self.without):
            here = fold == k
            predicted[here] = model.predict(user[here], item[here])
        return predicted


class FoldedRetrievers:
    """The retriever, and one per fold of `FoldedModels` that has not seen the fold's likes.

    refit: the same retriever, fitted on the likes of another split.
    """

    def __init__(
        self, split: LikeSplit, folds: int, seed: int, whole: Retriever, refit: Callable[[LikeSplit], Retriever]
    ):
        self.folds, self.seed, self.whole = folds, seed, whole
        fold = fold_of(split.user, split.item, folds, seed)
        below = np.float32(split.like - 1)
        self.without = [refit(replace(split, rating=np.where(fold == k, below, split.rating))) for k in range(folds)]

    def out_of_fold(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """float64 [n]: `places` of each pair by the retriever that has not seen its fold."""
        fold, found = fold_of(user, item, self.folds, self.seed), np.empty(len(user))
        for k, retriever in enumerate(self.without):
            here = fold == k
            found[here] = places(retriever, user[here], item[here])
        return found


def fold_of(user: np.ndarray, item: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """int64 [n] in 0 .. folds - 1: by a hash of user, item and seed."""
    key = splitmix64(np.asarray(user).astype(np.uint64) + splitmix64(np.array([seed], dtype=np.uint64)))
    return (splitmix64(key ^ np.asarray(item).astype(np.uint64)) % np.uint64(folds)).astype(np.int64)


def places(retriever: Retriever, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """float64 [n] in 0..1: the share of the items that the retriever can score which it ranks no higher than `item`.

    0 for an item that it cannot score. Of one unit whatever the retriever, and whichever fold it was fitted without.
    """
    found = np.zeros(len(user))
    column = np.minimum(np.searchsorted(retriever.known, item), len(retriever.known) - 1)
    scored = np.flatnonzero(retriever.known[column] == item)
    scored = scored[np.argsort(user[scored], kind="stable")]
    block = max(1, CELLS // len(retriever.known))
    for rows in np.split(scored, range(block, len(scored), block)):
        own, which = np.unique(user[rows], return_inverse=True)
        scores = np.asarray(retriever.score(own), dtype=np.float32)[which] if len(rows) else np.zeros((0, 1))
        found[rows] = (scores <= scores[np.arange(len(rows)), column[rows]][:, None]).mean(axis=1)
    return found
