"""RecRanker's utilities: what the three tasks say of a user's candidates, as one score each (arXiv 2312.16018).

Two sets of constants are known, and both are here by name. `paper` is the inference figure: raw utilities, weighted by
a third each. `code` is the released scoring: the rating decides, the rest separates equal ones.

    paper   (grade + 2 win + (m - place)) / 3
    code    grade + 0.05 (m - i) + 0.5 win + 0.025 (5 - place)

grade: the rating of candidate i. win: 1 for the winner of a pair, 0 for the loser, 1/2 each when the two orders of
asking disagree, and for a candidate in no pair. place: 0-based place in the listwise answer, which names five; a
candidate it does not name gets 0 for it. i: 0-based place in the list as given, the retriever's order; m: candidates.

Everything also takes expectations: an expected grade, a probability of winning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..errors import AlroFastError


class Constants(NamedTuple):
    """U = weights[0] (grade + order (m - i)) + weights[1] pair win + weights[2] listed (top - place), not below 0.

    top: candidates that the listwise answer orders; None: all m.
    """

    weights: tuple[float, float, float]
    order: float
    pair: float
    listed: float
    top: int | None


HYBRIDS = {
    "paper": Constants(weights=(1 / 3, 1 / 3, 1 / 3), order=0.0, pair=2.0, listed=1.0, top=None),
    "code": Constants(weights=(1.0, 1.0, 1.0), order=0.05, pair=0.5, listed=0.025, top=5),
}
PAIRINGS = ("matching", "all")


def utilities(grades: np.ndarray, wins: np.ndarray, places: np.ndarray, constants: Constants) -> np.ndarray:
    """Utility of every candidate, float64 [m].

    grades: [m] ratings. wins: [m] in 0..1. places: [m] 0-based places in the listwise answer, NaN for a candidate it
    does not name.
    """
    m = len(grades)
    point, pair, listed = constants.weights
    top = m if constants.top is None else constants.top
    by_grade = np.asarray(grades, dtype=np.float64) + constants.order * (m - np.arange(m))
    by_pair = constants.pair * np.asarray(wins, dtype=np.float64)
    by_list = constants.listed * np.nan_to_num(np.maximum(top - np.asarray(places, dtype=np.float64), 0.0))
    return point * by_grade + pair * by_pair + listed * by_list


def constants_of(name: str) -> Constants:
    """The constants of that name; AlroFastError for another."""
    if name not in HYBRIDS:
        raise AlroFastError(f"--hybrid {name!r} is unknown; expected one of {', '.join(HYBRIDS)}")
    return HYBRIDS[name]


def pairs_of(candidates: int, pairing: str, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Which candidates are compared. matching: each in one random pair, as RecRanker does (one of an odd number in
    none); all: every two."""
    if pairing == "all":
        return [(i, j) for i in range(candidates) for j in range(i + 1, candidates)]
    if pairing != "matching":
        raise AlroFastError(f"--pairing {pairing!r} is unknown; expected one of {', '.join(PAIRINGS)}")
    drawn = generator.permutation(candidates).tolist()
    return [(drawn[p], drawn[p + 1]) for p in range(0, candidates - 1, 2)]


def win_shares(candidates: int, pairs: Iterable[tuple[int, int]], first_wins: Iterable[float]) -> np.ndarray:
    """Mean of a candidate's wins over its pairs, [m]; 1/2 where it is in none. first_wins: in 0..1, per pair."""
    total, count = np.zeros(candidates), np.zeros(candidates)
    for (first, second), won in zip(pairs, first_wins, strict=True):
        total[first] += won
        total[second] += 1 - won
        count[[first, second]] += 1
    return np.divide(total, count, out=np.full(candidates, 0.5), where=count > 0)


def places_of(order: Iterable[int], candidates: int) -> np.ndarray:
    """Place of each candidate in an answer that names `order`, [m]; NaN for those it leaves out."""
    places = np.full(candidates, np.nan)
    for place, i in enumerate(order):
        places[i] = place
    return places
