"""RecRanker's utilities: what the three tasks say of a user's candidates, as one score each (arXiv 2312.16018).

    U(i) = grade_weight grade + order (m - i) + win_weight win + place_weight (top - place), no place below 0

grade: the rating of candidate i. win: 1 for the winner of a pair, 0 for the loser, 1/2 each when the two orders of
asking disagree, and for a candidate in no pair. place: 0-based place in the listwise answer, which names five; a
candidate it does not name gets 0 for it. i: 0-based place in the list as given, the retriever's order; m: candidates.

Two sets of constants are here by name. `code` is the authors' released scoring (data_processing/cal_result.py): the
rating decides, the rest separates equal ones. `figure` is their inference figure, a picture in fig/ of the release: raw
utilities, weighted by a third each. How the paper's text defines them is not known here (docs/methods.md 3.5).

    code    grade + 0.05 (m - i) + 0.5 win + 0.025 (5 - place)
    figure  (grade + 2 win + (m - place)) / 3

Others are given as text, `grade=1,win=0.5,order=0.05,place=0.025,top=5`; a weight that is left out is 0, top 5.
Everything also takes expectations: an expected grade, a probability of winning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import AlroFastError


class Constants(NamedTuple):
    """U = grade * grade_i + order (m - i) + win * win_i + place (top - place_i), not below 0.

    top: candidates that the listwise answer orders; None: all m.
    """

    grade: float = 0.0
    win: float = 0.0
    order: float = 0.0
    place: float = 0.0
    top: int | None = 5


HYBRIDS = {
    "code": Constants(grade=1.0, win=0.5, order=0.05, place=0.025, top=5),
    "figure": Constants(grade=1 / 3, win=2 / 3, place=1 / 3, top=None),
}
SPELLED = "grade=1,win=0.5,order=0.05,place=0.025"  # the constants of code
PAIRINGS = ("matching", "all")
PAIR_ORDERS = ("both", "one")


def utilities(grades: np.ndarray, wins: np.ndarray, places: np.ndarray, constants: Constants) -> np.ndarray:
    """Utility of every candidate, float64 [m].

    grades: [m] ratings. wins: [m] in 0..1. places: [m] 0-based places in the listwise answer, NaN for a candidate it
    does not name.
    """
    m = len(grades)
    top = m if constants.top is None else constants.top
    by_grade = constants.grade * np.asarray(grades, dtype=np.float64) + constants.order * (m - np.arange(m))
    by_pair = constants.win * np.asarray(wins, dtype=np.float64)
    by_list = constants.place * np.nan_to_num(np.maximum(top - np.asarray(places, dtype=np.float64), 0.0))
    return by_grade + by_pair + by_list


def constants_of(hybrid: str) -> Constants:
    """The constants of that name, or those that the text spells out; AlroFastError for anything else."""
    if hybrid in HYBRIDS:
        return HYBRIDS[hybrid]
    if hybrid == "paper":
        raise AlroFastError("--hybrid paper is called figure now: its constants are those of a figure; give figure")
    if "=" not in hybrid:
        raise AlroFastError(f"--hybrid {hybrid!r} is unknown; expected {' or '.join(HYBRIDS)}, or constants: {SPELLED}")
    found: dict[str, float | int | None] = {}
    for part in hybrid.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in Constants._fields or name in found:
            raise AlroFastError(
                f"--hybrid {hybrid!r}: {part.strip()!r} names no constant, or one again; expected some of "
                f"{', '.join(Constants._fields)}, such as {SPELLED}"
            )
        found[name] = _top(value, hybrid) if name == "top" else _weight(name, value, hybrid)
    constants = Constants(**found)  # type: ignore[arg-type]
    if not any(constants[:-1]):
        raise AlroFastError(f"--hybrid {hybrid!r} leaves every weight at 0; give one that is not, such as {SPELLED}")
    return constants


def of_tasks(hybrid: str, task_weights: Sequence[float]) -> str:
    """The same constants without those of a task whose weight in training (pointwise, pairwise, listwise) is 0.

    AlroFastError where none of a task that was trained is left.
    """
    constants = constants_of(hybrid)
    of_each = zip((constants.grade, constants.win, constants.place), task_weights, strict=True)
    grade, win, place = (value if weight else 0.0 for value, weight in of_each)
    left = constants._replace(grade=grade, win=win, place=place)
    if left == constants:
        return hybrid
    if not (left.grade or left.win or left.place):
        raise AlroFastError(
            f"--hybrid {hybrid} reads only tasks that --task_weights leaves out; give one that reads a trained task"
        )
    spelled = [f"{name}={getattr(left, name)!r}" for name in ("grade", "win", "order", "place") if getattr(left, name)]
    return ",".join([*spelled, f"top={'all' if left.top is None else left.top}"])


def _weight(name: str, value: str, hybrid: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise AlroFastError(f"--hybrid {hybrid!r}: {name} is {value!r}; expected a number of at least 0")
    return number


def _top(value: str, hybrid: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise AlroFastError(f"--hybrid {hybrid!r}: top is {value!r}; expected a whole number of at least 1, or all")
    return int(value)


def pairs_of(candidates: int, pairing: str, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Which candidates are compared. matching: each in one random pair, as RecRanker does (one of an odd number in
    none); all: every two."""
    if pairing == "all":
        return [(i, j) for i in range(candidates) for j in range(i + 1, candidates)]
    if pairing != "matching":
        raise AlroFastError(f"--pairing {pairing!r} is unknown; expected one of {', '.join(PAIRINGS)}")
    drawn = generator.permutation(candidates).tolist()
    return [(drawn[p], drawn[p + 1]) for p in range(0, candidates - 1, 2)]


def ways_of(pairs: Iterable[tuple[int, int]], pair_orders: str) -> list[tuple[int, int]]:
    """In what orders the two of each pair are named. both: pair after pair, either way; one: as the pair stands."""
    if pair_orders not in PAIR_ORDERS:
        raise AlroFastError(f"--pair_orders {pair_orders!r} is unknown; expected one of {', '.join(PAIR_ORDERS)}")
    return [way for pair in pairs for way in ((pair, pair[::-1]) if pair_orders == "both" else (pair,))]


def first_shares(first_named: Sequence[float], pair_orders: str) -> list[float]:
    """How far the first of each pair wins, from how far the first named of each of `ways_of` does."""
    if pair_orders == "one":
        return list(first_named)
    return [(one + (1 - other)) / 2 for one, other in zip(first_named[::2], first_named[1::2], strict=True)]


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
