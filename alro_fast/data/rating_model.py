"""Predicted ratings: biased matrix factorisation.

    r(u, i) = mean + b_u + b_i + p_u . q_i                                            (Koren, Bell and Volinsky 2009)

fitted by alternating ridge regressions (a user's b_u and p_u together, then an item's), in float64 numpy. A user or an
item without ratings has zeros, so its prediction falls back on the other's bias. Predictions are clipped to the range
of the ratings it was fitted on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import seeds

FACTORS, ROUNDS = 8, 8
BIAS_RIDGE, FACTOR_RIDGE = 4.0, 12.0  # added to the normal equations: as many ratings that say "the mean"


@dataclass(frozen=True, slots=True)
class RatingModel:
    """user: float64 [users, 1 + d], bias first; item: float64 [items, 1 + d]; low, high: range of the ratings."""

    mean: float
    user: np.ndarray
    item: np.ndarray
    low: float
    high: float

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """float64 [n] for index arrays [n]."""
        taste = np.einsum("nd,nd->n", self.user[user, 1:], self.item[item, 1:])
        return np.clip(self.mean + self.user[user, 0] + self.item[item, 0] + taste, self.low, self.high)


def fit_ratings(
    user: np.ndarray,
    item: np.ndarray,
    rating: np.ndarray,
    users: int,
    items: int,
    *,
    factors: int = FACTORS,
    seed: int = 0,
) -> RatingModel:
    """Fit on rows (user, item, rating) [n]."""
    mean = float(rating.mean())
    generator = seeds.generator(seed, seeds.RATING_MODEL)
    by_user, by_item = _Side(user, item, rating - mean, users), _Side(item, user, rating - mean, items)
    item_side = np.zeros((items, 1 + factors))
    item_side[:, 1:] = generator.normal(scale=0.1, size=(items, factors))
    item_side[:, 1:][np.bincount(item, minlength=items) == 0] = 0.0
    for _ in range(ROUNDS):
        user_side = by_user.solve(item_side)
        item_side = by_item.solve(user_side)
    return RatingModel(mean, user_side, item_side, float(rating.min()), float(rating.max()))


class _Side:
    """Rows grouped by the side that is solved for."""

    def __init__(self, own: np.ndarray, other: np.ndarray, residual: np.ndarray, count: int):
        order = np.argsort(own, kind="stable")
        self.count, self.residual = count, residual[order]
        self.ids, starts = np.unique(own[order], return_index=True)
        self.cuts = np.append(starts, len(own))
        self.other = other[order]

    def solve(self, other_side: np.ndarray) -> np.ndarray:
        """[count, 1 + d]: ridge regression of residual - other's bias on (1, other's factors)."""
        width = other_side.shape[1]
        gram = np.empty((len(self.ids), width, width))
        moment = np.empty((len(self.ids), width, 1))
        for group, (first, last) in enumerate(itertools.pairwise(self.cuts.tolist())):
            features = other_side[self.other[first:last]]
            wanted = self.residual[first:last] - features[:, 0]
            features[:, 0] = 1.0
            gram[group] = features.T @ features
            moment[group, :, 0] = wanted @ features
        solved = np.zeros((self.count, width))
        ridge = np.diag([BIAS_RIDGE] + [FACTOR_RIDGE] * (width - 1))
        solved[self.ids] = np.linalg.solve(gram + ridge, moment)[:, :, 0]
        return solved
