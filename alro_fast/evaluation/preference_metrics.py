"""How often a model prefers what the user chose, from summed answer log-probabilities.

| metric | is |
| --- | --- |
| pair_accuracy | share of (chosen, rejected) pairs whose chosen answer is likelier, a tie counting half |
| user_auc | the same within each user, then averaged over users |
| hit@1 | share of records whose chosen answer beats every rejected one (a prompt per pair: in every pair) |
| valid | share of records whose scores are all finite: nothing is generated, so nothing can fail to parse |
| pooled_coin_auc | the DMPO authors' AUC: see `pooled_coin_auc` |

The first three compare answers of one user to one prompt. All arithmetic is float64 numpy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .metrics import Interval, bootstrap_interval


class Scored(NamedTuple):
    """One record's scores: chosen [P], rejected [k]; paired: chosen[i] stands against rejected[i] alone, P = k."""

    user_id: str
    chosen: np.ndarray
    rejected: np.ndarray
    paired: bool = False

    def valid(self) -> bool:
        """True where every score is a finite number."""
        return bool(np.isfinite(self.chosen).all() and np.isfinite(self.rejected).all())

    def wins(self) -> np.ndarray:
        """1, 1/2 or 0 for every pair: won, tied, lost."""
        chosen = self.chosen if self.paired else self.chosen[:, None]
        return 0.5 * (1 + np.sign(chosen - self.rejected)).ravel()

    def hit(self) -> float:
        """1 where the best answer is a chosen one; ties shared out."""
        if self.paired:
            return float(np.prod(self.wins()))
        best = max(self.chosen.max(), self.rejected.max())
        tied = (self.chosen == best).sum()
        return float(tied / (tied + (self.rejected == best).sum()))


def preference_metrics(records: Sequence[Scored], seed: int = 42) -> dict[str, float]:
    """Every metric of the table above; NaN without records."""
    total, records = len(records), [one for one in records if one.valid()]
    if not records:
        return dict.fromkeys(("pair_accuracy", "user_auc", "hit@1", "pooled_coin_auc"), float("nan")) | {"valid": 0.0}
    return {
        "pair_accuracy": float(np.concatenate([one.wins() for one in records]).mean()),
        "user_auc": float(np.mean(user_accuracies(records))),
        "hit@1": float(np.mean([one.hit() for one in records])),
        "valid": len(records) / total,
        "pooled_coin_auc": pooled_coin_auc(records, seed),
    }


def accuracy_interval(records: Sequence[Scored], resamples: int = 1000) -> Interval:
    """`user_auc` of the valid records, with its 95 % interval over users; ends are NaN where resamples is 0."""
    values = user_accuracies([one for one in records if one.valid()])
    if not resamples:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    return bootstrap_interval(values, resamples=resamples)


def user_accuracies(records: Sequence[Scored]) -> np.ndarray:
    """Pair accuracy of each user, all pairs of a user's records together; float64 [users], by first appearance."""
    by_user: dict[str, list[np.ndarray]] = {}
    for one in records:
        by_user.setdefault(one.user_id, []).append(one.wins())
    return np.array([np.concatenate(wins).mean() for wins in by_user.values()])


def pooled_coin_auc(records: Sequence[Scored], seed: int = 42) -> float:
    """The DMPO authors' AUC (docs/methods.md 2.5): of every pair a fair coin keeps the chosen answer (label 1) or the
    rejected one (label 0); area under the ROC curve of the summed log-probabilities over all pairs pooled.

    It compares answers of different users, and lengths: mostly it measures whether likely texts are chosen ones. Beside
    pair accuracy it is here to be set against published figures. NaN when all coins fall alike. The coins are Python's
    `random.Random(seed)`, one per pair in file order.
    """
    coin = random.Random(seed)
    scores, labels = [], []
    for one in records:
        chosen = one.chosen if one.paired else np.repeat(one.chosen, len(one.rejected))
        rejected = one.rejected if one.paired else np.tile(one.rejected, len(one.chosen))
        for better, worse in zip(chosen, rejected):
            heads = coin.random() < 0.5
            labels.append(heads)
            scores.append(better if heads else worse)
    return roc_auc(np.array(scores), np.array(labels, dtype=bool))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties half; NaN when one class is missing."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank of each value, from 1
    return float((rank[place][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))
