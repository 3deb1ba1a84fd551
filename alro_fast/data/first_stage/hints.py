"""The hints of a first stage: predicted ratings, those of training candidates out of fold."""

from __future__ import annotations

import numpy as np

from ...errors import AlroFastError
from ..rating_model import RatingModel, fit_ratings
from ..seeds import splitmix64
from .likes import LikeSplit


class FoldedModels:
    """One model of all training ratings, and one per fold that has not seen the fold.

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
        key = splitmix64(np.asarray(user).astype(np.uint64) + splitmix64(np.array([self.seed], dtype=np.uint64)))
        return (splitmix64(key ^ np.asarray(item).astype(np.uint64)) % np.uint64(self.folds)).astype(np.int64)

    def out_of_fold(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """float64 [n]: each pair predicted by the model that has not seen its fold."""
        fold = self.fold(user, item)
        predicted = np.empty(len(fold))
        for k, model in enumerate(self.without):
            here = fold == k
            predicted[here] = model.predict(user[here], item[here])
        return predicted
