"""The signals that may stand beside an item: what each one is (how they are made: signals.py; how shown: prompts)."""

from __future__ import annotations

import math

SIGNALS = {  # name -> what it is; the names of columns, of fragments in templates and of keys in JSON lists
    "average": "mean rating of the item, shrunk towards the mean of all ratings; unknown for an item without ratings",
    "count": "number of ratings of the item",
    "hint": "predicted rating of the item by this user: biased matrix factorisation with the item's attributes",
}
OF_CANDIDATES = ("hint",)  # what is predicted: items of the history have their rating beside them
STEPS = (1, 2, 5)  # of every power of ten: where a new bucket of counts begins


def bucket(count: float) -> tuple[int, int]:
    """(number, lowest count) of the bucket of a count: 0, 1, 2, 5, 10, 20, 50, 100, ... begin one each."""
    if count < 1:
        return 0, 0
    power = int(math.log10(count + 0.5))
    step = max(place for place, start in enumerate(STEPS) if start * 10**power <= count)
    return 1 + len(STEPS) * power + step, STEPS[step] * 10**power
