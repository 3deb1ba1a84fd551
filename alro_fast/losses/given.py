"""What callers give of lists, checked and as plain Python lists: sequences, arrays and tensors alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from ..data.records import LARGEST_RATING
from ..errors import AlroFastError
from ..ops.checks import is_number


def rows_of(name: str, given: Any) -> list[list[Any]]:
    """One sequence for every list, of values of any kind. AlroFastError for what holds no sequences."""
    try:
        return [[_plain(value) for value in _plain(row)] for row in _plain(given)]
    except TypeError:
        raise AlroFastError(
            f"{name} is {_short(given)}; expected a sequence for every list, or an array of two axes"
        ) from None


def ratings_of(name: str, given: Any) -> list[list[float]]:
    """Ratings of every list, none empty; NaN: ungraded. AlroFastError for what is no rating."""
    rows = _checked(
        name,
        rows_of(name, given),
        lambda value: is_number(value) and (0 <= value <= LARGEST_RATING or math.isnan(value)),
        f"a number in 0 .. {LARGEST_RATING:g}, or NaN where there is none",
    )
    if [] in rows:
        raise AlroFastError(f"{name} of list {rows.index([])} are none; expected one candidate at least in every list")
    return [[float(value) for value in row] for row in rows]


def tokens_of(name: str, given: Any) -> list[list[int]]:
    """Token ids of every sequence. AlroFastError for what is none."""
    return _checked(name, rows_of(name, given), lambda value: is_whole(value) and value >= 0, "a token id, at least 0")


def whole_of(name: str, given: Any, least: int, end: float = math.inf) -> list[int]:
    """A whole number for every list, from `least` to below `end`."""
    (row,) = rows_of(name, [given])
    expected = f"a whole number of at least {least}" + (f" and below {end}" if end < math.inf else "")
    for place, value in enumerate(row):
        if not (is_whole(value) and least <= value < end):
            raise AlroFastError(f"{name}[{place}] is {_short(value)}; expected {expected}")
    return row


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked(name: str, rows: list[list[Any]], ok: Callable[[Any], bool], expected: str) -> list[list[Any]]:
    for number, row in enumerate(rows):
        for place, value in enumerate(row):
            if not ok(value):
                raise AlroFastError(f"{name}[{number}][{place}] is {_short(value)}; expected {expected}")
    return rows


def _plain(given: Any) -> Any:
    return given.tolist() if hasattr(given, "tolist") else given


def _short(value: Any) -> str:
    return " ".join(f"{value!r:.60}".split())
