"""The signals that may stand beside an item: what each one is (how they are made: signals.py; how shown: prompts)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .records import RankingList

SIGNALS = {  # name -> what it is; the names of columns, of fragments in templates and of keys in JSON lists
    "average": "mean rating of the item, shrunk towards the mean of all ratings; unknown for an item without ratings",
    "count": "number of ratings of the item",
    "hint": "predicted rating of the item by this user: biased matrix factorisation with the item's attributes",
    "near": "what the user gave above the average to the items most alike, in the ratings' unit",
    "retriever": "share of the items that a first stage's retriever can score which it ranks no higher for this user",
}
PREPARED = ("average", "count", "hint", "near")  # what alro_fast.prepare computes; first_stage: hint and retriever
OF_CANDIDATES = ("hint", "near", "retriever")  # what is predicted: items of the history have their rating beside them
STEPS = (1, 2, 5)  # of every power of ten: where a new bucket of counts begins


def bucket(count: float) -> tuple[int, int]:
    """(number, lowest count) of the bucket of a count: 0, 1, 2, 5, 10, 20, 50, 100, ... begin one each."""
    if count < 1:
        return 0, 0
    power = int(math.log10(count + 0.5))
    step = max(place for place, start in enumerate(STEPS) if start * 10**power <= count)
    return 1 + len(STEPS) * power + step, STEPS[step] * 10**power


def signal_features(one: RankingList, names: Sequence[str]) -> np.ndarray:
    """float64 [candidates, 2 x names]: every signal, then its difference from the list's mean; NaN: unknown."""
    values = np.array([one.signal(name).candidates or [np.nan] * len(one.candidates) for name in names]).T
    known = ~np.isnan(values)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.concatenate([values, values - mean], axis=1)
